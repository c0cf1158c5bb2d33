"""What an audit folder says, read as plain tables: the results with their intervals and the command that made them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trinity.base.durable import verify_seal
from trinity.base.errors import UsageError

RESULTS = "results.json"


@dataclass(frozen=True, kw_only=True)
class AuditRecord:
    """`results` as the audit writes them: probe, name, of, value, low, high, n, counted, unit."""

    folder: Path
    model: str
    results: list[dict[str, Any]]
    about: dict[str, Any]  # everything else the audit says: suite, data, context, config, command


def read_audit(folder: Path) -> AuditRecord:
    """Read an audit folder, every byte of it as it was sealed. UsageError where the folder is none."""
    path = folder / RESULTS
    if not path.is_file():
        raise UsageError(f"{folder} is not an audit: {RESULTS} is missing.", "Make one: trinity audit MODEL --out DIR.")
    verify_seal(folder)
    found = json.loads(path.read_text())
    about = {name: value for name, value in found.items() if name not in ("results", "model")}
    return AuditRecord(folder=folder, model=found["model"], results=found["results"], about=about)
