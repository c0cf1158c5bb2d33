"""A run folder becomes plain tables. Nothing is locked or written, so a run can be read while it goes on."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trinity.base.errors import DataError
from trinity.base.lineage import read_lineage
from trinity.base.run import CONFIG, HEARTBEAT, METRICS, read_lines

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run has left behind so far. Each list is ordered by step."""

    name: str
    folder: Path
    config: dict[str, Any]
    lineage: dict[str, Any]
    steps: list[Row] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    guards: list[Row] = field(default_factory=list)
    resumes: list[Row] = field(default_factory=list)
    heartbeat: Row = field(default_factory=dict)  # empty where the run has left none

    def column(self, name: str, kind: str = "steps") -> tuple[list[float], list[float]]:
        """(tokens seen, value) of every row that holds `name` as a finite number."""
        rows = [row for row in getattr(self, kind) if _is_number(row.get(name)) and _is_number(row.get("tokens"))]
        return [row["tokens"] for row in rows], [row[name] for row in rows]

    def layers(self, name: str) -> tuple[list[float], list[list[Any]]]:
        """(tokens seen, per-layer list) of every step row that holds `name`."""
        rows = [row for row in self.steps if row.get(name) and _is_number(row.get("tokens"))]
        return [row["tokens"] for row in rows], [row[name] for row in rows]

    def last(self, name: str, kind: str = "steps") -> float | None:
        """The newest finite value of `name`, or None where the run has none yet."""
        values = self.column(name, kind)[1]
        return values[-1] if values else None


_KINDS = {
    "step": "steps",
    "evaluation": "evaluations",
    "sample": "samples",
    "guard": "guards",
    "resume": "resumes",
}


def read_run(folder: Path) -> RunRecord:
    """Read a run folder. A cut-off last line is left out; a folder that is not a run is a DataError."""
    if not folder.is_dir():
        raise DataError(f"There is no run folder at {folder}.", "Name a folder that `trinity train --out` has written.")
    if not (folder / METRICS).exists():
        raise DataError(
            f"{folder} has no {METRICS}, so it is not a run.", "Name a folder that a training run writes to."
        )
    tables: dict[str, list[Row]] = {table: [] for table in _KINDS.values()}
    for row in read_lines(folder / METRICS):
        if isinstance(row, dict) and row.get("kind") in _KINDS:
            tables[_KINDS[row["kind"]]].append(row)
    for rows in tables.values():
        rows.sort(key=lambda row: row.get("step", 0))
    return RunRecord(
        name=folder.resolve().name,
        folder=folder,
        config=_config(folder / CONFIG),
        lineage=read_lineage(folder),
        heartbeat=_read_object(folder / HEARTBEAT),
        **tables,
    )


def _config(path: Path) -> dict[str, Any]:
    """The settings of a run, without the fingerprint beside them; empty where there is no readable config.json."""
    found = _read_object(path)
    return found.get("config", found)


def _read_object(path: Path) -> Row:
    """What is written in a JSON file; empty where there is no readable one."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
