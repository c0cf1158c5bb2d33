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
    1: {
        "compile": ["parallel.compile=true"],
        "remat, compile": ["parallel.remat=block", "parallel.compile=true"],
    },
    2: {
        "fsdp 2": ["parallel.shard=2"],
        "hsdp 2 x 1": ["parallel.replicate=2", "parallel.shard=1"],
        "ep 2": ["parallel.expert=2"],
        "cp 2": ["parallel.context=2"],
        "cp 2, ep 2": ["parallel.context=2", "parallel.expert=2"],
        "ep 2, remat": ["parallel.expert=2", "parallel.remat=block"],
        "fsdp 2, compile": ["parallel.shard=2", "parallel.compile=true"],
        "ep 2, remat, compile": ["parallel.expert=2", "parallel.remat=block", "parallel.compile=true"],
        "cp 2, remat, compile": ["parallel.context=2", "parallel.remat=block", "parallel.compile=true"],
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


def some(size: int, every_time: bool) -> list[str]:
    return [name for name in LAYOUTS[size] if (name in EVERY_TIME) == every_time]


@pytest.mark.parametrize(
    ("size", "names"),
    [
        pytest.param(2, some(2, True), id="2 processes"),
        pytest.param(4, some(4, True), id="4 processes"),
        pytest.param(1, some(1, False), id="1 process, the others", marks=pytest.mark.slow),
        pytest.param(2, some(2, False), id="2 processes, the others", marks=pytest.mark.slow),
        pytest.param(4, some(4, False), id="4 processes, the others", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(900)  # inductor takes its time
def test_layouts_learn_what_one_process_learns(size: int, names: list[str], debug_data, tmp_path):
    """The processes of one size are started once for all their layouts."""
    torch.set_num_threads(1)
    alone = three_steps(small(), debug_data, World.alone())
    layouts = [LAYOUTS[size][name] for name in names]
    in_processes(size, write_steps, debug_data, tmp_path, layouts, [free_port() for _ in layouts], seconds=800)
    for name, settings in zip(names, layouts, strict=True):
        compare(name, torch.load(tmp_path / f"{'_'.join(settings)}.pt", weights_only=True), alone)


def compare(name: str, found: dict, alone: dict) -> None:
    for step in range(STEPS):
        assert torch.equal(found["counts"][step], alone["counts"][step]), f"{name}: counts of step {step + 1}"
        expected = pytest.approx(alone["measured"][step], rel=FIGURE, abs=ABSOLUTE)
        assert found["measured"][step] == expected, f"{name}: figures of step {step + 1}"
    gradients = {key: difference(value, alone["gradients"][key]) for key, value in found["gradients"].items()}
    weights = {key: difference(value, alone["weights"][key]) for key, value in found["weights"].items()}
    worst = max(gradients, key=gradients.__getitem__), max(weights, key=weights.__getitem__)
    print(f"{name}: gradients {gradients[worst[0]]:.1e} ({worst[0]}), weights {weights[worst[1]]:.1e} ({worst[1]})")
    assert gradients[worst[0]] < GRADIENT, f"{name}: {worst[0]}"
    assert weights[worst[1]] < WEIGHT, f"{name}: {worst[1]}"


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))
