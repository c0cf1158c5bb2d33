"""Progress: sparse lines in a log, a bar in a terminal once something takes its time, and who shows it."""

import os
import pty
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trinity.base import durable, progress
from trinity.base.durable import altered_files, seal


def test_progress_away_from_a_terminal_is_sparse_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress.progress("read", 4) as advance:
        advance(1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress.progress("read", 4) as advance:
        for _ in range(4):
            advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["read: 25%", "read: 50%", "read: 75%"]


class Terminal:
    """What stands where standard error is read."""

    def __init__(self) -> None:
        self._reader, writer = pty.openpty()
        self.stream, self.written = os.fdopen(writer, "w"), ""
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        try:
            while block := os.read(self._reader, 4096):
                self.written += block.decode(errors="replace")
        except OSError:  # nobody writes any more
            os.close(self._reader)

    def close(self) -> str:
        self.stream.close()
        self._listener.join()
        return self.written


@contextmanager
def terminal() -> Iterator[Terminal]:
    """Not a fixture: pytest takes standard error back before the test itself begins."""
    terminal = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", terminal.stream)
        patch.setenv("TERM", "xterm")
        try:
            yield terminal
        finally:
            terminal.close()


def test_what_is_done_at_once_shows_no_bar():
    with terminal() as shown:
        with progress.progress("read", 4) as advance:
            advance(4)
        assert shown.close() == ""


def test_a_bar_comes_though_nothing_advances_and_goes_with_an_error(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BEFORE_BAR", 0.0)
    with terminal() as shown:
        with pytest.raises(KeyError), progress.progress("read", 4):
            end = time.monotonic() + 20
            while "0%" not in shown.written and time.monotonic() < end:
                time.sleep(0.01)
            raise KeyError
        assert "read" in shown.written and "0%" in shown.written
        assert shown.close().endswith("\x1b[2K")  # the line is empty again


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Everything takes long; the lines that were told since the last call."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(durable, "SHOWN_FROM", 1)
    return lambda: capsys.readouterr().err.splitlines()


def test_hashing_a_folder_is_shown_by_the_first_process(tmp_path: Path, told):
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in "abcd":
        (folder / name).write_bytes(b"x" * 2**18)
    seal(folder)
    assert [line.split(",")[0] for line in told()] == ["sealing weights: 25%", "sealing weights: 50%",
                                                       "sealing weights: 75%"]  # fmt: skip
    assert altered_files(folder) == []
    assert [line.split(",")[0] for line in told()][1] == "checking weights: 50%"
    assert altered_files(folder, share=(1, 2)) == [] and told() == []
