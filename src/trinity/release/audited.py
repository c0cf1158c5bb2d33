"""What an audit folder says, read as plain tables: the measures with their intervals and the command that made them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trinity.base.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class AuditRecord:
    """`measures` as audit/measure.py writes them: probe, name, of, value, low, high, n, counted, unit."""

    folder: Path
    measures: list[dict[str, Any]]
    about: dict[str, Any]  # everything else the results file says: model, command, seed, confidence, ...


def read_audit(folder: Path) -> AuditRecord:
    """Read every results file (a JSON object with a list of "measures") of an audit folder."""
    if not folder.is_dir():
        raise UsageError(f"There is no audit folder at {folder}.", "Make one: trinity audit MODEL --out DIR.")
    measures: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise UsageError(f"{path} is not JSON: {error}.", "Run the audit again.") from error
        if isinstance(found, dict) and isinstance(found.get("measures"), list):
            measures += found["measures"]
            about |= {name: value for name, value in found.items() if name != "measures"}
    return AuditRecord(folder=folder, measures=measures, about=about)
