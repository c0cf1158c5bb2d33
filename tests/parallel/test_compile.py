"""torch.compile of attention's two parts and of dense layers: what is compiled, and that it goes with all the rest.

That layouts with it learn what one process learns is a matter of test_equivalence.py.
"""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from steps import small, three_steps, write_steps
from torch.testing import assert_close
from worlds import free_port, in_processes

from trinity.config.parallel import ParallelConfig
from trinity.model.attend import Packed
from trinity.parallel.apply import build_parallel
from trinity.parallel.mesh import World

COMPILED = ParallelConfig(compile=True, remat="block")


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")  # dynamo warns of itself
def test_a_compiled_block_is_computed_again(tiny_config, monkeypatch):
    """Documents of another number in every batch, as rows hold them; masks and starts are made on the way."""
    plain = build_parallel(tiny_config, ParallelConfig(), World.alone(), seed=0)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled = build_parallel(tiny_config, COMPILED, World.alone(), seed=0)
    tokens = torch.randint(0, tiny_config.vocab_size, (2, 40))
    for documents in (1, 3):
        ids = (torch.arange(40) * documents // 40).expand(2, -1)
        for model in (plain, compiled):
            model(tokens, attend=Packed(ids)).hidden.square().sum().backward()
    for (name, ours), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore")
def test_training_is_compiled_after_evaluations_of_any_length(tiny_config, monkeypatch):
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    model = build_parallel(tiny_config, COMPILED, World.alone(), seed=0)
    with torch.no_grad():
        for length in range(10, 30):
            model(torch.zeros(1, length, dtype=torch.int64))
    assert not graphs
    for _ in range(2):
        model(torch.zeros(2, 40, dtype=torch.int64)).hidden.sum().backward()
    assert len(graphs) == 5, "heads of both kinds of layer, what follows them, and dense layers of two shapes"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_in_bfloat16_layouts_learn_what_float32_learns_to_rounding(debug_data, tmp_path):
    both = ["parallel.precision=bfloat16", "parallel.remat=block", "parallel.compile=true"]
    layouts = [[*both, "parallel.expert=2"], [*both, "parallel.context=2"]]
    in_processes(1, write_steps, debug_data, tmp_path, [both], [free_port()], seconds=500)
    in_processes(2, write_steps, debug_data, tmp_path, layouts, [free_port() for _ in layouts], seconds=500)
    exact = three_steps(small(), debug_data, World.alone())
    for layout in (both, *layouts):
        rounded = torch.load(tmp_path / f"{'_'.join(layout)}.pt", weights_only=True)
        for ours, theirs in zip(rounded["measured"], exact["measured"], strict=True):
            assert ours[0] == pytest.approx(theirs[0], rel=1e-3), layout
