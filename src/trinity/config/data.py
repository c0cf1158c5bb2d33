"""DataConfig: what text a run reads and in what order."""

from dataclasses import dataclass

from trinity.base.errors import ConfigError
from trinity.config.knob import knob


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    sequence_length: int = knob("tokens in one training row")
    buffer_documents: int = knob("documents the RSDB keeps live; it holds up to twice as many after a refill", 256)
    intra_document_mask: bool = knob("whether attention stops at document boundaries inside a row", True)

    def __post_init__(self) -> None:
        for name in ("sequence_length", "buffer_documents"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} is {getattr(self, name)}.", "It must be at least 1.")
