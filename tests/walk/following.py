"""Follows docs/walk.md: the commands and the Python of each stop, as a reader would type them, in one folder."""

import contextlib
import io
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rewriter import rewriter

from trinity.cli.main import main

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "walk.md"
HEADING = re.compile(r"^## (\d+)\. (.+)$", re.MULTILINE)
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
REWRITER, SERVER = "127.0.0.1:8001", "127.0.0.1:8000"  # addresses on the page; the walk takes free ports instead


class Stop(NamedTuple):
    title: str
    blocks: list[tuple[str, str]]  # ("console" or "python", its text)


def stops_of(page: str) -> dict[int, Stop]:
    _, *parts = HEADING.split(page)
    numbered = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    return {int(number): Stop(title, BLOCK.findall(text)) for number, title, text in numbered}


class Walk:
    """One walk: `to(n)` goes on to stop n, once; `names` are the variables of the page's Python session."""

    def __init__(self) -> None:
        self.stops = stops_of(PAGE.read_text())
        self.reached = 0
        self.underway = 0  # the stop being taken, or the one that failed
        self.names: dict[str, Any] = {}
        self.said: dict[int, str] = {}  # what the commands of a stop printed
        self.addresses: dict[str, str] = {}  # on the page -> in this walk
        self._open = ExitStack()

    def __enter__(self) -> "Walk":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def to(self, number: int) -> dict[str, Any]:
        """Everything up to stop `number` has happened; returns the session's variables."""
        while self.reached < number:
            if self.underway:
                pytest.fail(f"the walk ended at stop {self.underway}", pytrace=False)
            self.underway = self.reached + 1
            self.said[self.underway] = ""
            for kind, text in self.stops[self.underway].blocks:
                self._type(text) if kind == "console" else self._execute(text)
            self.reached, self.underway = self.underway, 0
        return self.names

    def tell(self, number: int, sentence: str) -> None:
        print(f"\n  {number:>2}  {self.stops[number].title}: {sentence}")

    def _execute(self, code: str) -> None:
        exec(compile(self._here(code), f"docs/walk.md, stop {self.underway}", "exec"), self.names)

    def _type(self, text: str) -> None:
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(self._here(line.removeprefix("$ ")))
            if words[:2] == ["trinity", "serve"]:
                self.addresses[SERVER] = self._open.enter_context(serving([*words[1:-1], "0"]))
            elif words[0] == "trinity":
                self.said[self.underway] += command(*words[1:])
            elif words[:2] == ["python", "tests/walk/rewriter.py"]:
                self.addresses[REWRITER] = f"127.0.0.1:{self._open.enter_context(rewriter())}"
            elif words[0] == "python":
                run_script(*words[1:])
            else:
                subprocess.run(line.removeprefix("$ "), shell=True, check=True, stdout=subprocess.DEVNULL)

    def _here(self, text: str) -> str:
        for there, here in self.addresses.items():
            text = text.replace(there, here)
        return text


def command(*words: str | Path, code: int = 0) -> str:
    """Carry out a command in this process and return all it printed; its exit code must be `code`."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        found = main([str(word) for word in words])
    assert found == code, f"trinity {' '.join(map(str, words))}\n{out.getvalue()}"
    return out.getvalue()


def run_script(script: str, *words: str) -> None:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", [script, *words])
        runpy.run_path(str(ROOT / script), run_name="__main__")


@contextlib.contextmanager
def serving(words: list[str]) -> Iterator[str]:
    """`trinity serve ...` as a process of its own: its address while the block lasts, then an orderly end."""
    line = [sys.executable, "-m", "trinity.cli.main", *words]
    environment = {name: value for name, value in os.environ.items() if name != "TRINITY_API_KEY"}
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        found = re.search(r"http://(127\.0\.0\.1:\d+)/v1", first)
        assert found, first + process.communicate(timeout=10)[1]
        yield found[1]
        process.send_signal(signal.SIGTERM)
        complaints = process.communicate(timeout=20)[1]
        assert (process.returncode, complaints) == (0, "")
    finally:
        process.kill()
        process.communicate()
