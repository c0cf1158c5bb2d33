"""How fast this machine takes the steps of a recipe: what turns minutes into a horizon in tokens."""

import statistics
import time
from pathlib import Path

from trinity.config.run import RunConfig
from trinity.data.loader import Loader
from trinity.parallel.mesh import joined_world
from trinity.train.loop import next_microbatches
from trinity.train.state import TrainState
from trinity.train.step import accumulate, apply_update, learning_rates

_STEPS, _UNCOUNTED = 8, 2  # the first steps pay for allocations


def tokens_per_second(config: RunConfig, data: Path) -> float:
    """Median speed over a few steps of a throwaway run, loading and update included."""
    first = config.course[0]
    seconds = []
    with joined_world(config) as world:
        state = TrainState.fresh(config, Loader(data, config.data, config.train.seed), world)
        for _ in range(_STEPS):
            started = time.perf_counter()
            batches = next_microbatches(state.loader, first, state.world)
            measured = accumulate(state, batches, config)
            apply_update(state, measured, config, learning_rates(first.batch_tokens, config))
            seconds.append(time.perf_counter() - started)
    return first.batch_tokens / statistics.median(seconds[_UNCOUNTED:])
