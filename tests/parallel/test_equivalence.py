"""One process = FSDP = HSDP = expert parallel = context parallel = their combinations, on real processes over gloo.

Counts of tokens sent to experts are equal to the last token. Losses, gradients and weights agree to the tolerances
below, which leave room for sums in another order and nothing else; docs/guides/parallelism.md shows them as a table.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from steps import STEPS, small, three_steps, write_steps
from worlds import free_port, in_processes

from trinity.parallel.mesh import World

FIGURE, ABSOLUTE, GRADIENT, WEIGHT = 1e-5, 2e-6, 5e-6, 1e-5  # relative, nats, relative, relative after three steps

LAYOUTS = {
    2: {
        "fsdp 2": ["parallel.shard=2"],
        "hsdp 2 x 1": ["parallel.replicate=2", "parallel.shard=1"],
        "ep 2": ["parallel.expert=2"],
        "cp 2": ["parallel.context=2"],
        "cp 2, ep 2": ["parallel.context=2", "parallel.expert=2"],
        "ep 2, remat": ["parallel.expert=2", "parallel.remat=block"],
    },
    4: {
        "fsdp 4": ["parallel.shard=4"],
        "hsdp 2 x 2": ["parallel.replicate=2"],
        "fsdp 4, ep 2": ["parallel.expert=2"],
        "fsdp 4, ep 4": ["parallel.expert=4"],
        "hsdp 2 x 2, ep 2": ["parallel.replicate=2", "parallel.expert=2"],
        "fsdp 2, cp 2": ["parallel.context=2"],
        "cp 4": ["parallel.context=4"],
        "hsdp 2 x 1, cp 2, ep 2, remat": [
            "parallel.replicate=2", "parallel.context=2", "parallel.expert=2", "parallel.remat=block",
        ],
        "fsdp 2, cp 2, ep 4": ["parallel.context=2", "parallel.expert=4"],
    },
}  # fmt: skip
EVERY_TIME = {"fsdp 2", "ep 2", "cp 2", "ep 2, remat", "cp 4", "hsdp 2 x 1, cp 2, ep 2, remat"}  # the others are slow
CASES = [
    pytest.param((size, name), id=f"{size} processes, {name}", marks=() if name in EVERY_TIME else pytest.mark.slow)
    for size, layouts in LAYOUTS.items()
    for name in layouts
]


@pytest.fixture(scope="module")
def alone(debug_data):
    torch.set_num_threads(1)
    return three_steps(small(), debug_data, World.alone())


@pytest.fixture(scope="module")
def spread(request, debug_data, tmp_path_factory):
    """Results of the layouts that this run of the tests asks for: the processes of one size are started once."""
    wanted = {item.callspec.params["case"] for item in request.session.items if item.path == request.path}
    out = tmp_path_factory.mktemp("steps")
    for size, layouts in LAYOUTS.items():
        chosen = [settings for name, settings in layouts.items() if (size, name) in wanted]
        in_processes(size, write_steps, debug_data, out, chosen, [free_port() for _ in chosen])
    return {(size, name): _read(out, LAYOUTS[size][name]) for size, name in wanted}


def _read(out: Path, settings: list[str]):
    return torch.load(out / f"{'_'.join(settings)}.pt", weights_only=True)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


@pytest.mark.parametrize("case", CASES)
def test_a_layout_learns_what_one_process_learns(case, alone, spread):
    found = spread[case]
    for step in range(STEPS):
        assert torch.equal(found["counts"][step], alone["counts"][step]), f"counts of step {step + 1}"
        assert found["measured"][step] == pytest.approx(alone["measured"][step], rel=FIGURE, abs=ABSOLUTE)
    gradients = {name: difference(g, alone["gradients"][name]) for name, g in found["gradients"].items()}
    weights = {name: difference(w, alone["weights"][name]) for name, w in found["weights"].items()}
    worst = max(gradients, key=gradients.__getitem__), max(weights, key=weights.__getitem__)
    print(f"{case[1]}: gradients {gradients[worst[0]]:.1e} ({worst[0]}), weights {weights[worst[1]]:.1e} ({worst[1]})")
    assert gradients[worst[0]] < GRADIENT, worst[0]
    assert weights[worst[1]] < WEIGHT, worst[1]
