"""MODEL, wherever a command takes one: a Hugging Face folder, a run folder, or one checkpoint of a run."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from trinity.base.durable import MANIFEST, altered_files
from trinity.base.errors import CheckpointError, UsageError
from trinity.base.lineage import fingerprint
from trinity.base.run import CONFIG
from trinity.ckpt.folder import MODEL, STATE, check_checkpoint, newest_good
from trinity.ckpt.hf import DEFAULT_BALANCE_COEFF, FolderWeights, read_json_object, read_published_config, shard_files
from trinity.ckpt.model_folder import matching_tokenizer
from trinity.ckpt.tensor_file import TensorFile
from trinity.ckpt.weights import MARK, PACKED, CheckpointWeights, PackedWeights, Weights, model_of
from trinity.config.load import from_dict
from trinity.config.model import ModelConfig
from trinity.config.run import RunConfig
from trinity.model.transformer import Transformer
from trinity.text.tokenizer import FILE, Tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model that lies on a disk, its weights unread."""

    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer
    folder: Path  # where the weights are
    name: str
    generation: dict[str, Any]  # generation_config.json, empty where there is none
    lineage: dict[str, Any]
    load_balance_coeff: float  # step of the selection biases in pretraining, as published in config.json

    @property
    def ends_turns(self) -> bool:
        """Whether generation_config.json ends an answer at <|im_end|>, as that of a fine-tuned model does."""
        ends = self.generation.get("eos_token_id")
        return self.tokenizer.im_end_id in (ends if isinstance(ends, list) else [ends])


@dataclass(frozen=True, kw_only=True)
class OpenedModel(StoredModel):
    """The same with all weights in memory."""

    model: Transformer


def to_stderr(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def open_model(path: Path | str, dtype: str = "float32", warn: Callable[[str], None] = to_stderr) -> OpenedModel:
    """Load a model for inference: see `find_model`. Router, norms and selection bias are float32 in any dtype."""
    if dtype not in _DTYPES:
        raise UsageError(f"dtype '{dtype}' is not offered.", f"Choose one of {', '.join(_DTYPES)}.")
    return read_model(find_model(path, warn), dtype)


def read_model(stored: StoredModel, dtype: str = "float32") -> OpenedModel:
    """All weights of a model, in memory once."""
    if isinstance(stored.weights, PackedWeights):
        stored.weights.refuse()
    model = model_of(stored.config, stored.weights, _DTYPES[dtype], f"Reading {stored.name}")
    model.eval().requires_grad_(False)
    return OpenedModel(model=model, **{field.name: getattr(stored, field.name) for field in fields(StoredModel)})


def find_model(path: Path | str, warn: Callable[[str], None] = to_stderr) -> StoredModel:
    """What there is at a path, its weights unread but for their headers, and their hashes where they were sealed.

    Bad bytes, a missing file, another architecture: one clear CheckpointError. Of a run the newest good checkpoint is
    taken; damaged ones that were passed over are named through `warn`.
    """
    path = Path(path)
    if not path.is_dir() and path.parent.name == "checkpoints" and path.parent.is_dir():
        there = sorted(found.name for found in path.parent.iterdir() if (found / STATE).exists())
        raise CheckpointError(
            f"{path.parent.parent} has no checkpoint '{path.name}'.", f"It has: {', '.join(there) or 'none yet'}."
        )
    if not path.is_dir():
        what = f"{path} is a file, not a model." if path.is_file() else f"There is no model folder at {path}."
        raise CheckpointError(what, "Name a Hugging Face folder or a run folder.")
    if (path / STATE).exists():
        check_checkpoint(path)
        folder = path.resolve()
        run = folder.parent.parent
        return _find_checkpoint(folder, run, f"{run.name}-{folder.name}")
    if (path / "checkpoints").is_dir():
        newest = newest_good(path, warn)
        if newest is None:
            raise CheckpointError(f"{path} has no checkpoint yet.", "Let the training run reach its first save.")
        return _find_checkpoint(newest, path, path.resolve().name)
    if "model_type" not in _json_or_empty(path / CONFIG):
        raise CheckpointError(
            f"{path} is not a model.", "Name a Hugging Face folder or a run folder with a checkpoint."
        )
    _check_promises(path)
    config, packed = read_published_config(path), path / PACKED
    if packed.is_file() and shard_files(path)[0].is_file():
        raise CheckpointError(
            f"{path} holds {PACKED} beside other weights, which may be another model's.", "Remove the one or the other."
        )
    if not packed.is_file() and MARK in _json_or_empty(path / CONFIG):
        raise CheckpointError(f"{packed} is missing.", "Copy the folder again.")
    return StoredModel(
        config=config,
        weights=PackedWeights(TensorFile(packed)) if packed.is_file() else FolderWeights(path, config),
        tokenizer=matching_tokenizer(path, config),
        folder=path,
        name=path.resolve().name,
        generation=_json_or_empty(path / "generation_config.json"),
        lineage=_json_or_empty(path / "lineage.json"),
        load_balance_coeff=_json_or_empty(path / CONFIG).get("load_balance_coeff", DEFAULT_BALANCE_COEFF),
    )


def shape_of(folder: Path) -> ModelConfig:
    """Of a model folder or a run, from its config.json alone."""
    values = _json_or_empty(folder / CONFIG)
    if "model_type" in values:
        return read_published_config(folder)
    if not isinstance(values.get("config"), dict):
        raise CheckpointError(f"{folder} is not a model.", "Name a Hugging Face folder or a run folder.")
    return from_dict(RunConfig, values["config"]).model


def _check_promises(folder: Path) -> None:
    """Where a manifest lies beside a model: what it is read from must be as sealed. Packed weights have sums of their
    own, so of them the size is enough; other files, such as the defaults of an answer, are free to change."""
    if (folder / MANIFEST).is_file():
        named = {told.split()[0]: told for told in altered_files(folder, known=(PACKED,))}
        changed = [told for name, told in named.items()
                   if name in (CONFIG, FILE, MANIFEST) or name.endswith((".safetensors", ".index.json"))]  # fmt: skip
        if changed:
            remedy = f"Copy the folder again. Without {MANIFEST} a model is taken as it is."
            raise CheckpointError(f"{folder} is not what its {MANIFEST} promises: {'; '.join(changed)}.", remedy)


def _find_checkpoint(folder: Path, run: Path, name: str) -> StoredModel:
    state = read_json_object(folder / STATE)
    config = from_dict(ModelConfig, state["model_config"])
    return StoredModel(
        config=config,
        weights=CheckpointWeights(folder / MODEL, config),
        tokenizer=tokenizer_of(run, state, folder),
        folder=folder,
        name=name,
        generation={},
        lineage=_json_or_empty(run / "lineage.json"),
        load_balance_coeff=_balance_coeff(run),
    )


def tokenizer_of(run: Path, state: dict[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer of a run's checkpoint, whose `state` is given; texts begin with the mark, as its documents did.

    A CheckpointError where tokenizer, checkpoint and the run's own record were not made together: what a model says
    through a tokenizer that it was not trained with is noise.
    """
    tokenizer, known = Tokenizer.load(run), _json_or_empty(run / CONFIG)
    rows, mark, data = state["model_config"]["vocab_size"], tokenizer.fingerprint, known.get("data_of_phases")
    begun = known.get("tokenizer_fingerprint", mark)
    if mark != begun or tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"{run}/{FILE} ({tokenizer.vocab_size} entries, {mark}) is not the tokenizer that this run's model of "
            f"{rows} rows was trained with{f' ({begun})' if mark != begun else ''}.",
            "Restore it from a copy: the run's data folder holds the same file.",
        )
    read = data and (data[0] if len(data) == 1 else fingerprint(data))
    model = known.get("config", {}).get("model", state["model_config"])
    if model != state["model_config"] or (read and state.get("data_fingerprint", read) != read):
        raise CheckpointError(
            f"{folder} is a checkpoint of another run than {run}: its model or its data is not that of {run}/{CONFIG}.",
            "Put it back into the run that made it: that has the tokenizer it was trained with.",
        )
    return tokenizer.with_begin_mark()


def _balance_coeff(run: Path) -> float:
    """The bias step of a run's balancing rule; the default where its configuration is not beside the checkpoint."""
    balance = _json_or_empty(run / CONFIG).get("config", {}).get("balance", {})
    names = {"smebu": "smebu_lambda", "sign": "sign_gamma"}
    return balance.get(names.get(balance.get("rule", ""), ""), DEFAULT_BALANCE_COEFF)


def _json_or_empty(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}
