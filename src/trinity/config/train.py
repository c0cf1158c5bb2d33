"""TrainConfig: horizon, batch, cadence and guard of a training run. All lengths are in tokens."""

from dataclasses import dataclass
from typing import Literal

from trinity.config.knob import Settings, knob


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    section = "train"

    seed: int = knob("root of every random stream of the run", 0)
    tokens: int = knob("tokens to train on in all", low=1)
    batch_tokens: int = knob("tokens in one optimiser step", low=1)
    microbatch_rows: int = knob("rows in one forward and backward pass", low=1)
    evaluate_every_tokens: int = knob(
        "tokens between evaluations on held-out text; 0 evaluates at the end only", 0, low=0
    )
    evaluate_bytes: int = knob("held-out bytes read in each evaluation; 0 reads none", 65536, low=0)
    sample_tokens: int = knob("tokens of the sample shown at each evaluation; 0 shows none", 64, low=0)
    save_every_tokens: int = knob("tokens between checkpoints; 0 saves at the end only", 0, low=0)
    keep_checkpoints: int = knob("newest checkpoints kept; those with a name are always kept", 2, low=1)
    keep_every_tokens: int = knob(
        "tokens between step checkpoints that are kept for good; 0 keeps none but the newest", 0, low=0
    )
    spike_sigmas: float = knob(
        "a loss this many standard deviations above its recent mean is a spike; 0 ignores spikes", 6.0, low=0
    )
    spike_action: Literal["skip", "rollback", "stop"] = knob("what a spike leads to", "skip")
    nonfinite_action: Literal["skip", "rollback", "stop"] = knob("what a non-finite loss or gradient leads to", "skip")
    max_incidents: int = knob("incidents in a row after which the run stops in any case", 5, low=1)
