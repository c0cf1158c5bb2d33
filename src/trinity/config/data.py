"""DataConfig: what text a run reads and in what order."""

from dataclasses import dataclass

from trinity.config.knob import Settings, knob


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    section = "data"

    sequence_length: int = knob("tokens in one training row", low=1)
    buffer_documents: int = knob(
        "documents the RSDB keeps live; it holds up to twice as many after a refill", 256, low=1
    )
    intra_document_mask: bool = knob("whether attention stops at document boundaries inside a row", True)
