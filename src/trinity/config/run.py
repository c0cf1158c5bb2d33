"""RunConfig: everything one pretraining run is made of, and the rules that hold between its parts."""

from dataclasses import dataclass

from trinity.base.errors import ConfigError
from trinity.config.data import DataConfig
from trinity.config.knob import Settings, knob
from trinity.config.model import ModelConfig
from trinity.config.optim import BalanceConfig, OptimConfig
from trinity.config.parallel import ParallelConfig
from trinity.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    name: str = knob("name of the recipe this came from")
    model: ModelConfig = knob("shape of the model")
    data: DataConfig = knob("text and its order")
    optim: OptimConfig = knob("optimisers and schedule", OptimConfig())
    balance: BalanceConfig = knob("expert balancing and auxiliary losses", BalanceConfig())
    train: TrainConfig = knob("horizon, batch, cadence, guard")
    parallel: ParallelConfig = knob("how the run is spread over processes", ParallelConfig())

    @property
    def steps(self) -> int:
        """Optimiser steps of the run: train.tokens rounded up to whole steps."""
        return -(-self.train.tokens // self.train.batch_tokens)

    @property
    def horizon(self) -> int:
        """Tokens of all steps; the schedule ends here."""
        return self.steps * self.train.batch_tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        microbatch = self.train.microbatch_rows * self.data.sequence_length
        if self.train.batch_tokens % microbatch:
            raise ConfigError(
                f"A step of {self.train.batch_tokens} tokens is not a whole number of microbatches of {microbatch} "
                f"tokens ({self.train.microbatch_rows} rows of {self.data.sequence_length}).",
                "Make train.batch_tokens a multiple of train.microbatch_rows x data.sequence_length.",
            )
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ConfigError(
                f"Rows of {self.data.sequence_length} tokens are longer than the model's context of "
                f"{self.model.max_position_embeddings}.",
                "Raise model.max_position_embeddings or lower data.sequence_length.",
            )
        if self.optim.warmup_tokens + self.optim.decay_tokens > self.horizon:
            raise ConfigError(
                f"Warm-up ({self.optim.warmup_tokens} tokens) and decay ({self.optim.decay_tokens}) do not fit a run "
                f"of {self.horizon} tokens.",
                "Shorten them or raise train.tokens.",
            )
