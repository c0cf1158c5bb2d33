"""bfloat16 runs: what is computed in it, and what stays float32 in every mode."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from steps import small, three_steps, write_steps
from worlds import free_port, in_processes

from trinity.base.errors import ConfigError
from trinity.data.loader import Loader
from trinity.model.layers import RMSNorm
from trinity.model.router import Router
from trinity.parallel.mesh import World, joined_world
from trinity.train.calibrate import tokens_per_second
from trinity.train.loop import next_microbatches, train
from trinity.train.state import TrainState
from trinity.train.step import accumulate

BFLOAT16 = small("parallel.precision=bfloat16")


def test_router_norms_and_masters_stay_float32(debug_data):
    with joined_world(BFLOAT16) as world:
        state = TrainState.fresh(BFLOAT16, Loader(debug_data, BFLOAT16.data, 0), world)
        assert {parameter.dtype for parameter in state.model.parameters()} == {torch.float32}, "master weights"
        seen: dict[str, set[torch.dtype]] = {}

        def record(module, *_):
            weight = module.gate.weight if isinstance(module, Router) else module.weight
            seen.setdefault(type(module).__name__, set()).add(weight.dtype)

        for module in state.model.modules():
            if isinstance(module, Router | RMSNorm) or module is state.model.layers[0].self_attn.q_proj:
                module.register_forward_hook(record)
        accumulate(state, next_microbatches(state.loader, BFLOAT16.course[0], world), BFLOAT16)
        name = next(name for name in seen if name.endswith("Linear"))
        assert seen["FSDPRouter"] == seen["FSDPRMSNorm"] == {torch.float32}
        assert seen[name] == {torch.bfloat16}
        assert {p.grad.dtype for p in state.model.parameters() if p.grad is not None} == {torch.float32}
        assert {bias.dtype for bias in state.model.expert_biases()} == {torch.float32}


def test_a_run_that_is_handed_no_world_opens_one_of_that_precision(debug_data, tmp_path: Path, monkeypatch):
    """Without a mesh nothing is cast: the run would say bfloat16 and compute in float32."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    brief = small("parallel.precision=bfloat16", "train.tokens=1024", "optim.decay_tokens=0", "train.evaluate_bytes=0")
    state = train(brief, debug_data, tmp_path / "run", lambda _: None, lambda _: None)
    assert state.step == 1 and state.world.dense is not None
    worlds = []
    fresh = TrainState.fresh
    monkeypatch.setattr(TrainState, "fresh", lambda *given: worlds.append(given[-1]) or fresh(*given))
    assert tokens_per_second(brief, debug_data) > 0 and worlds[0].dense is not None
    with pytest.raises(ConfigError, match="parallel.precision=bfloat16 needs") as caught:
        fresh(brief, Loader(debug_data, brief.data, 0))
    assert "joined_world" in caught.value.remedy


def test_it_learns_what_float32_learns_to_rounding(debug_data):
    exact = three_steps(small(), debug_data, World.alone())
    with joined_world(BFLOAT16) as world:
        rounded = three_steps(BFLOAT16, debug_data, world)
    for ours, theirs in zip(rounded["measured"], exact["measured"], strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=0.01)
        assert ours[0] != theirs[0], "and it is not float32"
    assert int(rounded["counts"][0].sum()) == int(exact["counts"][0].sum())


@pytest.mark.parametrize("spread", [
    ["parallel.context=2", "parallel.expert=2", "parallel.remat=block"],
    pytest.param(["parallel.expert=2"], marks=pytest.mark.slow),
    pytest.param(["parallel.context=2"], marks=pytest.mark.slow),
], ids=" ".join)  # fmt: skip
def test_spread_over_processes_it_learns_what_float32_learns_to_rounding(debug_data, tmp_path, spread):
    layout = ["parallel.precision=bfloat16", *spread]
    in_processes(2, write_steps, debug_data, tmp_path, [layout], [free_port()])
    exact = three_steps(small(), debug_data, World.alone())
    with joined_world(BFLOAT16) as world:
        one_process = three_steps(BFLOAT16, debug_data, world)["gradients"]
    rounded = torch.load(tmp_path / f"{'_'.join(layout)}.pt", weights_only=True)
    for ours, theirs in zip(rounded["measured"], exact["measured"], strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=0.01), layout
        assert ours[0] != theirs[0], "and it is not float32"
    assert int(rounded["counts"][0].sum()) == int(exact["counts"][0].sum())
    assert {tensor.dtype for tensor in rounded["weights"].values()} == {torch.float32}
    for name, gradient in exact["gradients"].items():
        error, usual = ((found - gradient).norm() / gradient.norm().clamp(min=1e-12)
                        for found in (rounded["gradients"][name], one_process[name]))  # fmt: skip
        assert error < 2 * usual + 0.01, (layout, name, "further from float32 than one process's rounding")
