"""Three training steps of one small run under any layout, and what they come to: what the equivalence tests compare."""

import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from trinity.config.load import override
from trinity.config.run import RunConfig
from trinity.data.loader import Loader
from trinity.parallel.mesh import World, joined_world
from trinity.recipes.table import recipe
from trinity.train.loop import next_microbatches
from trinity.train.state import TrainState
from trinity.train.step import accumulate, apply_update, learning_rates

# Four microbatches a step; a window longer than a quarter of a row, so that four context ranks reach over two others.
SMALL = ["train.microbatch_rows=2", "train.batch_tokens=1024", "model.sliding_window=48", "optim.clip_norm=0.5",
         "balance.sequence_loss=0.01", "balance.z_loss=0.001", "optim.adamw_weight_decay=0.1",
         "optim.warmup_tokens=1024"]  # fmt: skip
STEPS = 3


def three_steps(config: RunConfig, data: Path, world: World) -> dict[str, Any]:
    """Losses, norms and counts of each step, gradients of the first, and the weights after the last, all whole."""
    state = TrainState.fresh(config, Loader(data, config.data, config.train.seed), world)
    found: dict[str, Any] = {"measured": [], "counts": [], "gradients": {}}
    for _ in range(STEPS):
        measured = accumulate(state, next_microbatches(state.loader, config.phase_at(state.tokens), world), config)
        if not found["gradients"]:
            found["gradients"] = {name: whole(p.grad).clone() for name, p in state.model.named_parameters()}
        state.tokens += config.train.batch_tokens
        apply_update(state, measured, config, learning_rates(state.tokens, config))
        found["measured"].append(list(measured[:5]))
        found["counts"].append(measured.counts)
    found["weights"] = {name: whole(tensor) for name, tensor in state.model.state_dict().items()}
    return found


def whole(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def small(*settings: str) -> RunConfig:
    return override(recipe("debug"), [*SMALL, *settings])


def write_steps(data: Path, out: Path, layouts: list[list[str]], ports: list[int]) -> None:
    """Run each layout in a world of its own; the first process leaves the results in `out`."""
    for settings, port in zip(layouts, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)  # a port serves one process group
        config = small(*settings)
        with joined_world(config) as world:
            found = three_steps(config, data, world)
            if world.is_first:
                torch.save(found, out / f"{'_'.join(settings)}.pt")
