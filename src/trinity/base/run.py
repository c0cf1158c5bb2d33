"""A run folder: one place and one write path for everything a run leaves behind, readable while the run goes on.

config.json      the resolved configuration and its fingerprint
metrics.jsonl    one JSON object a line; every line carries "kind" (step, evaluation, sample, guard, ...) and "step"
heartbeat.json   what the run is doing right now, or how it ended
lineage.json     what the run was made from
checkpoints/     see ckpt/folder.py
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trinity.base.durable import refusing_disk, write_durably

METRICS = "metrics.jsonl"
CONFIG = "config.json"
HEARTBEAT = "heartbeat.json"


class MetricsLog:
    """Append-only metrics.jsonl. Reopened at a step, it drops the lines a lost stretch of the run had written."""

    def __init__(self, run: Path, resume_step: int) -> None:
        self.path = run / METRICS
        if self.path.exists():
            # A run that begins anew (resume_step 0) keeps nothing: it will write its first evaluation again.
            kept = [line for line in read_lines(self.path) if 0 < resume_step >= line.get("step", 0)]
            write_durably(self.path, "".join(json.dumps(line) + "\n" for line in kept))
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
