"""A run folder: one place and one write path for everything a run leaves behind, readable while the run goes on.

config.json      the resolved configuration and its fingerprint
metrics.jsonl    one JSON object a line; every line carries "kind" (step, evaluation, sample, guard, ...) and "step"
heartbeat.json   what the run is doing right now, or how it ended
lineage.json     what the run was made from
checkpoints/     see ckpt/folder.py
"""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from trinity.base.durable import refusing_disk, write_durably
from trinity.base.errors import StorageError

METRICS = "metrics.jsonl"
CONFIG = "config.json"
HEARTBEAT = "heartbeat.json"
WAITING = 10_000  # lines of a log that its disk refuses, kept in memory; of a step each, some ten megabytes


_KEEP = f"keep the newest {WAITING:,} lines in memory until the disk takes them"


class MetricsLog:
    """Append-only metrics.jsonl. Reopened at a step, it drops the lines a lost stretch of the run had written.

    A roll-back goes back to a step too, but what was found on the way it leaves stays: those lines hold, as "left_at",
    how many rows of the data had been read by then. Steps are counted again after a roll-back, rows never are, so rows
    tell which of these lines a resumed run has behind it, and which it will write again.

    With `refused`, a disk that takes no line ends nothing: the first refusal is told to `refused(step, what, action)`;
    the newest WAITING lines are kept in memory and follow in their order once the disk takes them. Without it, a
    refusal is a StorageError.
    """

    def __init__(
        self,
        run: Path,
        resume_step: int,
        rows_read: int = 0,
        refused: Callable[[int, str, str], None] | None = None,
    ) -> None:
        self.path, self._refused, self._step, self._told = run / METRICS, refused, resume_step, False
        self._waiting: deque[bytes] = deque(maxlen=WAITING)
        self._cut: int | None = None  # length of the file without what waits, of which it may hold a part
        # A run that begins anew (resume_step 0) keeps nothing: it will write its first evaluation again.
        lines = read_lines(self.path) if self.path.exists() else ()
        kept = (
            line
            for line in lines
            if resume_step and (line.get("step", 0) <= resume_step or line.get("left_at", math.inf) <= rows_read)
        )
        write_durably(self.path, b"".join(map(_line, kept)))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line. Floats are written in full (repr), so equal runs have equal logs."""
        self._step = step
        self._waiting.append(_line({"kind": kind, "step": step, **values}))
        self._write_out(_KEEP)

    def leave(self, step: int, rows_read: int) -> None:
        """The steps after `step` are about to be left behind: mark what is to stay of them. No line goes yet.

        A disk that does not take this leaves the marks to `roll_back`.
        """
        self._replace([_marked(line, step, rows_read) for line in self._lines()])

    def roll_back(self, step: int, rows_read: int) -> None:
        """The steps after `step` are run again: drop what was logged of them and is not marked to stay.

        A disk that takes no whole new log has the old one cut in place, and the marked lines wait.
        """
        lines = [
            line
            for line in (_marked(line, step, rows_read) for line in self._lines())
            if (known := json.loads(line))["step"] <= step or "left_at" in known
        ]
        if not self._replace(lines):
            there = self.path.read_bytes()[: self._cut].splitlines(keepends=True)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(there, lines, strict=False)))
            self._cut = sum(map(len, there[:same]))
            self._waiting = deque(lines[same:], maxlen=WAITING)
            self._write_out(_KEEP)

    def _replace(self, lines: list[bytes]) -> bool:
        """Put these lines in place of all; whether the disk took them. What waited is among them."""
        try:
            write_durably(self.path, b"".join(lines))
        except (OSError, StorageError):
            if self._refused is None:
                raise
            return False
        self._waiting.clear()
        self._cut = None
        return True

    def _lines(self) -> list[bytes]:
        """All lines, those that wait for the disk included."""
        return [*self.path.read_bytes()[: self._cut].splitlines(keepends=True), *self._waiting]

    def close(self) -> None:
        """Write what waits, and sync the file. What the disk does not take even now is lost."""
        self._told = False
        self._write_out(f"end without the last lines of the log, {len(self._waiting):,} of them", sync=True)

    def _write_out(self, action: str, sync: bool = False) -> None:
        try:
            with refusing_disk(self.path), self.path.open("ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                self._cut = end if self._cut is None else min(self._cut, end)
                if self._cut < end:
                    file.truncate(self._cut)
                left = memoryview(b"".join(self._waiting))
                while left:
                    left = left[os.write(file.fileno(), left) :]
                if sync:
                    os.fsync(file.fileno())
        except (OSError, StorageError) as refusal:
            if self._cut is not None:
                with suppress(OSError):
                    os.truncate(self.path, self._cut)
            if self._refused is None:
                raise
            if not self._told:
                self._told = True
                reason = refusal.what if isinstance(refusal, StorageError) else f"{self.path}: {refusal.strerror}"
                self._refused(self._step, f"the log takes no line: {reason.rstrip('.')}", action)
        else:
            self._waiting.clear()
            self._cut, self._told = None, False


class Unwritten:
    """What the processes of a run that do not keep its log write to: nothing."""

    def write(self, kind: str, step: int, **values: Any) -> None:
        pass

    def leave(self, step: int, rows_read: int) -> None:
        pass

    def roll_back(self, step: int, rows_read: int) -> None:
        pass

    def close(self) -> None:
        pass


def _line(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, ensure_ascii=False) + "\n").encode()


def _marked(line: bytes, step: int, rows_read: int) -> bytes:
    """A line of the guard behind `step`, with the rows read by then; any other as it is."""
    known = json.loads(line)
    if known["step"] <= step or known["kind"] != "guard" or "left_at" in known:
        return line
    return _line({**known, "left_at": rows_read})


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSONL file; a last line cut off by a kill is left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                try:
                    yield json.loads(line)
                except ValueError:
                    continue
