"""The hang alarm and the heartbeat: with a clock in the hand, and on a real process whose step is blocked."""

import errno
import json
import math
import os
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from started import Ended, Started
from trinity.base.errors import StorageError, TrainingHalted
from trinity.base.run import read_lines
from trinity.config.load import override
from trinity.config.phases import PhaseConfig
from trinity.parallel.mesh import World
from trinity.recipes.table import recipe
from trinity.train import heartbeat, loop
from trinity.train.hang import PATIENCE, STEPPING, HangAlarm
from trinity.train.heartbeat import Heartbeat
from trinity.train.watch import EXIT_OF_A_HANG, Watch


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def alarm(folder: Path, minutes: float, clock: Clock) -> tuple[HangAlarm, list]:
    told = []
    return HangAlarm(folder, 3, minutes, lambda *what: told.append(what), clock), told


def test_a_hang_is_told_once_with_the_stacks_of_all_threads(tmp_path):
    clock = Clock()
    hang, told = alarm(tmp_path, 10, clock)
    hang.beat(STEPPING)
    clock.now += 599
    assert not hang.check()
    clock.now += 1
    assert hang.check() and not hang.check()
    clock.now += 6000
    assert not hang.check(), "once a hang"
    ((seconds, doing, trace),) = told
    assert (seconds, doing) == (600, STEPPING)
    assert Path(trace).parent == tmp_path / "hangs" and Path(trace).name.startswith("rank-3-")
    assert "test_a_hang_is_told_once" in Path(trace).read_text()
    hang.beat(STEPPING)
    clock.now += 600
    assert hang.check(), "a second hang is told again"


def test_work_that_takes_long_has_longer_and_zero_never_alarms(tmp_path):
    clock = Clock()
    hang, told = alarm(tmp_path, 10, clock)
    hang.beat("evaluating")
    clock.now += 600 * PATIENCE - 1
    assert not hang.check()
    clock.now += 1
    assert hang.check() and told[0][1] == "evaluating"
    never, told = alarm(tmp_path, 0, clock)
    clock.now += 1e9
    assert not never.check() and not told


def test_a_disk_that_refuses_the_stacks_does_not_silence_the_alarm(tmp_path, capfd):
    clock = Clock()
    (tmp_path / "hangs").write_text("a file in the way")
    hang, told = alarm(tmp_path, 10, clock)
    clock.now += 600 * PATIENCE
    assert hang.check() and "refused" in told[0][2]


def run_blocked(debug_data: Path, folder: Path, seconds: float, settings: tuple[str, ...]) -> None:
    """A run whose third step takes `seconds` more."""
    original, calls = loop.accumulate, []

    def blocked(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            time.sleep(seconds)
        return original(*arguments)

    loop.accumulate = blocked
    brief = ["train.tokens=6K", "train.evaluate_bytes=0", "optim.warmup_tokens=1K", "optim.decay_tokens=1K",
             "train.hang_minutes=0.02"]  # fmt: skip
    loop.train(override(recipe("debug"), [*brief, *settings]), debug_data, folder, print, lambda _: None)


def blocked_run(debug_data: Path, folder: Path, seconds: float, *settings: str) -> Ended:
    with Started(run_blocked, debug_data, folder, seconds, settings) as run:
        return run.ended()


def test_a_blocked_step_is_told_and_the_run_goes_on(debug_data, tmp_path):
    pager, got = tmp_path / "pager.sh", tmp_path / "alarms.jsonl"
    pager.write_text(f"cat >> {got}")
    ended = blocked_run(debug_data, tmp_path / "run", 2.5, f"train.alarm_command=sh {pager}")
    assert ended.returncode == 0, ended.stderr
    (line,) = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "guard"]
    assert (line["step"], line["trouble"], line["action"]) == (3, "hang", "over")
    (trace,) = (tmp_path / "run" / "hangs").glob("rank-0-*.txt")
    assert "in blocked" in trace.read_text()
    (sent,) = [json.loads(text) for text in got.read_text().splitlines()]
    assert sent["kind"] == "hang" and "after step 2" in sent["sentence"] and sent["step"] == 2
    beat = json.loads((tmp_path / "run" / "heartbeat.json").read_text())
    assert beat["state"] == "finished" and beat["step"] == 6


def test_a_process_told_to_exit_ends_itself_with_a_sentence(debug_data, tmp_path):
    ended = blocked_run(debug_data, tmp_path / "run", 100, "train.hang_action=exit")
    assert ended.returncode == EXIT_OF_A_HANG
    assert "no step has been finished for" in ended.stderr and "ends itself" in ended.stderr
    beat = json.loads((tmp_path / "run" / "heartbeat.json").read_text())
    assert beat["state"] == "hung" and "no step" in beat["reason"]


def test_the_heartbeat_is_replaced_at_most_once_a_second_but_tells_a_change_at_once(tmp_path):
    clock, said = Clock(), []
    beat = Heartbeat(tmp_path, 8, said.append, clock)

    def read() -> dict:
        return json.loads((tmp_path / "heartbeat.json").read_text())

    beat.beat(step=1, tokens=10, doing=STEPPING, loss=3.5)
    clock.now += 0.5
    beat.beat(step=2, tokens=20, doing=STEPPING, loss=3.4)
    assert read()["step"] == 1
    beat.beat(step=2, tokens=20, doing="saving")
    found = read()
    assert (found["step"], found["doing"], found["state"], found["world_size"]) == (2, "saving", "running", 8)
    assert found["seconds"] == 1000.5 and datetime.fromisoformat(found["time"]).timestamp() == 1000
    assert found["pid"] == os.getpid() and found["host"] and found["loss"] == 3.4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heartbeat.json"] and not said


def test_a_disk_that_refuses_a_heartbeat_is_said_once(tmp_path, monkeypatch):
    clock, said = Clock(), []
    beat = Heartbeat(tmp_path, 1, said.append, clock)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(heartbeat.os, "replace", full)
    for step in range(5):
        clock.now += 2
        beat.beat(step=step)
    assert len(said) == 1 and "No space left" in said[0]
    assert not list(tmp_path.iterdir())


def test_on_a_full_disk_the_heartbeat_is_written_over_and_tells_how_the_run_ended(tmp_path, monkeypatch):
    clock, said = Clock(), []
    beat = Heartbeat(tmp_path, 1, said.append, clock)
    beat.beat(step=123456, doing=STEPPING, loss=3.25)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    for reason in ("The disk is full: writing the third checkpoint in a row failed.", "x"):
        beat.beat(doing="", state="failed", reason=reason)
        found = json.loads((tmp_path / "heartbeat.json").read_text())
        assert (found["state"], found["reason"], found["step"]) == ("failed", reason, 123456)
        clock.now += 2
    assert not said and [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]


def config(*settings):
    return override(recipe("debug"), ["train.tokens=6K", "train.evaluate_bytes=0", "optim.warmup_tokens=1K",
                                      "optim.decay_tokens=1K", *settings])  # fmt: skip


@pytest.mark.parametrize(
    ("error", "state"),
    [(TrainingHalted("loss nan."), "halted"), (StorageError("The disk is full."), "failed"),
     (KeyboardInterrupt(), "interrupted"), (RuntimeError("odd"), "failed"), (None, "finished")],
)  # fmt: skip
def test_the_last_heartbeat_says_how_the_run_ended(tmp_path, error, state):
    try:
        with Watch(tmp_path, config().train, World.alone(), pytest.fail, "start") as watch:
            watch.begins(config().course[0], 4, 4096)
            watch.stepped(config().course[0], 5, 5120, 3.0, 0.1, 0.5)
            if error:
                raise error
    except BaseException as met:
        assert met is error
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert beat["state"] == state and beat["step"] == 5 and beat["tokens_per_second"] == 2048
    assert str(error or "") in beat["reason"] or state == "interrupted"


def test_a_real_run_leaves_a_finished_heartbeat_and_a_refused_one_none(debug_data, tmp_path):
    loop.train(config(), debug_data, tmp_path / "run", lambda _: None, lambda _: None)
    beat = json.loads((tmp_path / "run" / "heartbeat.json").read_text())
    assert (beat["state"], beat["step"], beat["tokens"], beat["run"]) == ("finished", 6, 6144, "run")
    with pytest.raises(Exception, match=r"There is no|not"):
        loop.train(config(), tmp_path / "nothing", tmp_path / "refused", lambda _: None, lambda _: None)
    assert not (tmp_path / "refused" / "heartbeat.json").exists()


def test_the_heartbeat_knows_the_phase_and_no_negative_speed(debug_data, tmp_path, monkeypatch):
    """The loss of step 4 is NaN: back to step 3, where the phase begins and a checkpoint is."""
    beats, original, accumulate, calls = [], Heartbeat.beat, loop.accumulate, iter(range(1, 100))

    def beat(self, **values):
        beats.append(values)
        original(self, **values)

    def poisoned(*arguments):
        measured = accumulate(*arguments)
        return measured._replace(loss=math.nan) if next(calls) == 4 else measured

    monkeypatch.setattr(Heartbeat, "beat", beat)
    monkeypatch.setattr(loop, "accumulate", poisoned)
    wide = PhaseConfig(name="wide", from_tokens=3072, batch_tokens=2048)
    settings = config("train.tokens=9K", "train.save_every_tokens=2048", "train.nonfinite_action=rollback")
    loop.train(replace(settings, phases=(wide,)), debug_data, tmp_path / "run", lambda _: None, lambda _: None)
    steps = [(values["phase"], values["step"]) for values in beats if "tokens_per_second" in values]
    assert steps == [("pretraining", step) for step in (1, 2, 3)] + [("wide", step) for step in (4, 5, 6)]
    assert all(values["tokens_per_second"] > 0 for values in beats if "tokens_per_second" in values)
    assert any((values["phase"], values["step"], values.get("doing")) == ("wide", 3, "starting") for values in beats), (
        "the first step of a phase has the patience of a first step"
    )
