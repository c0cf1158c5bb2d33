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
from trinity.plan.stages import stages

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


def best_fit(
    run: RunConfig,
    cluster: Cluster,
    assumptions: Assumptions,
    fixed: dict[str, object],
    whole: RunConfig | None = None,
) -> Fit:
    """The layout with the lowest roofline for a run of one stage. whole: the run that the stage belongs to.

    `fixed` holds what is not to be searched, by the names of Layout. A fixed number of shards is that of weights: a
    stage that needs context ranks divides them further (shard x context stays).
    A UsageError when nothing divides, or nothing fits: with the numbers and what to change.
    """
    whole = whole or run
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
            found.append((roofline(run, fit.layout, cluster, assumptions).seconds, tried, fit))
        if found:
            return min(found)[2]
    if least is None:
        raise UsageError(*_nothing_divides(run, whole, cluster, fixed))
    raise UsageError(*_nothing_fits(run, whole, cluster, least, room, assumptions))


def fit_of(run: RunConfig, layout: Layout, device: Device, tried: int = 1) -> Fit:
    return Fit(layout=layout, memory=rank_memory(run, layout, device.is_cpu), tried=tried)


def smallest_cluster(run: RunConfig, device: Device, assumptions: Assumptions, fixed: dict[str, object]) -> int | None:
    """The least power of two of devices that holds every stage of the run; None when none up to LARGEST does.

    Unless `fixed` says otherwise, one replica over all devices is looked at: nothing needs less memory.
    """
    room, size = device.memory * assumptions.usable_memory, 1
    waiting = [stage.run for stage in stages(run)]
    if not fixed.keys() & {"replicate", "shard"}:
        fixed = {**fixed, "replicate": 1}
    while size <= LARGEST:
        cluster = Cluster(device=device, size=size)
        if all(_holds(stage, cluster, room, fixed) for stage in waiting):
            return size
        size *= 2
    return None


def _holds(run: RunConfig, cluster: Cluster, room: float, fixed: dict[str, object]) -> bool:
    """Whether some layout of a stage fits. Of an arrangement the last layout needs least."""
    return any(
        fit_of(run, arrangement[-1], cluster.device).bytes_on(cluster.device) <= room
        for ranks in _contexts(run, cluster.size, fixed)
        for arrangement in _arrangements(run, cluster, ranks, fixed)
    )


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
    kept = {name: value for name, value in fixed.items() if name not in ("context", "shard")}
    cut = int(str(fixed["shard"])) * int(str(fixed.get("context", 1))) if "shard" in fixed else None
    precision = str(kept.pop("precision", "float32" if cluster.device.is_cpu else "bfloat16"))
    only = cluster.size // int(str(kept["replicate"])) if "replicate" in kept else None
    for fsdp in _divisors(cluster.size):
        if fsdp % context or fsdp != (only or fsdp) or fsdp != (cut or fsdp):
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


def _nothing_divides(run: RunConfig, whole: RunConfig, cluster: Cluster, fixed: dict[str, object]) -> tuple[str, str]:
    rows = run.train.batch_tokens // run.data.sequence_length
    held = "".join(f", {name} {value}" for name, value in sorted(fixed.items()))
    near = [] if fixed else _near(whole, cluster)
    other = f"Take {' or '.join(f'{size:,}' for size in near)} devices, or choose" if near else "Choose"
    return (
        f"No layout of {run.name} divides {cluster.size:,} devices, {rows:,} rows a step, {run.model.num_experts} "
        f"experts and {run.model.num_attention_heads} query heads{f' with{held[1:]}' if held else ''}.",
        f"{other} another number of rows (train.batch_tokens over data.sequence_length)"
        + (", or drop what --set fixes." if fixed else "."),
    )


def _near(run: RunConfig, cluster: Cluster) -> list[int]:
    """The next numbers of devices below and above that divide every stage, up to half and twice as many."""
    stretches = [stage.run for stage in stages(run)]

    def divides(size: int) -> bool:
        return all(
            any(part.train.batch_tokens // part.data.sequence_length % (size // ranks) == 0
                for ranks in _contexts(part, size, {}))
            for part in stretches
        )  # fmt: skip

    below = (size for size in range(cluster.size - 1, cluster.size // 2, -1) if divides(size))
    above = (size for size in range(cluster.size + 1, 2 * cluster.size + 1) if divides(size))
    return [size for size in (next(below, None), next(above, None)) if size]


def _nothing_fits(
    run: RunConfig, whole: RunConfig, cluster: Cluster, least: Fit, room: float, assumptions: Assumptions
) -> tuple[str, str]:
    device, layout = cluster.device, least.layout
    smallest = smallest_cluster(whole, device, assumptions, {})
    enough = (
        f"The smallest cluster that holds all of {whole.name} is {smallest}x{device.name}"
        if smallest
        else f"No number of {device.name} holds {run.name}"
    )
    parts = max(
        ("weights", "moments", "gradients", "activations", "layer", "loss"),
        key=lambda name: getattr(least.memory, name),
    )
    extended = run.data.sequence_length > whole.data.sequence_length
    without = " `--set extension.tokens=0` plans the run without its extension." if extended else ""
    return (
        f"{run.name} does not fit {cluster}: the leanest layout needs {show_bytes(least.bytes_on(device))} on each "
        f"device of {show_bytes(room)} usable, most of it {parts} ({layout}).",
        f"{enough}. Take {'that or ' if smallest else ''}a device with more memory, fewer layers or experts, or "
        f"shorter rows.{without}",
    )
