"""The best layout of a run on a cluster, by search, and the smallest cluster that holds it.

Every layout that divides processes, experts, heads and rows is a candidate; those whose fullest process does not fit
the memory are dropped; the lowest roofline (plan/cost.py) wins. Of one arrangement only the largest microbatch that
fits is looked at, since a larger one gathers weights less often; context ranks above one only when nothing fits
without them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from trinity.base.errors import UsageError
from trinity.base.units import show_bytes
from trinity.config.run import RunConfig
from trinity.plan.assumptions import Assumptions
from trinity.plan.cost import roofline
from trinity.plan.hardware import Cluster, Device
from trinity.plan.layout import Layout
from trinity.plan.memory import RankMemory, rank_memory

LARGEST = 1 << 14  # devices up to which the smallest cluster is looked for


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A layout and what it takes; `tried` layouts were looked at."""

    layout: Layout
    memory: RankMemory
    tried: int

    def bytes_on(self, device: Device) -> int:
        """Bytes of device memory at the peak; a CPU also holds the copy of a checkpoint being written."""
        return self.memory.peak + (self.memory.staging if device.is_cpu else 0)


def best_fit(run: RunConfig, cluster: Cluster, assumptions: Assumptions, fixed: dict[str, object]) -> Fit:
    """The layout with the lowest roofline. `fixed` holds what is not to be searched, by the names of Layout.

    A UsageError when nothing divides, or nothing fits: with the numbers and what to change.
    """
    room = cluster.device.memory * assumptions.usable_memory
    tried, least = 0, None
    for ranks in _contexts(run, cluster.size, fixed):
        found: list[tuple[float, int, Fit]] = []
        for arrangement in _arrangements(run, cluster, ranks, fixed):
            tried += len(arrangement)
            leanest = fit_of(run, arrangement[-1], cluster.device, tried)
            if least is None or leanest.bytes_on(cluster.device) < least.bytes_on(cluster.device):
                least = leanest
            if leanest.bytes_on(cluster.device) > room:
                continue
            fits = (fit_of(run, layout, cluster.device, tried) for layout in arrangement)
            fit = next(fit for fit in fits if fit.bytes_on(cluster.device) <= room)
            found.append((roofline(run, fit.layout, cluster, assumptions.overlap).seconds, tried, fit))
        if found:
            return min(found)[2]
    if least is None:
        raise UsageError(*_nothing_divides(run, cluster, fixed))
    raise UsageError(*_nothing_fits(run, cluster, least, room, assumptions))


def fit_of(run: RunConfig, layout: Layout, device: Device, tried: int = 1) -> Fit:
    return Fit(layout=layout, memory=rank_memory(run, layout, device.is_cpu), tried=tried)


def smallest_cluster(run: RunConfig, device: Device, assumptions: Assumptions, fixed: dict[str, object]) -> int | None:
    """The least power of two of devices that holds the run; None when none up to LARGEST does.

    Unless `fixed` says otherwise, one replica over all devices is looked at: nothing needs less memory.
    """
    room, size = device.memory * assumptions.usable_memory, 1
    whole = not fixed.keys() & {"replicate", "shard"}
    while size <= LARGEST:
        cluster = Cluster(device=device, size=size)
        for ranks in _contexts(run, size, fixed):
            for arrangement in _arrangements(run, cluster, ranks, {**fixed, **({"replicate": 1} if whole else {})}):
                if fit_of(run, arrangement[-1], device).bytes_on(device) <= room:  # the last needs least
                    return size
        size *= 2
    return None


def _contexts(run: RunConfig, size: int, fixed: dict[str, object]) -> list[int]:
    ranks = [
        ranks
        for ranks in _divisors(size)
        if run.model.num_attention_heads % ranks == 0 and run.data.sequence_length % ranks == 0
    ]
    return [r for r in ranks if r == fixed.get("context", r)]


def _arrangements(run: RunConfig, cluster: Cluster, context: int, fixed: dict[str, object]) -> Iterator[list[Layout]]:
    """For each way to place weights and experts and each remat: its layouts, largest microbatch first."""
    rows = run.train.batch_tokens // run.data.sequence_length
    kept = {name: value for name, value in fixed.items() if name != "context"}
    precision = str(kept.pop("precision", "float32" if cluster.device.is_cpu else "bfloat16"))
    only = cluster.size // int(str(kept["replicate"])) if "replicate" in kept else None
    for fsdp in _divisors(cluster.size):
        if fsdp % context or fsdp != (only or fsdp):
            continue
        replicate, shard = cluster.size // fsdp, fsdp // context
        each, left = divmod(rows, replicate * shard)
        if left or not each:
            continue
        for expert in _divisors(fsdp):
            if run.model.num_experts % expert or (expert > 1 and not run.model.num_sparse_layers):
                continue
            for remat in ("none", "block"):
                layouts = [
                    Layout(replicate, shard, context, expert, many, remat, precision)
                    for many in _by_use(each, run, cluster)
                ]
                layouts = [x for x in layouts if all(getattr(x, name) == value for name, value in kept.items())]
                if layouts:
                    yield layouts


def _by_use(rows: int, run: RunConfig, cluster: Cluster) -> list[int]:
    """Rows of a microbatch, the best first: the largest, where weights are gathered for each; on one device nothing is,
    and none beyond the recipe's own is looked at."""
    most = run.train.microbatch_rows if cluster.size == 1 else rows
    return [many for many in reversed(_divisors(rows)) if many <= most]


def _divisors(number: int) -> list[int]:
    small = [i for i in range(1, int(number**0.5) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})


def _nothing_divides(run: RunConfig, cluster: Cluster, fixed: dict[str, object]) -> tuple[str, str]:
    rows = run.train.batch_tokens // run.data.sequence_length
    held = "".join(f", {name} {value}" for name, value in sorted(fixed.items()))
    return (
        f"No layout divides {cluster.size} devices, {rows} rows a step, {run.model.num_experts} experts and "
        f"{run.model.num_attention_heads} query heads{f' with{held[1:]}' if held else ''}.",
        "Choose a number of devices that divides the rows of a step (train.batch_tokens over data.sequence_length), or "
        "drop what --set fixes.",
    )


def _nothing_fits(
    run: RunConfig, cluster: Cluster, least: Fit, room: float, assumptions: Assumptions
) -> tuple[str, str]:
    device, layout = cluster.device, least.layout
    smallest = smallest_cluster(run, device, assumptions, {})
    enough = (
        f"The smallest that holds it is {smallest}x{device.name}"
        if smallest
        else f"No number of {device.name} holds it"
    )
    parts = max(
        ("weights", "moments", "gradients", "activations", "layer", "loss"),
        key=lambda name: getattr(least.memory, name),
    )
    return (
        f"{run.name} does not fit {cluster}: the leanest layout needs {show_bytes(least.bytes_on(device))} on each "
        f"device of {show_bytes(room)} usable, most of it {parts} ({layout}).",
        f"{enough}; or take a device with more memory, fewer layers or experts, or shorter rows.",
    )
