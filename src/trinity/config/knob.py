"""How a setting is declared: a frozen keyword-only dataclass field with a default and one sentence of meaning."""

from dataclasses import MISSING, field
from typing import Any


def knob(meaning: str, default: Any = MISSING) -> Any:
    """A dataclass field documented by one sentence; units belong in the sentence."""
    return field(default=default, metadata={"meaning": meaning})
