"""Whether a run's part fits the memory of this process's device, said before anything is allocated.

Weights, gradients and moments are known to the byte: what cannot hold those is refused. Activations and scratch are the
planner's estimate (plan/memory.py), which leans to the high side: what may not hold those is warned of.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from trinity.base.errors import TakenError
from trinity.base.units import show_bytes
from trinity.config.run import RunConfig
from trinity.parallel.mesh import World
from trinity.parallel.mesh import layout as lay_over
from trinity.plan.layout import Layout
from trinity.plan.memory import RankMemory, rank_memory

_CGROUP = Path("/sys/fs/cgroup")  # version 2; version 1 keeps the same figures under memory/
_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
_REMEDY = (
    "Spread it over more processes (parallel.shard, parallel.expert), lower train.microbatch_rows, set "
    "parallel.remat=block or parallel.context, or take a smaller model; `trinity plan` finds what fits."
)


def refuse_what_cannot_fit(
    config: RunConfig, world: World, say: Callable[[str], None], available: int | None = None
) -> None:
    """A TakenError when this process's part of the state alone exceeds `available` bytes; a sentence when a step may.

    available: free bytes of the device (default: looked up).
    """
    free = available_bytes(world.device) if available is None else available
    if free is None:
        return
    needed = needed_by(config, world)
    parts = {"weights": needed.weights, "moments": needed.moments, "gradients": needed.gradients}
    state = sum(parts.values())
    shown = ", ".join(f"{name} {show_bytes(size)}" for name, size in parts.items())
    if state > free:
        raise TakenError(
            f"This run needs {show_bytes(state)} on each process for its state alone ({shown}), and about "
            f"{show_bytes(needed.peak)} at the peak of a step; {show_bytes(free)} are free on {world.device}.",
            _REMEDY,
        )
    if needed.peak - needed.process > free:
        say(
            f"A step may need about {show_bytes(needed.peak)} on each process ({shown}, activations "
            f"{show_bytes(needed.activations)}); {show_bytes(free)} are free on {world.device}. {_REMEDY}"
        )


def needed_by(config: RunConfig, world: World) -> RankMemory:
    """What the planner expects the fullest process to hold in this world."""
    found, parallel = lay_over(config, world.size), config.parallel
    layout = Layout(
        replicate=found.replicate,
        shard=found.shard,
        context=found.context,
        expert=found.expert,
        microbatch_rows=config.train.microbatch_rows,
        remat=parallel.remat,
        precision=parallel.precision,
    )
    return rank_memory(config, layout, in_host_memory=world.device.type == "cpu")


def available_bytes(device: torch.device) -> int | None:
    """Free memory for one process: of its GPU, or its share of the machine's within the limits of its container.

    None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    free = min([free, *_left_by_container()])
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _left_by_container(root: Path = _CGROUP) -> list[int]:
    """Bytes up to each limit that control groups set; none where there is none."""
    found = []
    for limit, used in _LIMITS:
        try:
            found.append(int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return [max(0, left) for left in found]
