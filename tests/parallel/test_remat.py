"""Recomputation in backward: equal to the bit, less memory kept, and no token counted twice."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from steps import small, three_steps

from trinity.data.loader import Loader
from trinity.parallel.mesh import World
from trinity.train.loop import next_microbatches
from trinity.train.state import TrainState


def test_it_changes_no_bit_and_counts_nothing_twice(debug_data):
    kept = three_steps(small(), debug_data, World.alone())
    again = three_steps(small("parallel.remat=block"), debug_data, World.alone())
    assert again["measured"] == kept["measured"]
    assert all(torch.equal(a, b) for a, b in zip(again["counts"], kept["counts"], strict=True))
    assert all(torch.equal(again["weights"][name], weight) for name, weight in kept["weights"].items())


def test_it_keeps_less(debug_data):
    assert _kept_bytes(debug_data, "parallel.remat=block") < _kept_bytes(debug_data, "parallel.remat=none") / 3


def _kept_bytes(data: Path, setting: str) -> int:
    """Bytes of distinct storages that a forward pass keeps for backward, weights aside."""
    config = small(setting)
    state = TrainState.fresh(config, Loader(data, config.data, 0))
    (batch, *_) = next_microbatches(state.loader, config.course[0], state.world)
    weights = {parameter.untyped_storage().data_ptr() for parameter in state.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = state.model(batch.tokens)
    assert output.hidden.requires_grad
    return sum(kept.values())
