"""Averaging the weights of checkpoints of one run: a model that is often better than the last of them, for nothing.

    uniform        w = (w_1 + ... + w_k) / k                   latest weight averaging (Kaddour, arXiv:2209.14981)
    exponential    w = (1 - d) / (1 - d^k) * sum_i d^(k-i) w_i newest weighs most; bias-corrected

Of the k latest checkpoints the plain mean is what practice settled on: in ByteDance's study of merging in pretraining
(arXiv:2505.12082) it was as good as weighted and exponential means, and at a constant learning rate a mean stands in
for part of a decay. Sums are made in float64, one tensor at a time, so that k checkpoints cost the memory of one.

Every tensor is averaged, the router with its selection biases: bias and router of one checkpoint belong together, and
SMEBU keeps the mean of the biases at zero, which averaging keeps too. How evenly the average spreads its tokens is
measured, not promised: `trinity audit --suite routing`.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trinity.base.durable import MANIFEST, sha256_file
from trinity.base.errors import CheckpointError, UsageError
from trinity.ckpt.folder import MODEL, check_checkpoint, read_state, step_folders
from trinity.ckpt.shards import StoredPart
from trinity.config.load import differences, from_dict
from trinity.config.model import ModelConfig
from trinity.model.init import build_on_meta
from trinity.model.transformer import Transformer


def latest(run: Path, count: int) -> list[Path]:
    """The `count` newest step checkpoints of a run, oldest first. UsageError where it has kept fewer."""
    folders = step_folders(run)
    if len(folders) < count:
        raise UsageError(
            f"{run} has kept {len(folders)} step checkpoints, not {count}.",
            "Ask for fewer with --last, or keep more: train.keep_checkpoints may be raised on a resume.",
        )
    return folders[-count:]


def weights_of(count: int, decay: float | None) -> list[float]:
    """What each of `count` checkpoints weighs, oldest first; they sum to 1. decay: None for the plain mean."""
    raw = [1.0 if decay is None else decay ** (count - 1 - number) for number in range(count)]
    return [weight / sum(raw) for weight in raw]


def average(folders: list[Path], decay: float | None = None) -> tuple[Transformer, list[dict[str, Any]]]:
    """(a model whose every tensor is the weighted mean of those checkpoints, what it was made from, for its lineage).

    They are taken in the order of their steps, in whatever order they are named. Raises CheckpointError when one is
    damaged, of another architecture or another run, or holds a value that is not finite; UsageError when one is there
    twice.
    """
    if len(folders) < 2:
        raise UsageError("An average needs at least two checkpoints.", "Name more of them, or a larger --last.")
    for folder in folders:
        check_checkpoint(folder)
    ordered = sorted(((read_state(folder), folder) for folder in folders), key=lambda found: found[0]["step"])
    _refuse_strangers(ordered)
    weights = weights_of(len(folders), decay)
    model = build_on_meta(from_dict(ModelConfig, ordered[0][0]["model_config"]))
    parts = [StoredPart(folder / MODEL) for _, folder in ordered]
    mean = {name: _mean(name, meta, parts, weights) for name, meta in model.state_dict().items()}
    model.load_state_dict(mean, assign=True)
    made_of = [
        {
            "checkpoint": folder.resolve().name,
            "step": state["step"],
            "tokens": state["tokens"],
            "weight": round(weight, 6),
            "manifest": sha256_file(folder / MANIFEST),
        }
        for (state, folder), weight in zip(ordered, weights, strict=True)
    ]
    return model.eval().requires_grad_(False), made_of


def _refuse_strangers(ordered: list[tuple[dict[str, Any], Path]]) -> None:
    """Demand checkpoints of different steps of one run: equal in every setting that a resume locks, and in the data.

    A run may have gone on under another layout, guard or cadence of saving, and through phases of other text; its
    checkpoints may lie apart, as copies do. Two starts of equal settings on equal data are one run, up to rounding.
    """
    first, home = ordered[0]
    for state, folder in ordered[1:]:
        if other := differences(first["model_config"], state["model_config"]):
            raise CheckpointError(
                f"{folder} holds a model of another architecture than {home}: {'; '.join(other[:3])}.",
                "Average checkpoints of one run.",
            )
        unlike = [
            f"{what} {state[key]} instead of {first[key]}"
            for what, key in (("settings", "config_fingerprint"), ("data", "data_fingerprint"))
            if state[key] != first[key]
        ]
        if unlike:
            raise CheckpointError(
                f"{folder} is of another run than {home}: {' and '.join(unlike)}.",
                "Average checkpoints of one run; the config.json of the runs say what differs, such as train.seed.",
            )
    for (state, folder), (after, again) in pairwise(ordered):
        if state["step"] == after["step"]:
            raise UsageError(
                f"{folder} and {again} are both of step {state['step']:,}, which would count twice.",
                "Name each step once: a checkpoint with a name is often also that of its step.",
            )


def _mean(name: str, meta: Tensor, parts: list[StoredPart], weights: list[float]) -> Tensor:
    total = torch.zeros(meta.shape, dtype=torch.float64)
    held = torch.empty(meta.shape, dtype=meta.dtype)
    for part, weight in zip(parts, weights, strict=True):
        part.read_into({name: held})
        total.add_(held, alpha=weight)
    if not total.isfinite().all():
        raise CheckpointError(f"{name} of one of the checkpoints holds a value that is not finite.", "Leave it out.")
    return total.to(meta.dtype)
