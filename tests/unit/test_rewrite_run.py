"""Rewriting against a real endpoint on loopback: retries, failures, kill and resume, lineage, secrets."""

import argparse
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from trinity.base.errors import RequestError, TrinityError, UsageError
from trinity.cli.rewrite import configure
from trinity.data.documents import Document, read_documents, writing_documents
from trinity.data.rewrite.cache import Answer, AnswerCache, Sampling
from trinity.data.rewrite.endpoint import LONGEST_NAMED_PAUSE, Endpoint, EndpointError
from trinity.data.rewrite.prompts import DISTILL
from trinity.data.rewrite.run import Rewriting, rewrite_documents, rewrite_folder
from trinity.data.rewrite.segment import estimate_tokens

SECRET = "sk-very-secret-key"
MESSAGES = [{"role": "user", "content": "<source>\nhello\n</source>"}]
SAMPLING = Sampling(0.5, 0.9, 100)


class Rewriter:
    """A loopback endpoint that condenses by keeping every other word; `script` holds answers to give before that."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.keys: set[str] = set()
        self.script: list[tuple[int, str, dict[str, str]]] = []
        self.hang_after: int | None = None
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(404, "{}")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                source = re.search(r"<source>\n(.*)\n</source>", body["messages"][-1]["content"], re.DOTALL)
                with outer.lock:
                    outer.keys.add(self.headers.get("Authorization", ""))
                    outer.texts.append(source[1])
                    scripted = outer.script.pop(0) if outer.script else None
                    hang = outer.hang_after is not None and len(outer.texts) > outer.hang_after
                if hang:
                    time.sleep(60)
                if scripted:
                    self.answer(scripted[0], scripted[1], scripted[2])
                else:
                    self.answer(200, completion("Condensed text: " + " ".join(source[1].split()[::2])))

            def answer(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a killed client leaves broken pipes

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def completion(text: str, finish_reason: str = "stop") -> str:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 5}})


@pytest.fixture
def rewriter():
    server = Rewriter()
    yield server
    server.stop()


@pytest.fixture
def cache(tmp_path: Path):
    with closing(AnswerCache(tmp_path / "answers.sqlite")) as cache:
        yield cache


def text_number(number: int) -> str:
    return f"document {'abcdefghij'[number]} holds words " + " ".join(
        f"{'abcdefghij'[number]}{c}" for c in "klmnopqrst"
    )


def some_documents(count: int = 6) -> list[Document]:
    return [Document(text_number(n), f"f{n}.txt", "prose", "CC0", ("root",) if n == 0 else ()) for n in range(count)]


def rewriting(**more) -> Rewriting:
    return Rewriting(style=DISTILL, model="toy", count=estimate_tokens, **more)


def endpoint_of(rewriter: Rewriter, pauses: list[float] | None = None, **more) -> Endpoint:
    sleep = (lambda seconds: None) if pauses is None else pauses.append
    return Endpoint(rewriter.url, "toy", sleep=sleep, **{"attempts": 4, **more})


def test_busy_failing_and_garbled_answers_are_tried_again(rewriter):
    rewriter.script = [(429, "slow down", {"Retry-After": "7"}), (500, "oops", {}), (200, "{not json", {})]
    pauses: list[float] = []
    with closing(endpoint_of(rewriter, pauses, first_pause=1.0)) as endpoint:
        assert endpoint(MESSAGES, SAMPLING).text == "Condensed text: hello"
        assert endpoint.attempts_made == 4
    assert pauses[0] == 7
    assert 1 <= pauses[1] <= 2 <= pauses[2] <= 4


def test_a_named_date_is_honoured_and_an_absurd_pause_is_not(rewriter):
    rewriter.script = [(503, "", {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), (429, "", {"Retry-After": "1e9"})]
    pauses: list[float] = []
    with closing(endpoint_of(rewriter, pauses)) as endpoint:
        endpoint(MESSAGES, SAMPLING)
    assert pauses == [0.0, LONGEST_NAMED_PAUSE]


@pytest.mark.parametrize("body", ['{"choices": []}', "[]", '{"choices": [{"message": {"content": null}}]}', "null"])
def test_an_answer_without_text_is_no_answer(rewriter, body):
    rewriter.script = [(200, body, {})] * 2
    with closing(endpoint_of(rewriter, attempts=2)) as endpoint, pytest.raises(RequestError, match="2 attempts"):
        endpoint(MESSAGES, SAMPLING)


def test_a_bad_request_is_not_repeated_and_a_refused_key_ends_the_run_without_showing_it(rewriter):
    rewriter.script = [(400, "context too long", {}), (401, f"bad key {SECRET}", {})]
    with closing(endpoint_of(rewriter, key=SECRET)) as endpoint:
        with pytest.raises(RequestError, match="context too long"):
            endpoint(MESSAGES, SAMPLING)
        with pytest.raises(EndpointError) as refused:
            endpoint(MESSAGES, SAMPLING)
    assert len(rewriter.texts) == 2 and rewriter.keys == {f"Bearer {SECRET}"}
    assert SECRET not in str(refused.value) and "api-key-env" in str(refused.value)


def test_an_endpoint_that_is_not_there_is_one_clear_line():
    with closing(Endpoint("http://127.0.0.1:9/v1", "toy", sleep=lambda seconds: None)) as endpoint:
        with pytest.raises(EndpointError, match="cannot be reached"):
            endpoint.reach()
        with pytest.raises(EndpointError, match="cannot be reached"):
            endpoint(MESSAGES, SAMPLING)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://host/v1", "http://user:pass@host/v1", "http://", "http://host:port"]
)
def test_addresses_that_are_none_are_refused(url):
    with pytest.raises(UsageError):
        Endpoint(url, "toy")


def test_documents_keep_their_order_and_lineage(rewriter, cache):
    documents = some_documents()
    with closing(endpoint_of(rewriter)) as endpoint:
        outcomes = list(rewrite_documents(documents, endpoint, cache, rewriting(concurrency=4)))
    assert [outcome.parent for outcome in outcomes] == documents
    children = [outcome.child for outcome in outcomes]
    assert all(child is not None for child in children)
    assert children[0].parents == (documents[0].id, "root") and children[0].root == "root"
    assert children[1].parents == (documents[1].id,)
    assert (children[1].source, children[1].kind, children[1].licence) == ("f1.txt", "prose", "CC0")
    assert children[1].text.split() == text_number(1).split()[::2]


def test_the_same_segment_is_asked_once(rewriter, cache):
    with closing(endpoint_of(rewriter)) as endpoint:
        outcomes = list(rewrite_documents([some_documents(1)[0]] * 5, endpoint, cache, rewriting()))
    assert len(rewriter.texts) == 1
    assert sum(outcome.figures["requests"] for outcome in outcomes) == 1
    assert sum(outcome.figures["cache_hits"] for outcome in outcomes) == 4


def test_what_an_answer_depends_on_is_in_its_key(rewriter, cache):
    documents = some_documents(1)
    with closing(endpoint_of(rewriter)) as endpoint:
        for changed in ({}, {"temperature": 0.7}, {"model": "other"}, {"top_p": 1.0}, {"concurrency": 3}):
            list(rewrite_documents(documents, endpoint, cache, Rewriting(**{**vars(rewriting()), **changed})))
    assert len(rewriter.texts) == 4  # concurrency is no part of an answer


def test_failed_rejected_and_short_segments_are_counted_named_and_passed_over(tmp_path, cache):
    long_one = "many words stand here and " * 400  # several segments
    documents = [*some_documents(3), Document("too short", "s.txt", "prose"), Document(long_one, "l.txt", "prose")]

    def generate(messages, sampling):
        if text_number(0) in messages[-1]["content"]:
            raise RequestError("status 400: no")
        if text_number(1) in messages[-1]["content"]:
            return Answer("no prefix at all, and Bertrand with Clementine in 1999", False, 0, 0)
        return Answer("Condensed text: " + "words " * 10, False, 0, 0)

    heard: list[int] = []
    tight = rewriting()
    report = rewrite_folder(documents, tmp_path / "out", generate, cache, tight, {"documents": "x"}, heard.append)
    assert len(heard) == report["documents"] == 5
    assert report["segments_failed"] == 1 and report["segments_too_short"] == 1
    assert report["segments_rejected"] >= 1 and report["rejections_by_gate"]["prefix"] == 1
    ledger = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    rules = {entry["rule"]: entry for entry in ledger}
    assert rules["rewrite: failed"]["source"] == "f0.txt" and "status 400" in rules["rewrite: failed"]["detail"]
    assert rules["rewrite: new_numbers"]["document"] == documents[1].id and rules["rewrite: new_numbers"]["number"] == 1
    assert rules["rewrite: too short"]["source"] == "s.txt"
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert [child.source for child in read_documents(tmp_path / "out")][0] == "f2.txt"


def test_when_nothing_is_answered_there_is_no_output_and_the_reason_is_given(tmp_path, cache):
    def generate(messages, sampling):
        raise RequestError("status 400: no")

    with pytest.raises(RequestError, match="Not one of 6 requests.*status 400"):
        rewrite_folder(some_documents(), tmp_path / "out", generate, cache, rewriting(), {}, lambda done: None)
    assert not (tmp_path / "out").exists()


def test_an_error_that_ends_the_run_keeps_the_answers_before_it(cache):
    asked, healthy = [], False

    def generate(messages, sampling):
        asked.append(messages)
        if len(asked) > 3 and not healthy:
            raise EndpointError("gone")
        return Answer("Condensed text: fine words", False, 0, 0)

    with pytest.raises(EndpointError):
        list(rewrite_documents(some_documents(), generate, cache, rewriting(concurrency=1)))
    before, healthy = len(asked), True
    list(rewrite_documents(some_documents(), generate, cache, rewriting(concurrency=1)))
    assert len(asked) - before == 6 - 3


def test_a_broken_cache_file_is_named(tmp_path):
    (tmp_path / "answers.sqlite").write_text("this is no database, whatever its name says. " * 50)
    with pytest.raises(TrinityError, match="answers.sqlite cannot be used"):
        AnswerCache(tmp_path / "answers.sqlite")


def write_corpus(folder: Path, count: int) -> None:
    with writing_documents(folder, {}, {}) as (writer, _):
        for document in some_documents(count):
            writer.write(document)


def arguments(rewriter: Rewriter, tmp_path: Path, *more: str) -> list[str]:
    return [str(tmp_path / "in"), "--endpoint", rewriter.url, "--model", "toy", "--out", str(tmp_path / "out"), *more]


def run_command(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    configure(parser)
    options = parser.parse_args(argv)
    options.action(options)


def test_a_killed_run_resumes_without_a_repeated_request_and_no_secret_is_left(rewriter, tmp_path, monkeypatch, capsys):
    write_corpus(tmp_path / "in", 10)
    monkeypatch.setenv("A_KEY", SECRET)
    command = arguments(rewriter, tmp_path, "--concurrency", "1", "--api-key-env", "A_KEY", "--json")
    rewriter.hang_after = 5
    code = (
        "import argparse; from trinity.cli.rewrite import configure; p = argparse.ArgumentParser(); configure(p); "
        f"o = p.parse_args({command!r}); o.action(o)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ})
    base = tmp_path / "out.answers" / "answers.sqlite"
    deadline = time.monotonic() + 60
    while stored(base) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert stored(base) == 5 and not (tmp_path / "out").exists()
    before, rewriter.hang_after = len(rewriter.texts), None
    run_command(command)
    report = json.loads(capsys.readouterr().out)
    assert (report["cache_hits"], report["requests"]) == (5, 5)
    assert len(rewriter.texts) - before == 5
    assert len(list(read_documents(tmp_path / "out"))) == 10
    run_command(command)
    assert len(rewriter.texts) - before == 5
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def stored(base: Path) -> int:
    if not base.exists():
        return 0
    try:
        with closing(sqlite3.connect(f"file:{base}?mode=ro", uri=True)) as connection:
            return connection.execute("SELECT count(*) FROM answers").fetchone()[0]
    except sqlite3.OperationalError:
        return 0  # not created yet


def test_the_command_limits_and_reports_in_words(rewriter, tmp_path, capsys):
    write_corpus(tmp_path / "in", 5)
    run_command(arguments(rewriter, tmp_path, "--limit", "2"))
    said = capsys.readouterr().out
    assert "2 of 2 documents rewritten" in said and "2 made, 0 answered from the cache" in said
    assert len(rewriter.texts) == 2


@pytest.mark.parametrize(
    "more", [("--concurrency", "0"), ("--limit", "0"), ("--temperature", "3"), ("--style", "distil")]
)
def test_bad_options_are_refused_before_anything_is_asked(rewriter, tmp_path, more):
    write_corpus(tmp_path / "in", 1)
    with pytest.raises(UsageError):
        run_command(arguments(rewriter, tmp_path, *more))
    assert not rewriter.texts
