"""Whether a run's part fits the memory of this process's device, said before anything is allocated.

Weights, gradients and moments are known to the byte: what cannot hold those is refused. Activations and scratch are
the planner's figures (plan/memory.py), right to some per cent: what falls short of them by a tenth is refused too. What
may fall short, with what the allocator keeps and the copy of a save, is warned of; so are later phases, each in the
shape of its own steps: what a run comes to after weeks should be known when it starts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trinity.base.errors import TakenError, TrinityError, out_of_memory
from trinity.base.units import show_bytes
from trinity.config.run import RunConfig
from trinity.kernels.heap import available_bytes
from trinity.parallel.mesh import World
from trinity.parallel.mesh import layout as lay_over
from trinity.plan.layout import Layout
from trinity.plan.memory import RankMemory, rank_memory
from trinity.plan.stages import stages

_CERTAIN = 1.1  # times the free memory: what a step needs beyond that it will not find
_REMEDY = (
    "Spread it over more processes (parallel.shard, parallel.expert), lower train.microbatch_rows, set "
    "parallel.remat=block or parallel.context, or take a smaller model; `trinity plan` finds what fits."
)
_LATER = (
    "Go on from there over more processes (parallel.shard, parallel.context) or with parallel.remat=block, or begin "
    "the run with fewer rows in its microbatches; `trinity plan` finds what fits."
)


def refuse_what_cannot_fit(
    config: RunConfig, world: World, say: Callable[[str], None], tokens: int = 0, available: int | None = None
) -> None:
    """A TakenError when this process's part of the state, or surely a step, exceeds `available` bytes; a sentence when
    a step may, now or in a later phase that takes more.

    tokens: what the run has behind it. available: free bytes of the device (default: looked up).
    """
    free = available_bytes(world.device) if available is None else available
    if free is None:
        return
    (_, now), *later = needed_by(config, world, tokens)
    # A save writes from a copy while the run goes on; on a CPU it lies in the same memory.
    copy = now.staging if world.device.type == "cpu" else 0
    state = now.weights + now.moments + max(now.gradients, copy)  # gradients are gone when the last step is saved
    step, most = now.peak - now.process - now.allocator, now.peak + copy
    there = f"{show_bytes(free)} are free on {world.device}"
    if state > free or step > _CERTAIN * free:
        raise TakenError(
            f"This run needs {show_bytes(state)} on each process for its state alone, and about {show_bytes(most)} at "
            f"the peak of a step ({_shown(now, copy)}); {there}.",
            _REMEDY,
        )
    if most - now.process > free:
        say(f"A step may need about {show_bytes(most)} on each process ({_shown(now, copy)}); {there}. {_REMEDY}")
    for name, then in later:
        peak = then.peak + copy
        if peak > most and peak - then.process > free:
            say(
                f"later: A step of phase '{name}' may need about {show_bytes(peak)} on each process (activations "
                f"{show_bytes(then.activations)}); {there}. {_LATER}"
            )
        most = max(most, peak)


@contextmanager
def explaining_memory(config: RunConfig, world: World) -> Iterator[None]:
    """Turn memory that runs out all the same, other programs having taken it, say, into a TrinityError with figures."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        what = out_of_memory(error)
        if what is None:
            raise
        (_, needed), free = needed_by(config, world)[0], available_bytes(world.device)
        raise TrinityError(
            f"{what} on {world.device} of process {world.rank}. A step may need about {show_bytes(needed.peak)} "
            f"({_shown(needed)})" + (f"; {show_bytes(free)} are free now." if free is not None else "."),
            f"{_REMEDY} The same command goes on from the last checkpoint.",
        ) from error


def _shown(needed: RankMemory, copy: int = 0) -> str:
    parts = {"weights": needed.weights, "moments": needed.moments, "gradients": needed.gradients,
             "copy for a checkpoint": copy, "activations": needed.activations}  # fmt: skip
    return ", ".join(f"{name} {show_bytes(size)}" for name, size in parts.items() if size)


def needed_by(config: RunConfig, world: World, tokens: int = 0) -> list[tuple[str, RankMemory]]:
    """What the planner expects the fullest process to hold in this world, in each stage (plan/stages.py) of a run that
    is not behind it: the present one first."""
    found, parallel = lay_over(config, world.size, tokens), config.parallel
    needed, end = [], 0
    for name, run in stages(config):
        end += run.train.tokens
        if min(tokens, config.horizon - 1) < end:
            layout = Layout(
                replicate=found.replicate,
                shard=found.shard,
                context=found.context,
                expert=found.expert,
                microbatch_rows=run.train.microbatch_rows,
                remat=parallel.remat,
                precision=parallel.precision,
            )
            needed.append((name, rank_memory(run, layout, in_host_memory=world.device.type == "cpu")))
    return needed
