"""Layouts: which process does what, and the mistakes that are refused before anything runs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trinity.base.errors import ConfigError
from trinity.config.load import override
from trinity.config.parallel import ParallelConfig
from trinity.config.phases import PhaseConfig
from trinity.parallel.mesh import World, device_of, joined_world, layout, misfits
from trinity.recipes.table import recipe

LARGE = recipe("large")


def laid_out(size: int, **parallel):
    return layout(replace(LARGE, parallel=ParallelConfig(**parallel)), size)


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 8, 16]), st.sampled_from([1, 2, 4]), st.data())
def test_every_process_has_one_place(replicate, shard, context, data):
    fsdp = shard * context
    expert = data.draw(st.sampled_from([n for n in (1, 2, 4, 8, 16) if fsdp % n == 0]))
    found = laid_out(replicate * fsdp, replicate=replicate, context=context, expert=expert)
    assert found.shard == shard, "0 takes the processes that are left"
    assert found.replicate * found.shard * found.context == found.replicate * found.expert_shard * found.expert


def test_the_published_layout_of_large_fits():
    found = laid_out(2048, replicate=16, shard=128, expert=8)
    assert found == (16, 128, 1, 8, 16)
    (misfit,) = misfits(LARGE, World(rank=0, size=2048, device=torch.device("cpu"), data_size=2048))
    assert "phase 'extension' has 512 rows; 2048 processes" in misfit, "longer rows need another layout, said at once"
    assert laid_out(2048, replicate=4, context=4, expert=8) == (4, 128, 4, 8, 64)
    assert not misfits(LARGE, World(rank=0, size=2048, device=torch.device("cpu"), data_size=512, context_size=4))


@pytest.mark.parametrize(
    ("size", "parallel", "told"),
    [
        (6, {"replicate": 4}, "6 processes cannot be laid out as 4 replicas"),
        (8, {"shard": 3}, "8 processes cannot be laid out as 1 replicas x 3 shards"),
        (6, {"expert": 4}, "Expert parallelism over 4 processes does not divide the 6"),
        (3, {"expert": 3}, "256 experts cannot be spread evenly over 3"),
        (5, {"context": 5}, "48 query heads cannot be split over 5 context ranks"),
        (2**15, {}, "32768 processes cannot share them evenly"),
    ],
)
def test_numbers_that_do_not_divide_are_named(size, parallel, told):
    with pytest.raises(ConfigError, match=told) as caught:
        laid_out(size, **parallel)
    assert caught.value.remedy


def test_rows_that_do_not_cut_evenly_are_refused():
    config = override(recipe("debug"), ["parallel.context=4", "data.sequence_length=126", "train.batch_tokens=1008"])
    with pytest.raises(ConfigError, match="126 tokens .* cannot be cut evenly for 4"):
        layout(config, 4)


RAMP = replace(
    override(recipe("debug"), ["train.batch_tokens=128", "train.microbatch_rows=1"]),
    phases=(
        PhaseConfig(name="wide", from_tokens=512, batch_tokens=512),
        PhaseConfig(name="odd", from_tokens=2048, batch_tokens=384),
    ),
)


def test_rows_are_those_of_the_phase_that_a_resumed_run_is_in():
    """One row a step, then four, then three, on two processes."""
    world = World(rank=0, size=2, device=torch.device("cpu"), data_size=2)
    with pytest.raises(ConfigError, match="phase 'pretraining' has 1 rows; 2 processes"):
        layout(RAMP, 2, 511)
    assert layout(RAMP, 2, 512).shard == 2
    (misfit,) = misfits(RAMP, world, 512)
    assert "phase 'odd' has 3 rows" in misfit, "what lies behind is not told of"
    with pytest.raises(ConfigError, match="phase 'odd' has 3 rows; 2 processes"):
        layout(RAMP, 2, 2048)
    assert not misfits(RAMP, world, 2048)
    assert layout(RAMP, 2, RAMP.horizon).shard == 2, "a complete run reads no more rows"


def test_one_process_needs_no_process_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined_world(recipe("debug")) as world:
        assert world == World.alone() and world.is_first and world.expert_size == 1


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device_of(ParallelConfig()).type == "cpu"
    with pytest.raises(ConfigError, match="no GPU"):
        device_of(ParallelConfig(device="cuda"))


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of(ParallelConfig()).index == 3
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ConfigError, match="4 GPUs, none for the process with LOCAL_RANK 4") as caught:
        device_of(ParallelConfig())
    assert "at most 4 processes" in caught.value.remedy


@pytest.mark.parametrize(("name", "size"), [("nano", 8), ("mini", 64), ("large", 256), ("large", 2048)])
def test_the_published_recipes_are_for_gpus_and_their_layout_fits_clusters_of_any_size(name, size):
    """Without it `train large` would be a run in float32."""
    config = recipe(name)
    assert (config.parallel.precision, config.parallel.remat) == ("bfloat16", "block")
    assert layout(config, size).expert == config.parallel.expert == (8 if name == "large" else 1)
