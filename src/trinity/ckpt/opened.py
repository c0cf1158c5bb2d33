"""MODEL, wherever a command takes one: a Hugging Face folder, a run folder, or one checkpoint of a run."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trinity.base.errors import CheckpointError, UsageError
from trinity.base.lineage import fingerprint
from trinity.base.run import CONFIG
from trinity.ckpt.folder import MODEL, STATE, check_checkpoint, newest_good
from trinity.ckpt.hf import DEFAULT_BALANCE_COEFF, keep_precision, read_hf, read_json_object, read_published_config
from trinity.ckpt.model_folder import matching_tokenizer
from trinity.ckpt.shards import StoredPart
from trinity.config.load import from_dict
from trinity.config.model import ModelConfig
from trinity.model.init import build_on_meta
from trinity.model.transformer import Transformer
from trinity.text.tokenizer import FILE, Tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    model: Transformer
    tokenizer: Tokenizer
    folder: Path  # where the weights were read from
    name: str
    generation: dict[str, Any]  # generation_config.json, empty where there is none
    lineage: dict[str, Any]
    load_balance_coeff: float  # step of the selection biases in pretraining, as published in config.json

    @property
    def ends_turns(self) -> bool:
        """Whether generation_config.json ends an answer at <|im_end|>, as that of a fine-tuned model does."""
        ends = self.generation.get("eos_token_id")
        return self.tokenizer.im_end_id in (ends if isinstance(ends, list) else [ends])


class DescribedModel(NamedTuple):
    """All of a model but its weights."""

    config: ModelConfig
    tokenizer: Tokenizer
    folder: Path  # of the weights
    run: Path | None  # whose checkpoint that is
    name: str


def to_stderr(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def open_model(path: Path | str, dtype: str = "float32", warn: Callable[[str], None] = to_stderr) -> OpenedModel:
    """Load a model for inference. Bad bytes, a missing file, another architecture: one clear CheckpointError.

    Of a run the newest good checkpoint is taken; damaged ones that were passed over are named through `warn`.
    """
    if dtype not in _DTYPES:
        raise UsageError(f"dtype '{dtype}' is not offered.", f"Choose one of {', '.join(_DTYPES)}.")
    found = describe_model(path, warn)
    folder, run = found.folder, found.run
    model = read_hf(folder, _DTYPES[dtype]) if run is None else _read_checkpoint(found, _DTYPES[dtype])
    generation = _json_or_empty(folder / "generation_config.json") if run is None else {}
    coefficient = _json_or_empty(folder / CONFIG).get("load_balance_coeff", DEFAULT_BALANCE_COEFF)
    return OpenedModel(
        model=model.eval().requires_grad_(False),
        tokenizer=found.tokenizer,
        folder=folder,
        name=found.name,
        generation=generation,
        lineage=_json_or_empty((run or folder) / "lineage.json"),
        load_balance_coeff=coefficient if run is None else _balance_coeff(run),
    )


def describe_model(path: Path | str, warn: Callable[[str], None] = to_stderr) -> DescribedModel:
    """The same without the weights: what a model is, and where."""
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
        return _describe_checkpoint(folder, run, f"{run.name}-{folder.name}")
    if (path / "checkpoints").is_dir():
        newest = newest_good(path, warn)
        if newest is None:
            raise CheckpointError(f"{path} has no checkpoint yet.", "Let the training run reach its first save.")
        return _describe_checkpoint(newest, path, path.resolve().name)
    if "model_type" not in _json_or_empty(path / CONFIG):
        raise CheckpointError(
            f"{path} is not a model.", "Name a Hugging Face folder or a run folder with a checkpoint."
        )
    config = read_published_config(path)
    return DescribedModel(config, matching_tokenizer(path, config), path, None, path.resolve().name)


def _describe_checkpoint(folder: Path, run: Path, name: str) -> DescribedModel:
    state = read_json_object(folder / STATE)
    tokenizer = tokenizer_of(run, state, folder)
    return DescribedModel(from_dict(ModelConfig, state["model_config"]), tokenizer, folder, run, name)


def _read_checkpoint(found: DescribedModel, dtype: torch.dtype) -> Transformer:
    model = build_on_meta(found.config)
    weights = {
        key: keep_precision(key, torch.empty(meta.shape, dtype=dtype), dtype)
        for key, meta in model.state_dict().items()
    }
    StoredPart(found.folder / MODEL).read_into(weights)  # converts on the way: one copy of the weights in memory
    model.load_state_dict(weights, assign=True)
    return model


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
