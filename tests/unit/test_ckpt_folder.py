"""Checkpoints of a run: sealed, compared, pruned, and found again whatever happened to the newest of them."""

import errno
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from trinity.base import durable
from trinity.base.errors import CheckpointError, StorageError
from trinity.ckpt import folder, shards
from trinity.ckpt.folder import (
    LATEST,
    MODEL,
    OPTIMIZER,
    STATE,
    Staged,
    abandon,
    newest_good,
    point_to,
    prune,
    read_checkpoint,
    save_checkpoint,
    stage,
    step_folders,
)
from trinity.ckpt.shards import Piece
from trinity.config.load import override, to_dict
from trinity.config.phases import PRE_ANNEAL
from trinity.model.init import build_model
from trinity.recipes.table import recipe

SHARD = "shard-00001-model-00001-of-00001.safetensors"
SIZES = ["vocab_size=16", "hidden_size=16", "num_hidden_layers=3", "num_experts=4", "intermediate_size=16"]
MODEL_CONFIG = override(recipe("debug"), [f"model.{size}" for size in SIZES]).model


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Kinds of tensors that must come back bit for bit, beside those of a model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "transposed": torch.randn(5, 2, generator=generator).T,
        "half": torch.randn(4, generator=generator).bfloat16(),
        "counts": torch.arange(3) + seed,
        "not a number": torch.tensor([float("nan"), float("inf"), -0.0]),
        "no rows": torch.zeros(0, 4),
    }


def staged(step: int) -> Staged:
    config = MODEL_CONFIG
    state = {"step": step, "tokens": step * 100, "model_config": to_dict(config)}
    return stage(build_model(config, step).state_dict(), tensors(step), state)


def save(run: Path, step: int, name: str | None = None) -> Path:
    return save_checkpoint(run, name or f"step-{step:08d}", staged(step))


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / MODEL / SHARD, 100)


def flip_a_byte(checkpoint: Path) -> None:
    content = bytearray((checkpoint / OPTIMIZER / SHARD).read_bytes())
    content[-1] ^= 1
    (checkpoint / OPTIMIZER / SHARD).write_bytes(bytes(content))


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def spoil_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text("[")


def add_a_shard(checkpoint: Path) -> None:
    (checkpoint / MODEL / "more.safetensors").write_text("x")


DAMAGES: dict[str, Callable[[Path], None]] = {
    f"model/{SHARD} has 100 bytes": truncate,
    f"optimizer/{SHARD} was altered": flip_a_byte,
    "manifest.json is missing": lose_the_manifest,
    "manifest.json is not a manifest": spoil_the_manifest,
    "model/more.safetensors is not in the manifest": add_a_shard,
}


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path: Path):
    found = read_checkpoint(save(tmp_path, 7))
    assert found.state["step"] == 7 and found.state["tokens"] == 700
    for held, wanted in ((found.model, build_model(MODEL_CONFIG, 7).state_dict()), (found.optimizer, tensors(7))):
        assert held.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert held[name].dtype == tensor.dtype and held[name].shape == tensor.shape
            assert torch.equal(held[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    files = sorted(path.relative_to(found.folder).as_posix() for path in found.folder.rglob("*") if path.is_file())
    assert files == ["manifest.json", f"model/{SHARD}", f"optimizer/{SHARD}", STATE]


def test_equal_tensors_are_equal_files_in_whatever_order_they_were_listed(tmp_path: Path):
    """An optimiser that was restored lists its slots in another order than one that made them."""
    slots = tensors(1)
    state = {"step": 1, "tokens": 1, "model_config": to_dict(MODEL_CONFIG)}
    weights = build_model(MODEL_CONFIG, 1).state_dict()
    orders = (slots, dict(reversed(slots.items())))
    one, other = (
        save_checkpoint(tmp_path / str(place), "step-00000001", stage(weights, order, state))
        for place, order in enumerate(orders)
    )
    assert (one / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()


def test_a_staged_copy_is_not_moved_by_the_run(tmp_path: Path):
    model, history = build_model(MODEL_CONFIG, 1), [1.0]
    copy = stage(model.state_dict(), {}, {"tokens": 1, "losses": history, "model_config": to_dict(MODEL_CONFIG)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    history.append(2.0)
    found = read_checkpoint(save_checkpoint(tmp_path, "step-00000001", copy))
    assert found.state["losses"] == [1.0]
    for name, tensor in build_model(MODEL_CONFIG, 1).state_dict().items():
        assert torch.equal(found.model[name], tensor), name


def test_large_tensors_go_into_several_files(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shards, "FILE_BYTES", 20_000)
    saved = save(tmp_path, 3)
    assert len(list((saved / MODEL).iterdir())) > 3
    for name, tensor in read_checkpoint(saved).model.items():
        assert torch.equal(tensor, build_model(MODEL_CONFIG, 3).state_dict()[name]), name


def test_a_disk_that_alters_what_it_stores_is_found_before_anything_moves(tmp_path: Path, monkeypatch):
    save(tmp_path, 1)

    def lying(self, index, original=shards._PiecePlanner.lookup_object):
        return original(self, index) + (1 if index.fqn == "counts" else 0)

    monkeypatch.setattr(shards._PiecePlanner, "lookup_object", lying)
    with pytest.raises(StorageError, match="counts read back differently") as caught:
        save(tmp_path, 2)
    assert caught.value.remedy
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


STACK = "layers.2.mlp.experts.down_proj"


def test_an_expert_left_out_or_written_twice_is_found_before_anything_moves(tmp_path: Path, monkeypatch):
    """Two files that hold experts 0-1 and 3 of 4, or 0-2 and 2-3: no promise of the writer is believed."""
    save(tmp_path, 1)
    whole = staged(2)
    stack = whole.model[STACK].values

    def piece(first: int, stop: int) -> Piece:
        return Piece(stack[first:stop].clone(), stack.shape, torch.Size([first, 0, 0]))

    original = folder.write_part
    for others, wrong in ((piece(3, 4), "expert 2"), (piece(1, 4), "expert 1"), (None, "expert 2, 3")):

        def forgetting(path, pieces, peers, others=others):
            if path.name != MODEL:
                return original(path, pieces, peers)
            with monkeypatch.context() as patch:
                patch.setattr("torch.distributed.checkpoint.default_planner._validate_global_plan", lambda *_: [])
                written = original(path, pieces | {STACK: piece(0, 2)}, peers)
                if others is not None:
                    extra = original(path / "more", {STACK: others}, peers)
                    written.append(extra[0].rename(path / "shard-00002-model-00001-of-00001.safetensors"))
                    extra[0].parent.rmdir()
            return written

        with monkeypatch.context() as patch:
            patch.setattr(folder, "write_part", forgetting)
            patch.setattr(folder, "compare", lambda *_: None)
            with pytest.raises(CheckpointError, match=f"incompletely: {wrong} of {STACK} is not held exactly once"):
                save_checkpoint(tmp_path, "step-00000002", whole)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_tensor_that_is_missing_or_not_part_of_the_model_is_named(tmp_path: Path):
    whole = staged(2)
    lacking = {name: piece for name, piece in whole.model.items() if name != "norm.weight"}
    with pytest.raises(CheckpointError, match=r"norm\.weight is missing"):
        save_checkpoint(tmp_path, "a", whole._replace(model=lacking))
    stray = Piece(torch.ones(2), torch.Size([2]), torch.Size([0]))
    with pytest.raises(CheckpointError, match="stray is not part of it"):
        save_checkpoint(tmp_path, "a", whole._replace(model=whole.model | {"stray": stray}))
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EIO, "disk failed: .* input/output error")],
)
def test_a_full_or_failing_disk_is_one_sentence_and_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch, number: int, said: str
):
    save(tmp_path, 1)

    def failing(self, path, mode):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystem.create_stream", failing)
    with pytest.raises(StorageError, match=said) as caught:
        save(tmp_path, 2)
    assert caught.value.remedy
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_only_the_newest_and_the_pre_anneal_checkpoint_stay(tmp_path: Path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    save(tmp_path, 2, PRE_ANNEAL)
    for leftover in (".step-00000011.writing-12", ".step-00000010.retired-12"):
        (tmp_path / "checkpoints" / leftover).mkdir()
    (tmp_path / "checkpoints" / ".latest.writing-12").write_text("step-")
    prune(tmp_path, step_folders(tmp_path)[-1], keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        PRE_ANNEAL, "step-00000003", "step-00000010"]  # fmt: skip
    prune(tmp_path, step_folders(tmp_path)[-1], keep=5)
    assert len(step_folders(tmp_path)) == 2


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_damaged_newer_checkpoints_never_count_and_go_when_a_good_one_stands(tmp_path: Path, keep: int):
    """A run that went on from 90 beside damaged 100 and 110 saves 95."""
    good, *damaged = (save(tmp_path, step) for step in (90, 100, 110))
    for bad in damaged:
        truncate(bad)
    assert newest_good(tmp_path, lambda _: None) == good
    for step in (95, 97):
        saved = save(tmp_path, step)
        assert newest_good(tmp_path, lambda _: None) == (saved if step == 97 else good.with_name("step-00000095"))
        point_to(tmp_path, saved)
        prune(tmp_path, saved, keep)
        kept = [number for number in (90, 95, 97) if number <= step][-keep:]
        assert [int(path.name[5:]) for path in step_folders(tmp_path)] == kept
        assert newest_good(tmp_path, pytest.fail) == saved


def test_pruning_spares_what_the_pointer_names(tmp_path: Path):
    saved = [save(tmp_path, step) for step in (1, 2, 3)]
    point_to(tmp_path, saved[0])
    prune(tmp_path, saved[2], keep=1)
    assert step_folders(tmp_path) == [saved[0], saved[2]]


def test_an_abandoned_checkpoint_is_found_no_more_and_goes_when_another_stands(tmp_path: Path):
    first, second = save(tmp_path, 4), save(tmp_path, 6)
    point_to(tmp_path, second)
    abandon(second, first)
    assert newest_good(tmp_path, pytest.fail) == first
    assert (tmp_path / "checkpoints" / LATEST).read_text() == first.name + "\n"
    assert read_checkpoint(tmp_path / "checkpoints" / "abandoned-step-00000006").state["step"] == 6
    again = save(tmp_path, 5)
    point_to(tmp_path, again)
    prune(tmp_path, again, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [LATEST, first.name, again.name]


def test_files_that_nothing_reads_are_named_and_do_no_harm(tmp_path: Path):
    """A network disk leaves .nfs files where something open was removed, people leave notes."""
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    strays = [second / MODEL / ".nfs0000000002a10b00000001", second / "notes.txt"]
    for stray in strays:
        stray.write_text("x")
    said: list[str] = []
    assert newest_good(tmp_path, said.append) == second != first
    assert len(said) == 2 and all(any(str(stray) in sentence for sentence in said) for stray in strays)
    for name, tensor in read_checkpoint(second).model.items():
        assert torch.equal(tensor, build_model(MODEL_CONFIG, 2).state_dict()[name]), name
    assert durable.unsealed_differences(second) == [
        "model/.nfs0000000002a10b00000001 is not in the manifest", "notes.txt is not in the manifest"]  # fmt: skip


def test_what_a_network_disk_keeps_of_removed_files_is_not_sealed(tmp_path: Path):
    (tmp_path / "a").write_text("a")
    (tmp_path / ".nfs01").write_text("x")
    durable.seal(tmp_path)
    (tmp_path / ".nfs01").unlink()
    assert durable.unsealed_differences(tmp_path) == []


def test_milestones_stay_for_good_whatever_goes_between_them(tmp_path: Path):
    """Every 250 tokens of checkpoints 100 tokens apart: those of 300, 500, 800, 1000 tokens; and the newest one."""
    for step in range(1, 13):
        prune(tmp_path, save(tmp_path, step), keep=1, keep_every_tokens=250)
    assert [int(path.name[5:]) for path in step_folders(tmp_path)] == [3, 5, 8, 10, 12]
    newest = step_folders(tmp_path)[-1]
    prune(tmp_path, newest, keep=1, keep_every_tokens=500)
    assert [int(path.name[5:]) for path in step_folders(tmp_path)] == [5, 10, 12]
    (tmp_path / "checkpoints" / "step-00000005" / STATE).write_text("[]")
    prune(tmp_path, newest, keep=1, keep_every_tokens=500)
    assert [int(path.name[5:]) for path in step_folders(tmp_path)] == [10, 12]


def test_pruning_puts_back_what_a_kill_left_without_its_name(tmp_path: Path):
    kept = save(tmp_path, 1, PRE_ANNEAL)
    newest = save(tmp_path, 2)
    kept.rename(kept.with_name(f".{PRE_ANNEAL}.retired-12"))
    prune(tmp_path, newest, keep=1)
    assert read_checkpoint(kept).state["step"] == 1


def test_the_pointer_names_a_checkpoint_and_nothing_depends_on_it(tmp_path: Path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    pointer = tmp_path / "checkpoints" / LATEST
    point_to(tmp_path, first)
    assert pointer.read_text() == "step-00000001\n"
    for damage in ("step-99999999\n", "\0\xff", ""):
        pointer.write_text(damage)
        assert newest_good(tmp_path, pytest.fail) == second
    pointer.unlink()
    assert newest_good(tmp_path, pytest.fail) == second


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_named_and_the_newest_undamaged_checkpoint_is_found(tmp_path: Path, what: str):
    folders = [save(tmp_path, step) for step in (1, 2, 3)]
    said: list[str] = []
    for number, damaged in enumerate(reversed(folders[1:]), start=1):
        DAMAGES[what](damaged)
        said.clear()
        assert newest_good(tmp_path, said.append) == folders[-1 - number]
        assert len(said) == number and all(what in sentence for sentence in said)
        assert damaged.name in said[-1]
        with pytest.raises(CheckpointError, match=what):
            read_checkpoint(damaged)
    DAMAGES[what](folders[0])
    with pytest.raises(CheckpointError, match="Every checkpoint") as caught:
        newest_good(tmp_path, said.append)
    assert caught.value.remedy


def test_a_run_without_checkpoints_has_no_newest(tmp_path: Path):
    assert newest_good(tmp_path, pytest.fail) is None
    (tmp_path / "checkpoints").mkdir()
    assert newest_good(tmp_path, pytest.fail) is None


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_kill_at_any_moment_of_a_save_leaves_a_good_checkpoint(tmp_path: Path, monkeypatch, call: str):
    save(tmp_path, 1)
    real, reached, countdown = getattr(os, call), [0], 0
    while reached[0] >= countdown:
        countdown += 1
        reached[0] = 0

        def failing(*arguments, _countdown=countdown):
            reached[0] += 1
            if reached[0] == _countdown:
                raise Killed
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(durable.os, call, failing)
            with suppress(Killed):
                point_to(tmp_path, save(tmp_path, 2))
        good = newest_good(tmp_path, pytest.fail)
        assert good is not None and json.loads((good / STATE).read_text())["step"] in (1, 2)
        pointer = tmp_path / "checkpoints" / LATEST
        assert not pointer.exists() or (pointer.parent / pointer.read_text().strip()).is_dir()
    assert countdown > 3
