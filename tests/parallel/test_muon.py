"""Muon over sharded matrices equals Muon on one device to the bit, uneven cuts and empty shares included."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))

from steps import small
from worlds import in_processes

from trinity.model.init import build_model
from trinity.optim.groups import build_optimisers
from trinity.parallel.apply import build_parallel, local_part
from trinity.parallel.mesh import joined_world
from trinity.parallel.muon import Owners
from trinity.plan.dealing import deal, rows_of

SHAPES = st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), max_size=20)


@given(SHAPES, st.integers(1, 8))
def test_every_matrix_has_one_owner(shapes, size):
    owned = deal(shapes, size)
    assert len(owned) == size
    assert sorted(index for indices in owned for index in indices) == list(range(len(shapes)))


@given(st.integers(1, 100), st.integers(1, 12))
def test_rows_are_cut_as_torch_cuts_them(rows, size):
    chunks = [len(chunk) for chunk in torch.empty(rows, 1).chunk(size)]
    assert [rows_of(rows, size, rank) for rank in range(size)] == chunks + [0] * (size - len(chunks))


def gradient(name: str, shape: torch.Size, step: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name)) + step))


def compare_updates(settings: list[str]) -> None:
    """In one process of a world: three updates, and this process's part is that of the whole model's, to the bit."""
    config = small("train.batch_tokens=1536", *settings)
    plain = build_model(config.model, 0)
    ours = build_optimisers(plain, config.optim)
    with joined_world(config) as world:
        assert world.dense is not None
        model = build_parallel(config.model, config.parallel, world, 0)
        theirs = build_optimisers(model, config.optim, Owners(world.dense["fsdp"].get_group()))
        whole = dict(plain.named_parameters())
        for step in range(3):
            for name, parameter in model.named_parameters():
                assert isinstance(parameter, DTensor)
                whole[name].grad = gradient(name, whole[name].shape, step)
                part, first = local_part(parameter)
                own = whole[name].grad[first : first + len(part)].clone()
                parameter.grad = DTensor.from_local(
                    own, parameter.device_mesh, parameter.placements, run_check=False,
                    shape=parameter.shape, stride=parameter.stride(),
                )  # fmt: skip
            ours.step()
            theirs.step()
        for name, parameter in model.named_parameters():
            part, first = local_part(parameter)
            expected = whole[name][first : first + len(part)]
            if name.endswith("norm.weight"):  # AdamW's vectorised kernel rounds the odd values at the end otherwise
                torch.testing.assert_close(part, expected, rtol=1e-6, atol=0)
            else:
                assert torch.equal(part, expected), name


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (3, ["parallel.shard=3"]),
        (2, ["parallel.expert=2"]),
        pytest.param(4, ["parallel.replicate=2", "parallel.context=2", "parallel.expert=2"], marks=pytest.mark.slow),
    ],
    ids=["fsdp 3", "ep 2", "hsdp 2 x 1, cp 2, ep 2"],
)
def test_updates_are_those_of_one_device(size, settings):
    in_processes(size, compare_updates, settings)
