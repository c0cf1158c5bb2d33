"""AuditConfig: how much the probes read, and how sure their intervals are."""

from dataclasses import dataclass

from trinity.config.knob import Settings, knob


@dataclass(frozen=True, kw_only=True)
class AuditConfig(Settings):
    seed: int = knob("root of sampling and bootstrap", 0)
    documents_per_kind: int = knob("held-out documents read for each kind of text", 40, low=1)
    bytes_per_document: int = knob("bytes read from the start of each document", 4096, low=1)
    prompts_per_stratum: int = knob("training passages tried for each duplicate count", 40, low=1)
    prefix_tokens: int = knob("tokens of a training passage given as the prompt", 32, low=1)
    suffix_tokens: int = knob("tokens that must follow verbatim to count as extracted", 32, low=1)
    bootstrap_samples: int = knob("resamples behind each interval", 1000, low=2)
    confidence: float = knob("coverage of the intervals", 0.95, above=0, below=1)
