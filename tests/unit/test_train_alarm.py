"""Alarms reach a real program and a real server, and no failure of theirs reaches the run."""

import errno
import json
import logging
import math
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from started import Ended, trinity
from trinity.base.errors import ConfigError, StorageError, TrainingHalted, UsageError
from trinity.config.load import override
from trinity.parallel.mesh import World
from trinity.recipes.table import recipe
from trinity.train import loop
from trinity.train.alarm import WEBHOOK, Alarm, Channel, Command, Pager, Webhook, channels
from trinity.train.watch import Watch

SECRET = "very-secret-token"
FIELDS = {"kind", "run", "step", "tokens", "sentence", "action", "host", "rank", "time", "held_back", "text"}


def an_alarm(kind: str = "spike") -> Alarm:
    return Alarm(kind, "loss 9.0 after 3.0", "skip", "run", 7, 7168, "node1", 0, "2026-01-01T00:00:00+00:00")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(WEBHOOK, raising=False)


class Server:
    """A loopback server that answers each POST with the next of `codes`, the last one for ever."""

    def __init__(self, codes: list[int], seconds: float = 0.0) -> None:
        self.got: list[dict] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.got.append({**json.loads(body), "path": self.path, "type": self.headers["Content-Type"]})
                time.sleep(seconds)
                self.send_response(codes[min(len(outer.got), len(codes)) - 1])
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/hook/{SECRET}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))

    def __enter__(self) -> "Server":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def test_a_program_gets_the_alarm_as_json_without_a_shell(tmp_path):
    script, out = tmp_path / "pager.py", tmp_path / "out $HOME"
    script.write_text("import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read())")
    assert Command(f"{sys.executable} {script} '{out}'")(an_alarm().written(2)) == ""
    found = json.loads(out.read_text())
    assert set(found) == FIELDS and found["held_back"] == 2 and found["step"] == 7
    assert found["text"].startswith("[spike] run, step 7: loss 9.0 after 3.0 -> skip (2 more")


def test_a_program_that_fails_hangs_or_does_not_listen_is_a_sentence(tmp_path):
    message = an_alarm().written(0)
    assert Command("sh -c 'exit 3'")(message) == "it ended with exit code 3"
    started = time.monotonic()
    assert Command("sh -c 'sleep 60 & sleep 60'", timeout=0.3)(message) == "it did not end within 0.3 s"
    assert time.monotonic() - started < 30
    assert Command("true")(message * 10000) == "", "more than a pipe holds, to a program that does not read"


@pytest.mark.parametrize("line", ["no-such-program-anywhere x", "sh -c 'open", "''"])
def test_a_command_that_cannot_work_is_refused_at_the_start(line):
    with pytest.raises(ConfigError, match="alarm_command"):
        channels(line, {})


@pytest.mark.parametrize(
    "address", [f"ftp://host/{SECRET}", SECRET, "http://", f"file:///{SECRET}", f"http://host:{SECRET}"]
)
def test_an_address_that_is_none_is_refused_without_showing_it(address):
    with pytest.raises(UsageError, match=WEBHOOK) as met:
        channels("", {WEBHOOK: address})
    assert SECRET not in str(met.value)
    assert channels("", {}) == [] and channels(" ", {WEBHOOK: " "}) == []


def test_a_webhook_gets_the_alarm_and_its_address_is_nowhere_else(caplog):
    caplog.set_level(logging.DEBUG)
    with Server([200]) as server:
        assert Webhook(server.address)(an_alarm().written(0)) == ""
        (got,) = server.got
        assert got["path"].endswith(SECRET) and got["type"] == "application/json" and set(got) > FIELDS
    assert SECRET not in caplog.text


def test_a_server_that_fails_is_tried_again_and_one_that_refuses_is_not():
    pauses: list[float] = []
    with Server([500, 503, 200]) as server:
        assert Webhook(server.address, pause=pauses.append)(an_alarm().written(0)) == ""
        assert len(server.got) == 3 and pauses == [2.0, 4.0]
    with Server([500]) as server:
        assert Webhook(server.address, pause=pauses.append)(an_alarm().written(0)) == "it answered 500"
    with Server([403]) as server:
        assert Webhook(server.address, pause=pauses.append)(an_alarm().written(0)) == "it answered 403"
        assert len(server.got) == 1


def test_a_server_that_is_slow_or_down_is_given_up_without_its_address():
    with Server([200], seconds=1.0) as server:
        problem = Webhook(server.address, timeout=0.1, attempts=2, pause=lambda _: None)(an_alarm().written(0))
        assert problem == "it could not be reached (ReadTimeout)"
    problem = Webhook(server.address, pause=lambda _: None)(an_alarm().written(0))
    assert problem == "it could not be reached (ConnectError)"


def test_a_kind_is_told_once_in_a_while_with_a_count_of_those_held_back():
    sent, now = [], [0.0]
    ways = [Channel("a list", lambda message: sent.append(json.loads(message)) or "")]
    pager = Pager(ways, 15, pytest.fail, lambda: now[0])
    assert pager.tell(an_alarm()) and pager.tell(an_alarm("router"))
    for minute in (1, 5, 14):
        now[0] = 60.0 * minute
        assert not pager.tell(an_alarm())
    now[0] = 900.0
    assert pager.tell(an_alarm())
    pager.close()
    assert [(alarm["kind"], alarm["held_back"]) for alarm in sent] == [("spike", 0), ("router", 0), ("spike", 3)]


def test_a_process_that_is_started_again_knows_what_was_told_and_an_end_for_good_is_told_at_once(tmp_path):
    sent, now = [], [0.0]
    ways = [Channel("a list", lambda message: sent.append(json.loads(message)) or "")]
    for minute in (0, 1, 2):
        now[0] = 60.0 * minute
        pager = Pager(ways, 15, pytest.fail, lambda: now[0], memory=tmp_path)
        assert pager.tell(an_alarm("crash")) == (minute == 0)
        pager.close()
    pager = Pager(ways, 15, pytest.fail, lambda: now[0], memory=tmp_path)
    assert pager.tell(an_alarm("crash"), at_once=True)
    pager.close()
    assert [(alarm["kind"], alarm["held_back"]) for alarm in sent] == [("crash", 0), ("crash", 2)]


@pytest.mark.parametrize(("starts", "told"), [(["a", "b"], 2), (["a", "a"], 1)])
def test_a_crash_at_one_step_is_told_once_by_the_processes_of_one_start(tmp_path, monkeypatch, starts, told):
    with Server([200]) as server:
        monkeypatch.setenv(WEBHOOK, server.address)
        for start in starts:
            with pytest.raises(OSError), Watch(tmp_path, recipe("debug").train, World.alone(), print, start) as watch:
                watch.begins(recipe("debug").course[0], 3, 3072)
                raise OSError("odd")
        assert len(server.got) == told


def test_a_way_that_fails_is_complained_of_once_and_the_others_go_on():
    said, sent, now = [], [], [0.0]
    ways = [Channel("the webhook", lambda _: "it answered 500"), Channel("a list", lambda m: sent.append(m) or "")]
    pager = Pager(ways, 0, said.append, lambda: now[0])
    for _ in range(3):
        now[0] += 1
        pager.tell(an_alarm())
    pager.close()
    assert said == ["An alarm was not delivered by the webhook: it answered 500. The run goes on."]
    assert len(sent) == 3


def test_nobody_to_complain_to_and_a_way_that_raises_lose_no_alarm():
    sent, now = [], [0.0]

    def gone(_: str) -> None:
        raise OSError(errno.EPIPE, "Broken pipe")

    def raises(_: bytes) -> str:
        raise ValueError(SECRET)

    ways = [Channel("the webhook", lambda _: "it answered 500"), Channel("a broken one", raises),
            Channel("a list", lambda m: sent.append(m) or "")]  # fmt: skip
    pager = Pager(ways, 0, gone, lambda: now[0])
    for _ in range(3):
        now[0] += 1
        assert pager.tell(an_alarm())
    pager.close()
    assert len(sent) == 3
    said: list[str] = []
    pager = Pager(ways, 0, said.append)
    pager.tell(an_alarm())
    pager.close()
    assert "a broken one: it failed (ValueError)" in said[1] and SECRET not in "".join(said)


def test_an_alarm_too_many_is_not_claimed_to_be_sent(monkeypatch):
    monkeypatch.setattr("trinity.train.alarm._WAITING", 2)
    go, begun, now = threading.Event(), threading.Event(), [0.0]
    pager = Pager([Channel("a slow one", lambda _: begun.set() or str(go.wait(20) and ""))], 0, pytest.fail,
                  lambda: now[0])  # fmt: skip
    told = []
    for _ in range(4):
        now[0] += 1
        told.append(pager.tell(an_alarm()))
        assert begun.wait(20)
    go.set()
    pager.close()
    assert told == [True, True, True, False]


def test_closing_waits_for_what_is_under_way_but_not_for_ever():
    go = threading.Event()
    pager = Pager([Channel("a deaf one", lambda _: str(go.wait(20) and ""))], 15, pytest.fail)
    pager.tell(an_alarm())
    started = time.monotonic()
    pager.close(0.2)
    assert time.monotonic() - started < 10
    go.set()


SETTINGS = ["train.tokens=6K", "train.evaluate_bytes=0", "optim.warmup_tokens=1K", "optim.decay_tokens=1K",
            "train.save_every_tokens=2048", "train.sample_tokens=0"]  # fmt: skip


def run(debug_data, folder, *settings) -> list[str]:
    said: list[str] = []
    loop.train(override(recipe("debug"), [*SETTINGS, *settings]), debug_data, folder, said.append, lambda _: None)
    return said


@pytest.fixture
def poisoned(monkeypatch):
    """The loss of step 4 is NaN."""
    original, calls = loop.accumulate, []

    def accumulate(*arguments):
        calls.append(arguments)
        measured = original(*arguments)
        return measured._replace(loss=math.nan) if len(calls) == 4 else measured

    monkeypatch.setattr(loop, "accumulate", accumulate)


@pytest.mark.parametrize("action", ["skip", "rollback", "stop"])
def test_what_the_guard_does_to_a_run_reaches_the_webhook(debug_data, tmp_path, monkeypatch, poisoned, action):
    with Server([200]) as server:
        monkeypatch.setenv(WEBHOOK, server.address)
        try:
            said = run(debug_data, tmp_path / "run", f"train.nonfinite_action={action}")
        except TrainingHalted as error:
            said = [str(error)]
        (got,) = server.got
    kind = "halt" if action == "stop" else "non-finite"
    assert (got["kind"], got["run"]) == (kind, "run") and "loss nan" in got["sentence"]
    assert ("are not read again" in got["sentence"]) == (action == "rollback")
    assert got["action"] == ("the run has ended" if action == "stop" else action)
    kept = "".join(path.read_text(errors="ignore") for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert SECRET not in kept and SECRET not in "".join(said)


def test_a_pager_that_is_down_does_not_touch_the_run(debug_data, tmp_path, monkeypatch, poisoned):
    with Server([200]) as server:
        pass  # its port is closed from here on
    monkeypatch.setenv(WEBHOOK, server.address)
    monkeypatch.setattr("trinity.train.alarm.Webhook", partial(Webhook, pause=lambda _: None))
    said = run(debug_data, tmp_path / "run", "train.alarm_command=sh -c 'exit 9'")
    problems = [sentence for sentence in said if "not delivered" in sentence]
    assert len(problems) == 2 and any("exit code 9" in sentence for sentence in problems)
    assert (tmp_path / "run" / "checkpoints" / "step-00000006").is_dir()


@pytest.mark.parametrize(("error", "kind"), [(StorageError("The disk is full."), "storage"), (OSError("odd"), "halt")])
def test_a_refusing_disk_and_a_crash_are_told(tmp_path, monkeypatch, error, kind):
    with Server([200]) as server:
        monkeypatch.setenv(WEBHOOK, server.address)
        with (
            pytest.raises(type(error)),
            Watch(tmp_path, recipe("debug").train, World.alone(), pytest.fail, "start") as watch,
        ):
            watch.begins(recipe("debug").course[0], 3, 3072)
            raise error
    assert [(got["kind"], got["step"], got["sentence"]) for got in server.got] == [(kind, 3, str(error))]


def trinity_train(folder, *arguments: str, **environment: str) -> Ended:
    return trinity("train", "debug", "--out", str(folder), *arguments, **environment)


def test_the_alarm_can_be_tested_before_going_home(tmp_path):
    with Server([200]) as server:
        good = trinity_train(tmp_path / "run", "--test-alarm", **{WEBHOOK: server.address})
        assert (good.returncode, good.stdout) == (0, "the webhook: delivered\n"), good.stderr
        assert server.got[0]["kind"] == "test"
        half = trinity_train(
            tmp_path / "run",
            "--test-alarm",
            "--json",
            "--set",
            "train.alarm_command=false",
            **{WEBHOOK: server.address},
        )
    assert half.returncode == 1 and "not delivered by train.alarm_command" in half.stderr
    assert json.loads(half.stdout)["the webhook"] == "delivered"
    none = trinity_train(tmp_path / "run", "--test-alarm")
    assert none.returncode == 2 and WEBHOOK in none.stderr
    assert not (tmp_path / "run").exists(), "nothing is trained, nothing is written"
