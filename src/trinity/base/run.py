"""A run folder: one place and one write path for everything a run leaves behind, readable while the run goes on.

config.json      the resolved configuration and its fingerprint
metrics.jsonl    one JSON object a line; every line carries "kind" (step, evaluation, sample, guard, ...) and "step"
heartbeat.json   what the run is doing right now, or how it ended
lineage.json     what the run was made from
checkpoints/     see ckpt/folder.py
"""

import json
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


class MetricsLog:
    """Append-only metrics.jsonl. Reopened at a step, it drops the lines a lost stretch of the run had written.

    With `refused`, a disk that takes no line ends nothing: the first refusal is told to `refused(step, what, action)`;
    the newest WAITING lines are kept in memory and follow in their order once the disk takes them. Without it, a
    refusal is a StorageError.
    """

    def __init__(self, run: Path, resume_step: int, refused: Callable[[int, str, str], None] | None = None) -> None:
        self.path, self._refused, self._step, self._told = run / METRICS, refused, resume_step, False
        self._waiting: deque[bytes] = deque(maxlen=WAITING)
        self._cut: int | None = None  # length of the file without what waits, of which it may hold a part
        # A run that begins anew (resume_step 0) keeps nothing: it will write its first evaluation again.
        lines = read_lines(self.path) if self.path.exists() else ()
        kept = [line for line in lines if 0 < resume_step >= line.get("step", 0)]
        write_durably(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line. Floats are written in full (repr), so equal runs have equal logs."""
        self._step = step
        self._waiting.append((json.dumps({"kind": kind, "step": step, **values}, ensure_ascii=False) + "\n").encode())
        self._write_out(f"keep the newest {WAITING:,} lines in memory until the disk takes them")

    def take_back(self, step: int) -> None:
        """Drop the lines of later steps, which are run again; the guard's lines stay. This needs no space."""

        def stays(line: bytes) -> bool:
            known = json.loads(line)
            return known["step"] <= step or known["kind"] == "guard"

        lines = self.path.read_bytes()[: self._cut].splitlines(keepends=True)
        before = list(takewhile(stays, lines))
        self._cut = sum(map(len, before))
        self._waiting = deque(filter(stays, (*lines[len(before) :], *self._waiting)), maxlen=WAITING)
        self._write_out(f"keep the newest {WAITING:,} lines in memory until the disk takes them")

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

    def take_back(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSONL file; a last line cut off by a kill is left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                try:
                    yield json.loads(line)
                except ValueError:
                    continue
