"""RunConfig: everything one pretraining run is made of, and the rules that hold between its parts."""

import re
from dataclasses import dataclass
from functools import cached_property

from trinity.base.errors import ConfigError
from trinity.config.data import DataConfig
from trinity.config.knob import Settings, knob
from trinity.config.model import ModelConfig
from trinity.config.optim import BalanceConfig, OptimConfig
from trinity.config.parallel import ParallelConfig
from trinity.config.phases import (
    BASE,
    CONTEXT_EXTENDED,
    EXTENSION,
    FIRST,
    PRE_ANNEAL,
    ExtensionConfig,
    Phase,
    PhaseConfig,
    lay_out,
    whole_steps,
)
from trinity.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    name: str = knob("name of the recipe this came from")
    model: ModelConfig = knob("shape of the model")
    data: DataConfig = knob("text and its order")
    optim: OptimConfig = knob("optimisers and schedule", OptimConfig())
    balance: BalanceConfig = knob("expert balancing and auxiliary losses", BalanceConfig())
    train: TrainConfig = knob("horizon, batch, cadence, guard")
    phases: tuple[PhaseConfig, ...] = knob("what changes in the middle of the run, in its order", ())
    extension: ExtensionConfig = knob("the context extension after the anneal", ExtensionConfig())
    parallel: ParallelConfig = knob("how the run is spread over processes", ParallelConfig())

    @cached_property
    def _laid_out(self) -> tuple[tuple[Phase, ...], tuple[str, ...]]:
        return lay_out(self.phases, self.extension, self.train, self.data)

    @property
    def course(self) -> tuple[Phase, ...]:
        """The whole run in whole steps, without a gap; the extension is its last phase."""
        return self._laid_out[0]

    @property
    def mixes(self) -> dict[str, str]:
        """Folders that later phases read, in the order of their numbers, from 1 (`Phase.corpus`), each under the
        setting that first names it."""
        naming = {f"phases.{number}.mix": phase.mix for number, phase in enumerate(self.phases)}
        naming["extension.mix"] = self.extension.mix
        return {next(name for name, named in naming.items() if named == mix): mix for mix in self._laid_out[1]}

    @property
    def own_beginning(self) -> bool:
        """Whether the first of `phases` is the beginning of the run."""
        return bool(self.phases) and self.phases[0].from_tokens == 0

    @property
    def own_data(self) -> str:
        """The folder that the phase at the beginning names; empty where it is the command's to name one."""
        return self.phases[0].mix if self.own_beginning else ""

    @property
    def steps(self) -> int:
        """Optimiser steps of the run; each phase is rounded up to whole steps."""
        return sum(phase.steps for phase in self.course)

    @property
    def horizon(self) -> int:
        """Tokens of all steps, the extension's included."""
        return self.course[-1].end

    @property
    def base_end(self) -> int:
        """Tokens of the steps before the extension; the anneal ends here."""
        return self.course[-1].begin if self.extension.tokens else self.horizon

    @property
    def anneal_start(self) -> int:
        """Tokens at which the learning rate begins to fall; `base_end` where it does not."""
        return self.base_end - self.optim.decay_tokens

    @property
    def named_checkpoints(self) -> dict[str, int]:
        """The checkpoints that are kept for good, in their order: name and tokens of each, at a step's end.

        A run that never anneals has no pre-anneal and, unless it is extended, no base: its last step is its end.
        """
        begins = {phase.name: phase.begin for phase in self.course}
        named = {phase.keep: begins[phase.name] for phase in self.phases if phase.keep}
        if self.optim.decay_tokens and self.anneal_start:
            phase = self.phase_at(self.anneal_start - 1)
            named[PRE_ANNEAL] = whole_steps(phase.begin, self.anneal_start, phase.batch_tokens)
        if self.optim.decay_tokens or self.extension.tokens:
            named[BASE] = self.base_end
        if self.extension.tokens:
            named[CONTEXT_EXTENDED] = self.horizon
        return named

    def phase_at(self, tokens: int) -> Phase:
        """The phase of the step that begins at `tokens`; the last one from the horizon on."""
        return next((phase for phase in self.course if tokens < phase.end), self.course[-1])

    def batch_at(self, tokens: int) -> int:
        """Tokens of the step that begins at `tokens`."""
        return self.phase_at(tokens).batch_tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_names()
        for phase in self.course:
            self._check_rows(phase)
        if self.optim.warmup_tokens + self.optim.decay_tokens > self.base_end:
            raise ConfigError(
                f"Warm-up (optim.warmup_tokens, {self.optim.warmup_tokens}) and decay (optim.decay_tokens, "
                f"{self.optim.decay_tokens}) do not fit a run of {self.base_end} tokens.",
                "Lower these two or raise train.tokens.",
            )
        if self.extension.tokens:
            self._check_extension()

    def _check_names(self) -> None:
        taken = {EXTENSION} if self.own_beginning else {EXTENSION, FIRST}
        for number, phase in enumerate(self.phases):
            if not phase.name or phase.name in taken:
                raise ConfigError(
                    f"The name '{phase.name}' of phases.{number} is {'taken' if phase.name else 'empty'}.",
                    "Give each phase a name of its own.",
                )
            taken.add(phase.name)
        kept = {PRE_ANNEAL, BASE, CONTEXT_EXTENDED, "latest"}
        for number, phase in enumerate(self.phases):
            good = re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", phase.keep) and not phase.keep.startswith("step-")
            if phase.keep and (not good or phase.keep in kept or not phase.from_tokens):
                raise ConfigError(
                    f"phases.{number}.keep is '{phase.keep}', which names no checkpoint of its own.",
                    "Write small letters, digits and dashes, other than the names that runs give (base, step-...); a "
                    "phase that begins the run keeps none.",
                )
            kept.add(phase.keep)

    def _check_extension(self) -> None:
        extension, tokens = self.extension, self.horizon - self.base_end
        if extension.warmup_tokens > tokens:
            raise ConfigError(
                f"A warm-up of {extension.warmup_tokens} tokens does not fit a context extension of {tokens}.",
                "Lower extension.warmup_tokens or raise extension.tokens.",
            )
        if extension.final_lr_fraction > extension.high_lr_fraction:
            raise ConfigError(
                f"The learning rate of the context extension ends at {extension.final_lr_fraction} of the peak, above "
                f"its highest, {extension.high_lr_fraction}.",
                "Lower extension.final_lr_fraction or raise extension.high_lr_fraction.",
            )

    def _check_rows(self, phase: Phase) -> None:
        """An extension may train on rows beyond the context that the model is meant for, as the report's did."""
        long = phase.name == EXTENSION
        section, rows = ("extension", "extension") if long else ("train", "data")
        microbatch = phase.microbatch_rows * phase.sequence_length
        if phase.batch_tokens % microbatch:
            below = phase.batch_tokens // microbatch * microbatch
            nearest = [tokens for tokens in (below, below + microbatch) if tokens]
            raise ConfigError(
                f"A step of {phase.batch_tokens} tokens is not a whole number of microbatches of {microbatch} "
                f"tokens ({phase.microbatch_rows} rows of {phase.sequence_length}); phase '{phase.name}'.",
                f"Make its batch_tokens {' or '.join(map(str, nearest))}, a multiple of {section}.microbatch_rows x "
                f"{rows}.sequence_length.",
            )
        if not long and phase.sequence_length > self.model.max_position_embeddings:
            raise ConfigError(
                f"Rows of {phase.sequence_length} tokens are longer than the model's context of "
                f"{self.model.max_position_embeddings}.",
                "Raise model.max_position_embeddings or lower data.sequence_length.",
            )
