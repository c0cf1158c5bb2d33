"""Whether a run is large enough for its experts: rows that reach one, a step and a microbatch, at even routing."""

from typing import NamedTuple

from trinity.config.run import RunConfig
from trinity.plan.hardware import Device
from trinity.plan.layout import Layout

NOISY_COUNT = 100  # counts of n rows scatter by 1 / sqrt(n): below this by more than a tenth, at even routing


class ExpertLoad(NamedTuple):
    """Rows for one expert, and what follows from them. `tokens` is how many of the run's tokens it learns from."""

    rows_a_step: float
    rows_a_microbatch: float
    tokens: float
    warnings: list[str]


def expert_load(run: RunConfig, layout: Layout, device: Device) -> ExpertLoad:
    """Rows of one expert over all processes and a step, and on its process in one microbatch."""
    model = run.model
    if not model.num_sparse_layers:
        return ExpertLoad(0.0, 0.0, 0.0, [])
    share = model.num_experts_per_tok / model.num_experts
    step = run.train.batch_tokens * share
    microbatch = layout.tokens(run) * layout.expert * share
    return ExpertLoad(step, microbatch, run.horizon * share, _warnings(run, layout, device, step, microbatch))


def _warnings(run: RunConfig, layout: Layout, device: Device, step: float, microbatch: float) -> list[str]:
    """Sentences with the numbers, the reason and what to change; none for a run that is large enough."""
    found, model = [], run.model
    rank = min(model.hidden_size, model.moe_intermediate_size)
    if step < rank:
        found.append(
            f"Each expert sees {step:,.0f} rows a step, fewer than the {rank} directions of its matrices: its gradient "
            "cannot have full rank, and Muon raises the missing directions from noise. Raise train.batch_tokens to "
            f"{run.train.batch_tokens * rank / step:,.0f} or use fewer experts."
        )
    if step < NOISY_COUNT:
        found.append(
            f"Counts of {step:,.0f} rows an expert and step scatter by {100 / step**0.5:.0f} % when routing is even: "
            f"the balancing rule chases noise. Raise train.batch_tokens {NOISY_COUNT / step:,.1f} times or use fewer "
            "experts."
        )
    balance = layout.value_bytes / 2 * device.peak(layout.precision) / device.bandwidth
    if microbatch < balance:
        found.append(
            f"Each expert multiplies {microbatch:,.0f} rows a microbatch; below about {balance:,.0f} rows "
            f"{device.name} reads an expert's weights for longer than it multiplies them. Raise "
            "train.microbatch_rows or parallel.expert."
        )
    return found
