"""Time, energy and money of a run on a cluster.

    roofline of a step   max(a, w) + (1 - overlap) min(a, w) + exchanges
                         a = max(arithmetic, device memory, starting kernels), w = weights sent
    expected step        model FLOPs / (devices x peak x efficiency), never below the roofline
    days                 steps x expected step / share of time that trains (saves, failures, restarts take the rest)

Weights are gathered and gradients summed while layers compute (FSDP2 prefetches), in part; exchanges of rows, of
context and of Muon's matrices are waited for. Skew between processes is not in the roofline: it is a bound and ranks
layouts; the efficiency, taken from published runs, is what dates a run.
"""

from dataclasses import dataclass
from typing import NamedTuple

from trinity.config.run import RunConfig
from trinity.plan.assumptions import Assumptions
from trinity.plan.flops import computed_flops, model_flops, newton_schulz_flops
from trinity.plan.hardware import Cluster
from trinity.plan.layout import Kernels, Layout
from trinity.plan.memory import RankMemory, activation_bytes
from trinity.plan.params import held_values
from trinity.plan.wire import Transfer, transfers

DAY = 86400.0
# Operators of one block that work on values, counted in rehearsals of lab256 in bfloat16 over two processes.
FORWARD_KERNELS, BACKWARD_KERNELS, UPDATE_KERNELS = 112, 164, 64
_OVERLAPPED = ("fsdp", "expert_shard", "replicate")


class Roofline(NamedTuple):
    """Least seconds of one step, part by part, each at the full rate of the hardware."""

    arithmetic: float
    memory: float
    launches: float
    weights: float
    exchanges: float
    overlap: float

    @property
    def seconds(self) -> float:
        on_device = max(self.arithmetic, self.memory, self.launches)
        hidden = (1 - self.overlap) * min(on_device, self.weights)
        return max(on_device, self.weights) + hidden + self.exchanges


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run takes. Seconds are those of one step; shares are of the whole time."""

    steps: int
    roofline: Roofline
    step_seconds: float
    save_seconds: float
    save_share: float
    failure_share: float
    failures: float
    days: float
    device_hours: float
    megawatt_hours: float
    dollars: float

    @property
    def training_share(self) -> float:
        return 1 / (1 + self.save_share + self.failure_share)


def roofline(run: RunConfig, layout: Layout, cluster: Cluster, assumptions: Assumptions) -> Roofline:
    """The roofline of one step."""
    device, length = cluster.device, run.data.sequence_length
    microbatches = layout.microbatches(run)
    tokens = microbatches * layout.tokens(run)
    dense, routed = newton_schulz_flops(run.model, run.optim)
    kernels = layout.kernels(device.is_cpu)
    arithmetic = tokens * computed_flops(run.model, length, layout.remat, kernels) / device.peak(layout.precision)
    arithmetic += (dense + routed) / layout.fsdp / device.peak(run.optim.newton_schulz_dtype)
    seconds = {True: 0.0, False: 0.0}
    for transfer in transfers(run, layout):
        waited = transfer.group not in _OVERLAPPED or transfer.purpose.startswith("Muon")
        seconds[waited] += transfer_seconds(transfer, layout, cluster) + transfer.calls * assumptions.call_seconds
    memory = _memory_bytes(run, layout, kernels) / device.bandwidth
    launches = _kernels(run, layout) * assumptions.kernel_seconds
    return Roofline(arithmetic, memory, launches, seconds[False], seconds[True], assumptions.overlap)


def _kernels(run: RunConfig, layout: Layout) -> int:
    """Kernels that a step starts one after another, the few of embedding and loss left out."""
    passes = FORWARD_KERNELS * (2 if layout.remat == "block" else 1) + BACKWARD_KERNELS
    return run.model.num_hidden_layers * (layout.microbatches(run) * passes + UPDATE_KERNELS)


def transfer_seconds(transfer: Transfer, layout: Layout, cluster: Cluster) -> float:
    """Least time of one purpose's transfers. A ring that crosses servers uses the network of all its members there."""
    device, here = cluster.device, members_in_server(transfer.group, layout, cluster.device.per_server)
    if transfer.processes <= here:
        return transfer.sent / device.link
    if transfer.collective == "all-to-all":
        leaving = transfer.payload * (transfer.processes - here) / transfer.processes
        return max(leaving / device.network, (transfer.sent - leaving) / device.link)
    if transfer.collective == "halo":
        return transfer.sent / device.network
    return transfer.sent / min(device.link, device.network * here)


def members_in_server(group: str, layout: Layout, per_server: int) -> int:
    """How many processes of a group share a server: ranks are numbered context, then shard, then replicate."""
    stride = {"expert_shard": layout.expert, "replicate": layout.fsdp}.get(group, 1)
    processes = {
        "fsdp": layout.fsdp,
        "expert": layout.expert,
        "expert_shard": layout.expert_shard,
        "context": layout.context,
        "replicate": layout.replicate,
        "world": layout.size,
    }[group]
    return max(1, min(processes, per_server // stride))


def _memory_bytes(run: RunConfig, layout: Layout, kernels: Kernels) -> float:
    """Bytes through a device's memory in one step: working weights, activations and the update, each once a pass."""
    passes = 4 if layout.remat == "block" else 3
    one = held_values(run.model, 1, 1)
    working = one.dense + one.expert // layout.expert
    held = held_values(run.model, layout.fsdp, layout.expert).weights
    microbatch = passes * layout.value_bytes * working + 2 * activation_bytes(run, layout, kernels)
    return layout.microbatches(run) * microbatch + 4 * 7 * held


def run_cost(run: RunConfig, layout: Layout, cluster: Cluster, memory: RankMemory, assumptions: Assumptions) -> Cost:
    """The whole run on a layout that fits."""
    device, steps = cluster.device, run.steps
    bound = roofline(run, layout, cluster, assumptions)
    flops = run.train.batch_tokens * model_flops(run.model, run.data.sequence_length)
    step = max(bound.seconds, flops / (cluster.size * device.peak(layout.precision) * device.efficiency))
    interval = step * max(1, (run.train.save_every_tokens or run.horizon) // run.train.batch_tokens)
    save = memory.staging / assumptions.copy_rate
    between = assumptions.failure_hours * 3600 / cluster.size
    lost = (interval / 2 + 60 * assumptions.restart_minutes) / between
    seconds = steps * step * (1 + save / interval + lost)
    hours = cluster.size * seconds / 3600
    return Cost(
        steps=steps,
        roofline=bound,
        step_seconds=step,
        save_seconds=save,
        save_share=save / interval,
        failure_share=lost,
        failures=seconds / between,
        days=seconds / DAY,
        device_hours=hours,
        megawatt_hours=hours * device.watts * assumptions.power_usage / 1e6,
        dollars=hours * device.price,
    )
