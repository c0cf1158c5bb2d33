"""Rows to experts and heads to positions, over real processes: equal to one device in values and gradients.

The cases are those that break such code: experts without rows, a process that receives none, windows that reach over
several processes, fewer key heads than processes.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from worlds import in_processes

from trinity.model.attend import Packed
from trinity.model.dispatch import locally
from trinity.model.experts import Experts
from trinity.model.router import Routing
from trinity.parallel.context import ContextParallel
from trinity.parallel.expert import ExpertParallel
from trinity.recipes.table import recipe

MODEL = replace(recipe("debug").model, num_experts=8, num_experts_per_tok=2)
TOKENS = 24
CHOICES = {
    "even": lambda rank: torch.arange(TOKENS * 2).view(TOKENS, 2) % 8,
    "one expert has all": lambda rank: torch.tensor([[5, 5]]).expand(TOKENS, 2),
    "one process receives none": lambda rank: torch.randint(0, 4, (TOKENS, 2)),
    "experts without rows": lambda rank: torch.tensor([[0, 7]]).expand(TOKENS, 2),
    "processes choose differently": lambda rank: torch.randint(4 * rank % 8, 4 * rank % 8 + 4, (TOKENS, 2)),
    "at random": lambda rank: torch.randint(0, 8, (TOKENS, 2)),
}


def compare_experts() -> None:
    """In one process: its rows through experts that are spread, against all experts here."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = Experts(MODEL)
    torch.nn.init.normal_(whole.gate_up_proj, std=0.1)
    torch.nn.init.normal_(whole.down_proj, std=0.1)
    own = Experts(replace(MODEL, num_experts=8 // size))
    for name, parameter in whole.named_parameters():
        own.get_parameter(name).data = parameter.detach().chunk(size)[rank].clone()
    dispatch = ExpertParallel(dist.group.WORLD)
    for case, (name, choose) in enumerate(CHOICES.items()):
        torch.manual_seed(100 * case + rank)
        x = torch.randn(TOKENS, MODEL.hidden_size)
        chosen, scores = choose(rank), torch.rand(TOKENS, 8)
        results = []
        for experts, way in ((whole, locally), (own, dispatch)):
            inputs, weights = x.clone().requires_grad_(), torch.full((TOKENS, 2), 0.7).requires_grad_()
            out = way(experts, inputs, Routing(chosen, weights, scores))
            experts.zero_grad()
            out.square().sum().backward()
            results.append((out, inputs.grad, weights.grad))
        for ours, theirs in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
        for parameter, mine in zip(whole.parameters(), own.parameters(), strict=True):
            assert parameter.grad is not None and mine.grad is not None
            dist.all_reduce(parameter.grad)  # every process's rows reach the one owner of an expert
            torch.testing.assert_close(mine.grad, parameter.grad.chunk(size)[rank], rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()


def compare_attention() -> None:
    """In one process: its stretch of rows against attention over the whole rows."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    length = 48
    here = slice(rank * length // size, (rank + 1) * length // size)
    for seed, (window, key_heads) in enumerate(
        [(None, 4), (None, 2), (None, 1), (1, 2), (2, 2), (12, 2), (13, 1), (30, 2), (48, 4), (500, 2)]
    ):
        torch.manual_seed(seed)
        documents = (torch.rand(2, length) < 0.1).long().cumsum(-1)
        whole = [torch.randn(2, heads, length, 8, requires_grad=True) for heads in (4, key_heads, key_heads)]
        weight = torch.randn(2, 4, length, 8)
        expected = Packed(documents)(0, *whole, window)
        (expected * weight).sum().backward()
        parts = [x.detach()[:, :, here].clone().requires_grad_() for x in whole]
        found = ContextParallel(documents, dist.group.WORLD)(0, *parts, window)
        (found * weight[:, :, here]).sum().backward()
        torch.testing.assert_close(found, expected[:, :, here], rtol=1e-5, atol=1e-5)
        for part, x in zip(parts, whole, strict=True):
            assert part.grad is not None and x.grad is not None
            torch.testing.assert_close(part.grad, x.grad[:, :, here], rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_experts_over_processes_equal_experts_here(size):
    in_processes(size, compare_experts)


@pytest.mark.parametrize("size", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_attention_over_processes_equals_attention_here(size):
    in_processes(size, compare_attention)
