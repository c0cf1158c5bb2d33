"""Checkpoints of a run: sealed folders, a pointer that moves last, and the search for the newest good one.

    RUN/checkpoints/step-00000128/   model.safetensors, optimizer.safetensors, state.json, manifest.json
    RUN/checkpoints/pre-anneal/      the same, kept for good: what a TrueBase release is made from
    RUN/checkpoints/latest           name of the newest checkpoint, for people and other programs

A checkpoint is written aside, hashed, read back and compared, and only then moved into place; only after that does the
pointer move and older ones go. A kill or a full disk at any moment leaves the previous checkpoint untouched. Resuming
trusts bytes, not the pointer: it takes the newest folder that is as its manifest says (`newest_good`).
"""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trinity.base.durable import folder_aside, recover, unsealed_differences, write_durably, write_json
from trinity.base.errors import CheckpointError

MODEL, OPTIMIZER, STATE, LATEST = "model.safetensors", "optimizer.safetensors", "state.json", "latest"
PRE_ANNEAL = "pre-anneal"


class Checkpoint(NamedTuple):
    folder: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    run: Path, name: str, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]
) -> Path:
    """Write one checkpoint durably and return its folder. The pointer does not move; see `point_to`."""
    final = run / "checkpoints" / name
    final.parent.mkdir(parents=True, exist_ok=True)
    with folder_aside(final) as aside:
        for file, tensors in ((MODEL, model), (OPTIMIZER, optimizer)):
            try:
                save_file({key: value.contiguous() for key, value in tensors.items()}, aside / file)
            except SafetensorError as error:
                raise storage_error(error, aside / file) from error
            _compare(aside / file, tensors)
        write_json(aside / STATE, state)
    return final


def point_to(run: Path, checkpoint: Path) -> None:
    """Name a finished checkpoint as the newest one."""
    write_durably(run / "checkpoints" / LATEST, checkpoint.name + "\n")


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` step checkpoints, and what a kill left half written. The run must be ours."""
    recover(run / "checkpoints", alone=True)
    folders = step_folders(run)
    for folder in folders[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def step_folders(run: Path) -> list[Path]:
    """Step checkpoints, oldest first, whether good or not."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.is_dir())


def newest_good(run: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose bytes are as they were sealed, or None; bad ones are named through `warn`.

    Raises CheckpointError when there are checkpoints and every one of them is bad.
    """
    folders = step_folders(run)
    for folder in reversed(folders):
        differences = unsealed_differences(folder)
        if not differences:
            return folder
        warn(f"Checkpoint {folder} is damaged ({'; '.join(differences)}) and is not used.")
    if folders:
        raise CheckpointError(
            f"Every checkpoint of {run} is damaged.", "Restore one from a copy, or start again with another --out."
        )
    return None


def check_checkpoint(folder: Path) -> None:
    """Check every byte of a checkpoint against its manifest; a CheckpointError names what differs."""
    differences = unsealed_differences(folder)
    if differences:
        raise CheckpointError(f"Checkpoint {folder} is damaged: {'; '.join(differences)}.", "Use the one before it.")


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint after checking it."""
    check_checkpoint(folder)
    return Checkpoint(
        folder, read_tensors(folder / MODEL), read_tensors(folder / OPTIMIZER), json.loads((folder / STATE).read_text())
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _compare(path: Path, tensors: dict[str, Tensor]) -> None:
    """Read a file back and demand the values that are in memory."""
    with safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            if not torch.equal(file.get_tensor(name).view(torch.uint8), tensor.contiguous().view(torch.uint8)):
                raise CheckpointError(
                    f"{path}: {name} read back differently from what was written.", "The disk or memory is failing."
                )


def storage_error(error: SafetensorError, path: Path) -> OSError | CheckpointError:
    """safetensors hides the errno in its text; a full disk must be recognised as one."""
    if "os error 28" in str(error) or "No space left" in str(error):
        return OSError(errno.ENOSPC, "No space left on device", str(path))
    return CheckpointError(f"{path} could not be written: {error}.", "See the message of the file system.")
