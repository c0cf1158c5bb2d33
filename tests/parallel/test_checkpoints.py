"""Checkpoints of several processes: any layout reads any other's, and one process's trouble is everybody's."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from saving import (
    STEP,
    advance,
    disagree,
    equal,
    fail_behind,
    fail_on_one_rank,
    fresh,
    restore_under,
    save_under,
    small,
    stream,
    whole,
)
from worlds import free_port, in_processes

from trinity.base.errors import CheckpointError
from trinity.ckpt.folder import OPTIMIZER, newest_good, read_checkpoint, save_checkpoint
from trinity.parallel.mesh import World
from trinity.train.saver import Saver

FOUR = {
    "fsdp 4": [],
    "hsdp 2 x 2": ["parallel.replicate=2"],
    "fsdp 4, ep 2": ["parallel.expert=2"],
    "hsdp 2 x 2, ep 2": ["parallel.replicate=2", "parallel.expert=2"],
}
TWO = {"fsdp 2": [], "ep 2": ["parallel.expert=2"], "hsdp 2 x 1": ["parallel.replicate=2"]}


@pytest.fixture(scope="module")
def saved(debug_data, tmp_path_factory) -> Path:
    """A checkpoint of the same step under every layout, and one of a single process."""
    out = tmp_path_factory.mktemp("saved")
    for size, layouts in ((4, FOUR), (2, TWO)):
        in_processes(size, save_under, debug_data, out, layouts, [free_port() for _ in layouts])
    torch.set_num_threads(1)
    config = small()
    state = fresh(config, debug_data, World.alone())
    advance(state, config)
    save_checkpoint(out / "alone", STEP, state.staged(config))
    torch.save(whole(state), out / "alone.pt")
    return out


NAMES = [*FOUR, *TWO, "alone"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_process_reads_what_any_layout_wrote(saved: Path, debug_data, name: str):
    wanted = torch.load(saved / f"{name}.pt")
    found = read_checkpoint(saved / name / "checkpoints" / STEP)
    equal({**found.model, **found.optimizer}, wanted)
    config = small()
    state = fresh(config, debug_data, World.alone())
    state.restore(found.folder, config)
    equal(whole(state), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "under"), [(4, "hsdp 2 x 2, ep 2"), (4, "fsdp 4, ep 2"), (2, "fsdp 2"), (2, "ep 2")])
def test_every_layout_reads_what_any_other_wrote(saved: Path, debug_data, size: int, under: str):
    layout = (FOUR if size == 4 else TWO)[under]
    in_processes(size, restore_under, debug_data, saved, {under: layout}, NAMES, [free_port()])


@pytest.mark.slow
def test_replicas_write_each_value_once(saved: Path):
    files = {
        name: sum(path.stat().st_size for path in (saved / name / "checkpoints" / STEP).rglob("*.safetensors"))
        for name in NAMES
    }
    assert max(files.values()) < 1.2 * min(files.values()), files  # headers differ


def test_what_fails_on_one_process_fails_on_all_and_leaves_nothing(debug_data, tmp_path: Path):
    in_processes(2, fail_on_one_rank, debug_data, tmp_path)


@pytest.mark.slow
def test_saves_that_fail_behind_a_run_are_told_and_end_it_at_one_step(debug_data, tmp_path: Path):
    in_processes(2, fail_behind, debug_data, tmp_path)


@pytest.mark.slow
def test_processes_started_unlike_are_named_before_anything_waits_for_them():
    in_processes(3, disagree, free_port())


def test_a_checkpoint_of_another_architecture_is_refused_by_name(debug_data, tmp_path: Path):
    config = small()
    written = save_checkpoint(tmp_path, STEP, fresh(config, debug_data, World.alone()).staged(config))
    config = small("model.moe_intermediate_size=48", "model.rope_theta=5000")
    state = fresh(config, debug_data, World.alone())
    before = whole(state)
    with pytest.raises(CheckpointError, match="another architecture: moe_intermediate_size: ") as caught:
        state.restore(written, config)
    assert "rope_theta" in str(caught.value) and caught.value.remedy
    equal(whole(state), before)


def test_resuming_on_four_then_two_then_one_process_reads_the_same_tokens(debug_data, tmp_path: Path):
    """And learns the same, to what sums in another order leave over."""
    alone, shrinking = tmp_path / "alone", tmp_path / "shrinking"
    for out in (alone, shrinking):
        out.mkdir()
    stream(debug_data, alone, True, 6, [])
    in_processes(4, stream, debug_data, shrinking, True, 2, ["parallel.expert=2"])
    in_processes(2, stream, debug_data, shrinking, False, 2, [])
    stream(debug_data, shrinking, False, 2, [])
    for step in range(1, 7):
        one, other = (torch.load(out / f"step-{step}.pt") for out in (alone, shrinking))
        assert torch.equal(one["tokens"], other["tokens"]), f"step {step}"
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4), f"step {step}"
    one, other = (read_checkpoint(out / "checkpoints" / "step-00000006").state for out in (alone, shrinking))
    assert one["loader"] == other["loader"] and one["tokens"] == other["tokens"] == 6 * 1024


def test_a_save_in_one_process_goes_on_behind_the_run(debug_data, tmp_path: Path):
    """What is saved is the state at the start of the save, whatever the run did meanwhile."""
    config = small()
    state, saver = fresh(config, debug_data, World.alone()), Saver(tmp_path, config, World.alone())
    advance(state, config)
    wanted = whole(state)
    saver.start(state, STEP, newest=True)
    advance(state, config)
    done = saver.wait()
    assert done is not None and done.checkpoint == STEP and done.bytes > 0
    found = read_checkpoint(tmp_path / "checkpoints" / STEP)
    equal({**found.model, **found.optimizer}, wanted)
    assert saver.wait() is None and saver.poll() is None
    assert newest_good(tmp_path, pytest.fail) == found.folder
    assert any(name.startswith(("muon/", "adamw/")) for name in found.optimizer) and (found.folder / OPTIMIZER).is_dir()
