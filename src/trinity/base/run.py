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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trinity.base.durable import refusing_disk, write_durably

METRICS = "metrics.jsonl"
CONFIG = "config.json"
HEARTBEAT = "heartbeat.json"


class MetricsLog:
    """Append-only metrics.jsonl. Reopened at a step, it drops the lines a lost stretch of the run had written.

    A roll-back goes back to a step too, but what was found on the way it leaves stays: those lines hold, as "left_at",
    how many rows of the data had been read by then. Steps are counted again after a roll-back, rows never are, so rows
    tell which of these lines a resumed run has behind it, and which it will write again.
    """

    def __init__(self, run: Path, resume_step: int, rows_read: int = 0) -> None:
        self.path = run / METRICS
        # A run that begins anew (resume_step 0) keeps nothing: it will write its first evaluation again.
        self._rewrite(
            line
            for line in (read_lines(self.path) if self.path.exists() else ())
            if resume_step and (line.get("step", 0) <= resume_step or line.get("left_at", math.inf) <= rows_read)
        )

    def leave(self, step: int, rows_read: int) -> None:
        """The steps after `step` are about to be left behind: mark what is to stay of them. No line goes yet."""
        self.close()
        self._rewrite(
            {**line, "left_at": line.get("left_at", rows_read)}
            if line["step"] > step and line["kind"] == "guard"
            else line
            for line in read_lines(self.path)
        )

    def roll_back(self, step: int) -> None:
        """The steps after `step` are run again: drop what was logged of them and is not marked to stay."""
        self.close()
        self._rewrite(line for line in read_lines(self.path) if line["step"] <= step or "left_at" in line)

    def _rewrite(self, lines: Iterable[dict[str, Any]]) -> None:
        write_durably(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line. Floats are written in full (repr), so equal runs have equal logs."""
        with refusing_disk(self.path):
            self._file.write(json.dumps({"kind": kind, "step": step, **values}, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        with refusing_disk(self.path):
            os.fsync(self._file.fileno())
            self._file.close()


class Unwritten:
    """What the processes of a run that do not keep its log write to: nothing."""

    def write(self, kind: str, step: int, **values: Any) -> None:
        pass

    def leave(self, step: int, rows_read: int) -> None:
        pass

    def roll_back(self, step: int) -> None:
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
