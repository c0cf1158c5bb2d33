"""PhaseConfig and ExtensionConfig: what changes in the middle of a run, and what follows its end; and the run laid out.

A run is one schedule of the learning rate (warm-up, plateau, anneal) with phases laid over it: from this token on, read
that mix, or take so many tokens in a step. The context extension comes after the anneal, with rows and rates of its
own. `lay_out` turns both into phases of whole steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from trinity.base.errors import ConfigError
from trinity.config.data import DataConfig
from trinity.config.knob import Settings, knob
from trinity.config.train import TrainConfig

FIRST, EXTENSION = "pretraining", "extension"
PRE_ANNEAL, BASE, CONTEXT_EXTENDED = "pre-anneal", "base", "context-extended"  # checkpoints kept for good


@dataclass(frozen=True, kw_only=True)
class PhaseConfig(Settings):
    """From one token on, these things change; what is not named stays as it was."""

    section = "phases"

    name: str = knob("what people call it")
    from_tokens: int = knob("tokens seen when it begins, at the first step that starts there or later", low=0)
    mix: str = knob("token folder or mix that new documents are drawn from; empty leaves it as it was", "")
    batch_tokens: int = knob("tokens in one optimiser step from here on; 0 leaves them as they were", 0, low=0)
    keep: str = knob("name of a checkpoint kept for good where it begins; empty keeps none", "")


@dataclass(frozen=True, kw_only=True)
class ExtensionConfig(Settings):
    """The context extension: longer rows after the anneal (Trinity report, section 3.5). Rates are of the peak."""

    section = "extension"

    tokens: int = knob("tokens after those of train.tokens on which the context is extended; 0 for none", 0, low=0)
    sequence_length: int = knob("tokens in one of its rows", 0, low=0)
    batch_tokens: int = knob("tokens in one of its optimiser steps", 0, low=0)
    microbatch_rows: int = knob("rows in one of its forward and backward passes", 1, low=1)
    mix: str = knob("token folder or mix of long documents; empty leaves the data as it was", "")
    warmup_tokens: int = knob("tokens over which its learning rate rises linearly from zero; 0 starts high", 0, low=0)
    high_lr_fraction: float = knob("its highest learning rate, as a fraction of the run's peak", 0.1, above=0, high=1)
    final_lr_fraction: float = knob("learning rate at its end, as a fraction of the run's peak", 0.0, low=0, high=1)
    decay: Literal["linear", "cosine"] = knob("shape of its fall", "linear")


class Phase(NamedTuple):
    """A part of a run, in whole steps: nothing but the learning rate changes inside it."""

    name: str
    begin: int  # tokens seen before its first step
    end: int  # tokens seen after its last
    batch_tokens: int
    sequence_length: int
    microbatch_rows: int
    corpus: int  # what is read: 0 the run's own data, k the k-th of RunConfig.mixes

    @property
    def steps(self) -> int:
        return (self.end - self.begin) // self.batch_tokens

    @property
    def rows(self) -> int:
        """Rows of one step."""
        return self.batch_tokens // self.sequence_length

    def microbatches(self, places: int = 1) -> int:
        """Microbatches of one step on each of `places` processes that share its rows; a ConfigError if uneven."""
        each, uneven = divmod(self.rows, self.microbatch_rows * places)
        if uneven:
            raise ConfigError(
                f"A step of phase '{self.name}' has {self.rows} rows; {places} processes cannot share them evenly in "
                f"microbatches of {self.microbatch_rows}.",
                "Choose tokens in a step as a multiple of processes x rows of a microbatch x tokens of a row.",
            )
        return each


def lay_out(
    phases: Sequence[PhaseConfig], extension: ExtensionConfig, train: TrainConfig, data: DataConfig
) -> tuple[tuple[Phase, ...], tuple[str, ...]]:
    """(the run as phases without a gap, the folders that later phases read). ConfigErrors say which phases clash."""
    numbers, corpus = ({phases[0].mix: 0} if phases and not phases[0].from_tokens and phases[0].mix else {}), 0
    begun: list[tuple[str, int, int, int]] = []  # name, begin, tokens of a step, corpus
    if not phases or phases[0].from_tokens:
        begun.append((FIRST, 0, train.batch_tokens, 0))
    for phase in phases:
        if not phase.from_tokens and phase.batch_tokens:
            raise ConfigError(
                f"Phase '{phase.name}' begins the run and has tokens in a step of its own.",
                "Set train.batch_tokens, with which a run begins.",
            )
        name, begin, batch, _ = begun[-1] if begun else (phase.name, 0, train.batch_tokens, 0)
        start = whole_steps(begin, phase.from_tokens, batch)
        if begun and start <= begin:
            raise ConfigError(
                f"Phases '{name}' and '{phase.name}' both begin at the step after {begin:,} tokens.",
                f"Order phases by from_tokens, at least one step of {batch:,} tokens apart.",
            )
        if start >= train.tokens:
            raise ConfigError(
                f"Phase '{phase.name}' begins at {start:,} tokens, which the run of {train.tokens:,} never reaches.",
                "Raise train.tokens or lower its from_tokens.",
            )
        if phase.mix:
            corpus = numbers.setdefault(phase.mix, max(numbers.values(), default=0) + 1)
        begun.append((phase.name, start, phase.batch_tokens or batch, corpus))
    end = whole_steps(begun[-1][1], train.tokens, begun[-1][2])
    ends = [start for _, start, _, _ in begun[1:]] + [end]
    course = [
        Phase(name, start, stop, batch, data.sequence_length, train.microbatch_rows, corpus)
        for (name, start, batch, corpus), stop in zip(begun, ends, strict=True)
    ]
    if extension.tokens:
        if extension.mix:
            corpus = numbers.setdefault(extension.mix, max(numbers.values(), default=0) + 1)
        course.append(_extension(extension, end, corpus))
    return tuple(course), tuple(mix for mix, number in numbers.items() if number)


def whole_steps(begin: int, goal: int, batch_tokens: int) -> int:
    """Where the first step from `begin` on ends, or starts, that has reached `goal` tokens."""
    return begin + -(-(goal - begin) // batch_tokens) * batch_tokens


def _extension(extension: ExtensionConfig, begin: int, corpus: int) -> Phase:
    for what in ("sequence_length", "batch_tokens"):
        if not getattr(extension, what):
            raise ConfigError(f"The context extension has no extension.{what}.", "Set it, or extension.tokens=0.")
    end = whole_steps(begin, begin + extension.tokens, extension.batch_tokens)
    return Phase(
        EXTENSION, begin, end, extension.batch_tokens, extension.sequence_length, extension.microbatch_rows, corpus
    )
