"""One measured number, and the words it is reported with."""

from dataclasses import dataclass
from typing import Any

from trinity.audit.intervals import Interval


@dataclass(frozen=True, kw_only=True)
class Measure:
    probe: str  # which probe found it
    name: str  # what was measured
    of: dict[str, str | int]  # the part it was measured on, such as {"kind": "code"} or {"copies": "4-7"}
    interval: Interval
    unit: str
    counted: str  # what `n` counts

    def as_json(self) -> dict[str, Any]:
        value, low, high, n = self.interval
        return {
            "probe": self.probe, "name": self.name, "of": self.of, "value": value, "low": low, "high": high, "n": n,
            "counted": self.counted, "unit": self.unit,
        }  # fmt: skip
