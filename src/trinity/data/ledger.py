"""The ledger: one line for everything that was left out, so that no text disappears without a reason.

{"rule": "not UTF-8", "source": "notes/old.txt:3", "document": "", "number": null, "detail": "byte 0xe9"}
"""

import json
from collections import Counter
from pathlib import Path


class Ledger:
    """Appends to ledger.jsonl and counts by rule."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self.counts: Counter[str] = Counter()
        self.first = ""  # the first entry in words, for a message when nothing else is left

    def drop(self, rule: str, source: str, document: str = "", number: float | None = None, detail: str = "") -> None:
        """Record that `source` (or the document with this id) was left out by `rule`, with the number that decided."""
        self.first = self.first or f"{source}: {rule}{f' ({detail})' if detail else ''}"
        self.counts[rule] += 1
        entry = {"rule": rule, "source": source, "document": document, "number": number, "detail": detail}
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()
