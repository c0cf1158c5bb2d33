"""Checkpoints of a run: sealed folders, a pointer that moves last, and the search for the newest good one.

    RUN/checkpoints/step-00000128/model/       shard-*.safetensors: what each process held of the weights
                                  optimizer/   the same of the optimiser's state
                                  state.json   counters, guard and loader, equal on all processes
                                  manifest.json
    RUN/checkpoints/pre-anneal/      the same under a name, kept for good: what a TrueBase release is made from
    RUN/checkpoints/abandoned-step-00000256/   what a roll-back left for an older one, until the next save stands
    RUN/checkpoints/latest           name of the newest checkpoint, for people and other programs

A checkpoint is written aside by all processes, hashed, read back and compared, its experts are counted, and only then
it is moved into place; only after that does the pointer move and older ones go. A kill or a full disk at any moment
leaves the previous checkpoint untouched. Resuming trusts bytes, not the pointer: it takes the newest folder that is as
its manifest says (`newest_good`).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trinity.base.durable import (
    Sealed,
    altered_files,
    begin_aside,
    finish_aside,
    recover,
    refusing_disk,
    sealed,
    strange_files,
    sync_file,
    sync_folder,
    write_durably,
    write_json,
)
from trinity.base.errors import CheckpointError
from trinity.ckpt.peers import ALONE, Peers
from trinity.ckpt.shards import Piece, compare, local_part, missing, piece_of, read_tensors, write_part
from trinity.config.load import from_dict
from trinity.config.model import ModelConfig
from trinity.model.init import build_on_meta

MODEL, OPTIMIZER, STATE, LATEST = "model", "optimizer", "state.json", "latest"
_ABANDONED = "abandoned-"


class Checkpoint(NamedTuple):
    """A whole checkpoint in the memory of one process."""

    folder: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


class Staged(NamedTuple):
    """One process's share of a checkpoint, copied to the memory of the CPU: the run may go on while it is written."""

    model: dict[str, Piece]
    optimizer: dict[str, Piece]
    state: dict[str, Any]  # with "model_config"; equal on all processes

    @property
    def bytes(self) -> int:
        return sum(piece.values.nbytes for piece in (*self.model.values(), *self.optimizer.values()))


def stage(model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]) -> Staged:
    """Copy this process's parts of all tensors to the CPU. GPU tensors go through pinned memory, all at once."""
    pieces = [
        {name: piece_of(tensor, _copy(local_part(tensor))) for name, tensor in tensors.items()}
        for tensors in (model, optimizer)
    ]
    if any(tensor.is_cuda for tensor in model.values()):
        torch.cuda.synchronize()
    return Staged(pieces[0], pieces[1], json.loads(json.dumps(state)))  # a copy: the run's own lists go on changing


def _copy(part: Tensor) -> Tensor:
    if not part.is_cuda:
        return part.clone(memory_format=torch.contiguous_format)
    copied = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
    return copied.copy_(part, non_blocking=True)


def save_checkpoint(run: Path, name: str, staged: Staged, peers: Peers = ALONE) -> Path:
    """Write one checkpoint durably, all processes together, and return its folder. The pointer does not move."""
    final = run / "checkpoints" / name
    with refusing_disk(final):
        aside = peers.share(peers.first(lambda: begin_aside(final)))
        assert aside is not None
        try:
            known = _write(aside, final, staged, peers)
            peers.first(lambda: _close(aside, final, staged, known))
        except BaseException:
            if peers.is_first:
                shutil.rmtree(aside, ignore_errors=True)
            raise
    return final


def _write(aside: Path, final: Path, staged: Staged, peers: Peers) -> dict[str, Sealed]:
    """Write this process's files, read them back and hash them; on the first process, the hashes of all files."""
    parts = {MODEL: staged.model, OPTIMIZER: staged.optimizer}
    with refusing_disk(final):
        written = {part: write_part(aside / part, pieces, peers) for part, pieces in parts.items()}

    def prove() -> dict[str, Sealed]:
        for part, files in written.items():
            for path in files:
                sync_file(path)  # torch's writer calls fsync before it flushes its own buffer
                compare(path, parts[part])
        return {path.relative_to(aside).as_posix(): sealed(path) for files in written.values() for path in files}

    gathered = peers.gather(peers.together(prove))
    return {name: entry for entries in gathered for name, entry in entries.items()}


def _close(aside: Path, final: Path, staged: Staged, known: dict[str, Sealed]) -> None:
    """Count what all processes wrote together, and let it take its name."""
    for part, shapes in (
        (MODEL, shapes_of(staged.state["model_config"])),
        (OPTIMIZER, {name: piece.shape for name, piece in staged.optimizer.items()}),
    ):
        wrong = missing(aside / part, shapes)
        if wrong:
            raise CheckpointError(
                f"The {part} of {final} was written incompletely: {'; '.join(wrong[:3])}.",
                "This is a defect of trinity; the checkpoint before it is whole.",
            )
    write_json(aside / STATE, staged.state)
    finish_aside(aside, final, known)


def shapes_of(model_config: dict[str, Any]) -> dict[str, torch.Size]:
    """Name and whole shape of every tensor of a model, as its configuration alone says."""
    model = build_on_meta(from_dict(ModelConfig, model_config))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def point_to(run: Path, checkpoint: Path) -> None:
    """Name a finished checkpoint as the newest one."""
    write_durably(run / "checkpoints" / LATEST, checkpoint.name + "\n")


def prune(run: Path, newest: Path, keep: int, keep_every_tokens: int = 0) -> None:
    """Remove old step checkpoints now that `newest` stands, and what a kill left half written. The run must be ours.

    What stays: `newest` with the `keep` - 1 before it; of those before these the first one in every
    `keep_every_tokens` tokens (0: none); and what the pointer names. Step checkpoints of a higher number than what the
    run has just written are those that it could not go on from, being damaged, or those that it abandoned: they never
    count as kept ones, and go last, when a good one stands in their place.
    """
    recover(run / "checkpoints", alone=True)
    folders = step_folders(run)
    until = [folder for folder in folders if folder.name <= newest.name]
    stay = {folder.name for folder in until[-keep:]} | {newest.name, _pointed_to(run)}
    if keep_every_tokens:
        stay |= {folder.name for folder in _milestones(until, keep_every_tokens)}
    for folder in (*folders, *(run / "checkpoints").glob(f"{_ABANDONED}*")):
        if folder.name not in stay:
            shutil.rmtree(folder, ignore_errors=True)


def _pointed_to(run: Path) -> str:
    try:
        return (run / "checkpoints" / LATEST).read_text().strip()
    except (OSError, ValueError):
        return ""


def abandon(folder: Path, older: Path) -> None:
    """Go on from `older`: `folder` is taken out of the run's way without being lost, until the next save stands."""
    point_to(folder.parent.parent, older)
    aside = folder.with_name(_ABANDONED + folder.name)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    sync_folder(folder.parent)


def _milestones(folders: list[Path], every: int) -> list[Path]:
    """Of checkpoints in the order of their steps, those that are the first at or past a multiple of `every` tokens.

    Judged by the one before that is still there: what was kept once stays kept when others between have gone.
    """
    chosen, reached = [], 0
    for folder in folders:
        tokens = _tokens_of(folder)  # a damaged one is no milestone; the next stands in for it
        if tokens is not None and tokens // every > reached:
            chosen.append(folder)
            reached = tokens // every
    return chosen


def reached(run: Path) -> int:
    """Tokens of the newest checkpoint that tells them, its bytes unchecked; 0 where a run has none."""
    told = (_tokens_of(folder) for folder in reversed(step_folders(run)))
    return next((tokens for tokens in told if tokens is not None), 0)


def _tokens_of(folder: Path) -> int | None:
    try:
        return int(json.loads((folder / STATE).read_bytes())["tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def step_folders(run: Path) -> list[Path]:
    """Step checkpoints, oldest first, whether good or not."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.is_dir())


def newest_good(
    run: Path, warn: Callable[[str], None], peers: Peers = ALONE, before: Path | None = None
) -> Path | None:
    """The newest checkpoint whose bytes are as they were sealed, or None; bad ones are named through `warn`.

    Several processes hash a share of the files each and find the same one. `before`: only of those older than that
    one. Raises CheckpointError when there are checkpoints, of any age, and every one of them is bad.
    """
    folders = peers.share(step_folders(run))
    for folder in reversed(folders):
        if before is not None and folder.name >= before.name:
            continue
        differences = differences_of(folder, peers)
        if not differences:
            for name in peers.share(strange_files(folder)):
                warn(f"{folder / name} is no part of that checkpoint and is left alone.")
            return folder
        warn(f"Checkpoint {folder} is damaged ({'; '.join(differences)}) and is not used.")
    if folders and before is None:
        raise CheckpointError(
            f"Every checkpoint of {run} is damaged.", "Restore one from a copy, or start again with another --out."
        )
    return None


def differences_of(folder: Path, peers: Peers = ALONE) -> list[str]:
    """What of a checkpoint is not as it was sealed; the same list on all processes.

    A file more is no damage, unless a reader of the tensors would take it for one of theirs: on network disks
    `.nfs...` comes and goes where a file was removed while it was open, and people leave notes.
    """

    def look() -> list[str]:
        changed = altered_files(folder, share=(peers.rank, peers.size))
        stray = strange_files(folder) if peers.is_first and not changed else []
        return changed + [f"{name} is not in the manifest" for name in stray if name.endswith(".safetensors")]

    own = peers.together(look)
    return list(dict.fromkeys(sentence for found in peers.gather_everywhere(own) for sentence in found))


def check_checkpoint(folder: Path) -> None:
    """Check every byte of a checkpoint against its manifest; a CheckpointError names what differs."""
    differences = differences_of(folder)
    if differences:
        raise CheckpointError(f"Checkpoint {folder} is damaged: {'; '.join(differences)}.", "Use the one before it.")


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint that has been checked."""
    return json.loads((folder / STATE).read_bytes())


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint after checking it, whatever number of processes wrote it."""
    check_checkpoint(folder)
    return Checkpoint(folder, read_tensors(folder / MODEL), read_tensors(folder / OPTIMIZER), read_state(folder))
