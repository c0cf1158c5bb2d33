"""How a setting is declared: a dataclass field with a default, one sentence of meaning, and the bounds of its value."""

from dataclasses import MISSING, dataclass, field, fields
from math import inf
from typing import Any, Literal, NamedTuple, get_args, get_origin

from trinity.base.errors import ConfigError


class Bounds(NamedTuple):
    """Where a number may lie: low <= value <= high and above < value < below. No bounds admit inf or nan."""

    low: float = -inf
    high: float = inf
    above: float = -inf
    below: float = inf

    def hold(self, value: float) -> bool:
        return self.low <= value <= self.high and self.above < value < self.below

    def __str__(self) -> str:
        names = ("at least", "at most", "above", "below")
        return " and ".join(f"{name} {bound}" for name, bound in zip(names, self, strict=True) if abs(bound) < inf)


def knob(
    meaning: str,
    default: Any = MISSING,
    *,
    low: float = -inf,
    high: float = inf,
    above: float = -inf,
    below: float = inf,
) -> Any:
    """A dataclass field documented by one sentence, with the bounds of a number; units belong in the sentence."""
    return field(default=default, metadata={"meaning": meaning, "bounds": Bounds(low, high, above, below)})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of every config. However one comes to be (recipe, `--set`, file), each number lies within its bounds."""

    section = ""  # without annotation it is no field

    @classmethod
    def written(cls, name: str) -> str:
        """A setting as messages name it."""
        return f"{cls.section}.{name}" if cls.section else name

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, bounds = getattr(self, setting.name), setting.metadata["bounds"]
            choices = get_args(setting.type) if get_origin(setting.type) is Literal else (value,)
            if value not in choices:
                raise ConfigError(
                    f"{self.written(setting.name)} is {value!r}.", f"Choose {' or '.join(map(str, choices))}."
                )
            if isinstance(value, int | float) and not isinstance(value, bool) and not bounds.hold(value):
                finite = "" if -inf < value < inf else "finite"
                raise ConfigError(
                    f"{self.written(setting.name)} is {value}.",
                    f"It must be {' and '.join(part for part in (finite, str(bounds)) if part)}.",
                )
