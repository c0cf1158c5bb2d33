"""Muon and AdamW against torch's own, and the schedule's shape."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trinity.config.optim import OptimConfig
from trinity.model.init import build_model
from trinity.optim.groups import build_optimisers
from trinity.optim.muon import Muon
from trinity.optim.orthogonalise import orthogonalise
from trinity.optim.schedule import falling, rate_factor, rewarmed_factor
from trinity.recipes.table import recipe

SHAPES = [(24, 16), (16, 24), (16, 16), (8, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_equals_torch_muon_on_plain_matrices(shape, monkeypatch):
    """torch iterates in bfloat16; lifted to float32 for the test, the two agree to float32 rounding."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    muon = Muon([ours], lr=0.1, momentum=0.9, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.1, adjust_lr_fn="original")
    for step in range(5):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step()
        reference.step()
    assert (ours - theirs).detach().norm() / (theirs - start).detach().norm() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_is_torch_muon_within_bfloat16_rounding(shape, dtype):
    torch.manual_seed(1)
    start, gradient = torch.randn(shape), torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    Muon([ours], lr=0.1, momentum=0.95, weight_decay=0.0, dtype=dtype).step()
    torch.optim.Muon([theirs], lr=0.1, momentum=0.95, weight_decay=0.0, adjust_lr_fn="original").step()
    assert (ours - theirs).detach().norm() / (theirs - start).detach().norm() < 0.05


def test_a_stack_of_experts_moves_like_its_matrices_one_by_one():
    torch.manual_seed(2)
    stack = torch.nn.Parameter(torch.randn(5, 2, 12, 20))
    singles = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach().flatten(0, 1)]
    together, apart = Muon([stack], lr=0.05), Muon(singles, lr=0.05)
    for _ in range(3):
        stack.grad = torch.randn_like(stack)
        for single, gradient in zip(singles, stack.grad.flatten(0, 1), strict=True):
            single.grad = gradient.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(
        stack.detach().flatten(0, 1), torch.stack([s.detach() for s in singles]), rtol=1e-5, atol=1e-6
    )


def test_slicing_a_large_stack_changes_nothing(monkeypatch):
    def moved() -> torch.Tensor:
        stack = torch.nn.Parameter(torch.randn(7, 3, 8, 10, generator=torch.Generator().manual_seed(0)))
        muon = Muon([stack], lr=0.05, weight_decay=0.1)
        for seed in range(3):
            stack.grad = torch.randn(stack.shape, generator=torch.Generator().manual_seed(seed))
            muon.step()
        return stack.detach()

    whole = moved()
    monkeypatch.setattr("trinity.optim.muon._BATCH_VALUES", 400)  # five matrices of eighty values at once
    torch.testing.assert_close(moved(), whole, rtol=1e-5, atol=1e-6)


def test_the_largest_batch_is_bounded(monkeypatch):
    from trinity.optim import muon as module

    sizes = []
    original = module.orthogonalise
    monkeypatch.setattr(module, "_BATCH_VALUES", 400)
    monkeypatch.setattr(module, "orthogonalise", lambda m, *rest: sizes.append(m.numel()) or original(m, *rest))
    parameters = [torch.nn.Parameter(torch.randn(9, 8, 10)), torch.nn.Parameter(torch.randn(8, 10))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    Muon(parameters, lr=0.1).step()
    assert sizes == [400, 400], "720 + 80 values in two batches of at most 400"


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_singular_values_end_near_one(rows, columns, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    values = torch.linalg.svdvals(orthogonalise(matrix, steps=10))
    well_conditioned = torch.linalg.svdvals(matrix / matrix.norm())
    kept = values[well_conditioned > 0.05]
    assert ((kept > 0.5) & (kept < 1.5)).all()


def test_a_zero_gradient_moves_nothing():
    parameter = torch.nn.Parameter(torch.ones(4, 8))
    parameter.grad = torch.zeros(4, 8)
    Muon([parameter], lr=1.0).step()
    assert torch.equal(parameter.detach(), torch.ones(4, 8))


def test_every_parameter_has_one_optimiser_and_adamw_is_torchs():
    model = build_model(recipe("debug").model, seed=0)
    optimisers = build_optimisers(model, OptimConfig())
    held = [p for o in (optimisers.muon, optimisers.adamw) for g in o.param_groups for p in g["params"]]
    assert len(held) == len(set(map(id, held))) == len(list(model.parameters()))
    assert type(optimisers.adamw) is torch.optim.AdamW
    assert model.layers[1].mlp.router.gate.weight.data_ptr() in {
        p.data_ptr() for p in optimisers.adamw.param_groups[0]["params"]
    }


def test_an_unknown_parameter_is_refused():
    with pytest.raises(AssertionError, match="no optimiser is named"):
        build_optimisers(torch.nn.ModuleDict({"odd": torch.nn.Linear(2, 2)}), OptimConfig())


def test_the_schedule_warms_holds_and_falls():
    config = OptimConfig(warmup_tokens=100, decay_tokens=200, final_lr_fraction=0.1)
    points = [rate_factor(t, 1000, config) for t in (0, 50, 100, 500, 800, 900, 1000, 1100)]
    assert points == pytest.approx([0, 0.5, 1, 1, 1, 0.55, 0.1, 0.1])
    cosine = OptimConfig(decay_tokens=200, decay="cosine", final_lr_fraction=0.1)
    assert rate_factor(850, 1000, cosine) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + 2**-0.5))


def test_a_second_leg_rises_from_zero_and_returns_to_it():
    assert [rewarmed_factor(p, 0.1, 0.5) for p in (0, 0.05, 0.1, 0.55, 1)] == pytest.approx([0, 0.25, 0.5, 0.25, 0])


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(["linear", "cosine"]))
def test_a_fall_never_rises(a, b, shape):
    low, high = sorted((a, b))
    assert falling(low, 1.0, 0.1, shape) >= falling(high, 1.0, 0.1, shape) - 1e-12
