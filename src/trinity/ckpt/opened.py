"""MODEL, wherever a command takes one: a Hugging Face folder, a run folder, or one checkpoint of a run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trinity.base.errors import CheckpointError, UsageError
from trinity.base.run import CONFIG
from trinity.ckpt.folder import MODEL, STATE, newest_good, read_tensors
from trinity.ckpt.hf import keep_precision, read_hf
from trinity.config.load import from_dict
from trinity.config.model import ModelConfig
from trinity.model.init import build_on_meta
from trinity.model.transformer import Transformer
from trinity.text.tokenizer import Tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    model: Transformer
    tokenizer: Tokenizer
    folder: Path  # where the weights were read from
    name: str
    generation: dict[str, Any]  # generation_config.json, empty where there is none
    lineage: dict[str, Any]


def open_model(path: Path | str, dtype: str = "float32") -> OpenedModel:
    """Load a model for inference. Bad bytes, a missing file, another architecture: one clear CheckpointError."""
    path = Path(path)
    if dtype not in _DTYPES:
        raise UsageError(f"dtype '{dtype}' is not offered.", f"Choose one of {', '.join(_DTYPES)}.")
    if not path.is_dir():
        raise CheckpointError(f"There is no model folder at {path}.", "Name a Hugging Face folder or a run folder.")
    if (path / STATE).exists():
        return _open_checkpoint(path, path.parent.parent, f"{path.parent.parent.name}-{path.name}", dtype)
    if (path / "checkpoints").is_dir():
        problems: list[str] = []
        newest = newest_good(path, problems.append)
        if newest is None:
            raise CheckpointError(f"{path} has no checkpoint yet.", "Let the training run reach its first save.")
        return _open_checkpoint(newest, path, path.name, dtype)
    config = json.loads((path / CONFIG).read_text()) if (path / CONFIG).exists() else {}
    if "model_type" not in config:
        raise CheckpointError(
            f"{path} is not a model.", "Name a Hugging Face folder or a run folder with a checkpoint."
        )
    return OpenedModel(
        model=read_hf(path, _DTYPES[dtype]).eval().requires_grad_(False),
        tokenizer=Tokenizer.load(path),
        folder=path,
        name=path.resolve().name,
        generation=_json_or_empty(path / "generation_config.json"),
        lineage=_json_or_empty(path / "lineage.json"),
    )


def _open_checkpoint(folder: Path, run: Path, name: str, dtype: str) -> OpenedModel:
    config = from_dict(ModelConfig, json.loads((folder / STATE).read_text())["model_config"])
    model = build_on_meta(config)
    state = {key: keep_precision(key, tensor, _DTYPES[dtype]) for key, tensor in read_tensors(folder / MODEL).items()}
    model.load_state_dict(state, assign=True)
    return OpenedModel(
        model=model.eval().requires_grad_(False),
        tokenizer=Tokenizer.load(run),
        folder=folder,
        name=name,
        generation={},
        lineage=_json_or_empty(run / "lineage.json"),
    )


def _json_or_empty(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
