"""torch.compile of attention and dense layers: the same figures to rounding."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from steps import small, three_steps, write_steps
from worlds import free_port, in_processes

from trinity.parallel.mesh import World


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # dynamo and inductor warn of themselves
def test_compiled_layers_learn_the_same(debug_data):
    plain = three_steps(small(), debug_data, World.alone())
    compiled = three_steps(small("parallel.compile=true"), debug_data, World.alone())
    for ours, theirs in zip(compiled["measured"], plain["measured"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(compiled["counts"], plain["counts"], strict=True))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_layers_learn_the_same_when_sharded(debug_data, tmp_path):
    layout = ["parallel.compile=true", "parallel.shard=2"]
    in_processes(2, write_steps, debug_data, tmp_path, [layout], [free_port()], seconds=500)
    plain = three_steps(small(), debug_data, World.alone())
    compiled = torch.load(tmp_path / f"{'_'.join(layout)}.pt", weights_only=True)
    for ours, theirs in zip(compiled["measured"], plain["measured"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(compiled["counts"], plain["counts"], strict=True))
