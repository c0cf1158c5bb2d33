"""Checkpoints of a run: sealed, compared, pruned, and found again whatever happened to the newest of them."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from trinity.base import durable
from trinity.base.errors import CheckpointError, StorageError
from trinity.ckpt import folder
from trinity.ckpt.folder import (
    LATEST,
    MODEL,
    OPTIMIZER,
    PRE_ANNEAL,
    STATE,
    newest_good,
    point_to,
    prune,
    read_checkpoint,
    save_checkpoint,
    step_folders,
)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 4, generator=generator),
        "transposed": torch.randn(5, 2, generator=generator).T,
        "half": torch.randn(4, generator=generator).bfloat16(),
        "counts": torch.arange(3) + seed,
        "not a number": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def save(run: Path, step: int, name: str | None = None) -> Path:
    return save_checkpoint(run, name or f"step-{step:08d}", tensors(step), {"m": torch.ones(step)}, {"step": step})


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / MODEL, 100)


def flip_a_byte(checkpoint: Path) -> None:
    content = bytearray((checkpoint / OPTIMIZER).read_bytes())
    content[-1] ^= 1
    (checkpoint / OPTIMIZER).write_bytes(bytes(content))


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def spoil_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text("[")


def add_a_file(checkpoint: Path) -> None:
    (checkpoint / "more.bin").write_text("x")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "model.safetensors has 100 bytes": truncate,
    "optimizer.safetensors was altered": flip_a_byte,
    "manifest.json is missing": lose_the_manifest,
    "manifest.json is not a manifest": spoil_the_manifest,
    "more.bin is not in the manifest": add_a_file,
}


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path: Path):
    found = read_checkpoint(save(tmp_path, 7))
    assert found.state == {"step": 7} and torch.equal(found.optimizer["m"], torch.ones(7))
    for name, tensor in tensors(7).items():
        assert found.model[name].dtype == tensor.dtype and found.model[name].shape == tensor.shape
        assert torch.equal(found.model[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    assert sorted(path.name for path in found.folder.iterdir()) == ["manifest.json", MODEL, OPTIMIZER, STATE]


def test_a_disk_that_alters_what_it_stores_is_found_before_anything_moves(tmp_path: Path, monkeypatch):
    save(tmp_path, 1)
    original = folder.save_file

    def lying(values, path):
        original({name: value + 1 if name == "counts" else value for name, value in values.items()}, path)

    monkeypatch.setattr(folder, "save_file", lying)
    with pytest.raises(CheckpointError, match="counts read back differently") as caught:
        save(tmp_path, 2)
    assert caught.value.remedy
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [("I/O error: No space left on device (os error 28)", StorageError), ("I/O error: (os error 5)", CheckpointError)],
)
def test_what_the_file_library_says_of_the_disk_is_understood(tmp_path: Path, monkeypatch, text: str, kind):
    save(tmp_path, 1)

    def failing(values, path):
        raise SafetensorError(f"Error while serializing: {text}")

    monkeypatch.setattr(folder, "save_file", failing)
    with pytest.raises(kind) as caught:
        save(tmp_path, 2)
    assert caught.value.remedy and ("disk is full" in caught.value.what) == (kind is StorageError)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_only_the_newest_and_the_pre_anneal_checkpoint_stay(tmp_path: Path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    save(tmp_path, 2, PRE_ANNEAL)
    for leftover in (".step-00000011.writing-12", ".step-00000010.retired-12"):
        (tmp_path / "checkpoints" / leftover).mkdir()
    (tmp_path / "checkpoints" / ".latest.writing-12").write_text("step-")
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        PRE_ANNEAL, "step-00000003", "step-00000010"]  # fmt: skip
    prune(tmp_path, keep=5)
    assert len(step_folders(tmp_path)) == 2


def test_pruning_puts_back_what_a_kill_left_without_its_name(tmp_path: Path):
    kept = save(tmp_path, 1, PRE_ANNEAL)
    save(tmp_path, 2)
    kept.rename(kept.with_name(f".{PRE_ANNEAL}.retired-12"))
    prune(tmp_path, keep=1)
    assert read_checkpoint(kept).state == {"step": 1}


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
