"""TrainConfig: horizon, batch, cadence and guard of a training run. All lengths are in tokens."""

from dataclasses import dataclass
from typing import Literal

from trinity.config.knob import Settings, knob


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    section = "train"

    seed: int = knob("root of every random stream of the run", 0)
    tokens: int = knob("tokens to train on, those of a context extension not counted", low=1)
    batch_tokens: int = knob("tokens in one optimiser step, until a phase changes them", low=1)
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
    norm_spike_sigmas: float = knob(
        "a gradient norm whose logarithm lies this many standard deviations above its recent mean is a spike; 0 "
        "ignores them",
        8.0,
        low=0,
    )
    spike_action: Literal["skip", "rollback", "stop"] = knob("what a spike leads to", "skip")
    nonfinite_action: Literal["skip", "rollback", "stop"] = knob("what a non-finite loss or gradient leads to", "skip")
    max_incidents: int = knob("incidents in a row after which the run stops in any case", 5, low=1)
    router_factor: float = knob(
        "imbalance or drift of a layer's load this many times the lowest seen is a collapse; 0 looks away",
        3.0,
        low=0,
    )
    router_action: Literal["alarm", "rollback", "stop"] = knob(
        "what a routing that drifts or collapses leads to", "alarm"
    )
    probe_every: int = knob("steps between probes that compare the speed of processes; 0 probes never", 50, low=0)
    straggler_factor: float = knob("a process this many times slower than the median is a straggler", 1.5, above=1)
    hang_minutes: float = knob("minutes without a finished step after which a hang is alarmed; 0 never", 10.0, low=0)
    hang_action: Literal["alarm", "exit"] = knob(
        "what a hang leads to beside its alarm; exit ends the process, so that its launcher starts it again", "alarm"
    )
    alarm_command: str = knob("program with arguments that is given each alarm as JSON on its input; no shell", "")
    alarm_quiet_minutes: float = knob("minutes in which alarms of one kind are told once", 15.0, low=0)
