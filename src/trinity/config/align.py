"""AlignConfig: supervised fine-tuning of a model on conversations."""

from dataclasses import dataclass

from trinity.base.errors import ConfigError
from trinity.config.knob import Settings, knob


@dataclass(frozen=True, kw_only=True)
class AlignConfig(Settings):
    section = "align"

    seed: int = knob("root of the order of conversations", 0)
    epochs: float = knob("passes over the conversations", 2.0, above=0)
    sequence_length: int = knob("longest conversation in tokens; a longer one is cut and counted", 512, low=8)
    batch_tokens: int = knob("tokens in one optimiser step, padding included", 4096, low=8)
    muon_lr: float = knob("peak learning rate of Muon", 1e-3, above=0)
    adamw_lr: float = knob("peak learning rate of AdamW", 3e-4, above=0)
    warmup_fraction: float = knob("share of the steps over which the learning rate rises", 0.05, low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_tokens < self.sequence_length:
            raise ConfigError(
                f"align.batch_tokens {self.batch_tokens} does not hold one row of align.sequence_length "
                f"{self.sequence_length}.",
                "Raise align.batch_tokens.",
            )
