"""Replicas decide alike to the bit, and one whose weights differ in a bit is told of on every process."""

import math
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from steps import small
from worlds import in_processes

from trinity.base.run import read_lines
from trinity.data.loader import Loader
from trinity.parallel.apply import build_parallel
from trinity.parallel.mesh import World, joined_world
from trinity.parallel.replicas import differing_shards
from trinity.train import loop
from trinity.train.state import TrainState
from trinity.train.step import _clip

TWO = ["parallel.replicate=2", "train.tokens=4K", "train.save_every_tokens=2048", "train.evaluate_bytes=0",
       "train.sample_tokens=0", "optim.decay_tokens=1K"]  # fmt: skip


def decide_alike(data: Path, out: Path) -> None:
    config = small(*TWO)
    with joined_world(config) as world:
        own, largest = (torch.tensor([3.0, 4.0 * (1 + times * 2**-20)]) for times in (world.rank, 1))
        gradient = own.clone()
        norm = _clip([gradient], 1.0, world)
        assert norm == float(largest.norm().double().square().sqrt()) > 5.0, norm
        assert torch.equal(gradient, own * (1.0 / (norm + 1e-6)))
        broken = torch.tensor([math.nan if world.rank == 1 else 1.0])
        assert not math.isfinite(_clip([broken], 1.0, world))

        state = TrainState.fresh(config, Loader(data, config.data, 0), world)
        assert differing_shards(state.model, world) == []
        weight: Any = state.model.get_parameter("layers.1.self_attn.q_proj.weight")
        if world.rank == 1:
            with torch.no_grad():
                weight.to_local().view(torch.int32)[5, 7] ^= 1
        assert differing_shards(state.model, world) == [0]


def drift_apart(data: Path, out: Path) -> None:
    config = small(*TWO)
    original, calls = loop.apply_update, []

    def apply_update(state, *arguments):
        original(state, *arguments)
        calls.append(1)
        if len(calls) == 3 and state.world.rank == 1:
            with torch.no_grad():
                norm: Any = state.model.norm.weight
                norm.to_local()[0] += 1e-6

    loop.apply_update = apply_update
    with joined_world(config) as world:
        said: list[str] = []
        loop.train(config, data, out, said.append, lambda _: None, world)
        assert [sentence for sentence in said if "replicas differ" in sentence], said


def test_two_replicas_scale_by_the_same_norm_and_one_flipped_bit_is_found(debug_data, tmp_path):
    in_processes(2, decide_alike, debug_data, tmp_path)


def test_a_run_whose_replicas_drift_apart_alarms_at_the_next_save(debug_data, tmp_path):
    in_processes(2, drift_apart, debug_data, tmp_path / "run")
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "guard"]
    assert [(line["step"], line["trouble"], line["action"], line["shards"]) for line in lines] == [
        (4, "replicas", "alarm", [0])
    ]


def test_one_process_has_nothing_to_compare():
    config = small()
    model = build_parallel(config.model, config.parallel, World.alone(), 0)
    assert differing_shards(model, World.alone()) == []
