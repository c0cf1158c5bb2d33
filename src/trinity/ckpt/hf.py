"""Read and write the published checkpoint format: a Hugging Face folder of an `AfmoeForCausalLM`.

Loading changes no value. Saving writes the published names, every router key, both RoPE forms, and the selection bias
in float32: engines that miss one of these fall back to other arithmetic without a word.
"""

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trinity.base.durable import open_to_readers, write_json
from trinity.base.errors import CheckpointError, ConfigError
from trinity.ckpt.names import published_tensors, slot_of
from trinity.ckpt.tensor_file import TensorFile
from trinity.ckpt.weights import FLOAT32_ALWAYS, model_of
from trinity.config.load import from_dict
from trinity.config.model import ModelConfig
from trinity.model.init import build_on_meta
from trinity.model.transformer import Transformer

SHARD_BYTES = 5 * 10**9
DEFAULT_BALANCE_COEFF = 5e-4  # SMEBU's lambda of Trinity Large
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # narrower ones have scales of their own
INDEX = "model.safetensors.index.json"
_SHARED_KEYS = [name for name in ModelConfig.__dataclass_fields__ if name != "mup_enabled"]
_FIXED = {
    "architectures": ["AfmoeForCausalLM"],
    "model_type": "afmoe",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "score_func": "sigmoid",
    "route_norm": True,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_groups": 1,
    "num_limited_groups": 1,
    "rope_scaling": None,
    "use_cache": True,
    "use_grouped_mm": True,
}
# Published keys that change the arithmetic: a checkpoint with another value is not the model we implement.
_NO_SCALING = (None, "default")
_DEMANDED = ("hidden_act", "attention_bias", "tie_word_embeddings", "score_func", "route_norm", "n_group", "topk_group",
             "num_expert_groups", "num_limited_groups")  # fmt: skip


def published_config(config: ModelConfig, dtype: torch.dtype, load_balance_coeff: float) -> dict[str, Any]:
    """The config.json of a model: all that transformers, vLLM, SGLang and llama.cpp read, under old and new names."""
    return {
        **_FIXED,
        **{name: getattr(config, name) for name in _SHARED_KEYS},
        "mup_enabled": config.mup_enabled,
        "layer_types": config.layer_types,
        "num_local_experts": config.num_experts,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": 0.02,
        "load_balance_coeff": load_balance_coeff,
        "dtype": str(dtype).removeprefix("torch."),
    }


def config_from_published(values: dict[str, Any], where: Path) -> ModelConfig:
    """A ModelConfig from a published config.json; CheckpointError where it asks for arithmetic that AFMoE has not."""
    if values.get("model_type") != "afmoe":
        raise CheckpointError(
            f"{where} holds a '{values.get('model_type')}' model.",
            "Only AFMoE models (the Trinity family) can be read.",
        )
    for key in _DEMANDED:
        if key in values and values[key] != _FIXED[key]:
            raise CheckpointError(
                f"{where}: {key} is {values[key]!r}; AFMoE has {_FIXED[key]!r}.", "It cannot be read."
            )
    rope = values.get("rope_parameters") or {}
    if (
        values.get("rope_scaling")
        or set(rope) - {"rope_type", "rope_theta"}
        or rope.get("rope_type") not in _NO_SCALING
    ):
        raise CheckpointError(
            f"{where} asks for RoPE scaling.", "The published Trinity models use none; it cannot be read."
        )
    known = {name: values[name] for name in [*_SHARED_KEYS, "mup_enabled"] if name in values}
    if "rope_theta" in rope:
        known["rope_theta"] = rope["rope_theta"]
    missing = [name for name in [*_SHARED_KEYS, "mup_enabled"] if name not in known]
    if missing:  # programs differ in what they take for granted
        raise CheckpointError(
            f"{where} is not a whole AFMoE configuration: it lacks {', '.join(missing)}.", "Copy the file again."
        )
    try:
        config = from_dict(ModelConfig, known)
    except ConfigError as error:
        raise CheckpointError(f"{where} is not a whole AFMoE configuration: {error}") from error
    if values.get("layer_types", config.layer_types) != config.layer_types:
        raise CheckpointError(
            f"{where}: layer_types is not one global layer in every {config.global_attn_every_n_layers}.",
            "Such a schedule cannot be read.",
        )
    return config


def read_published_config(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json.", "Name a Hugging Face folder or a run folder.")
    return config_from_published(read_json_object(path), path)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder; a CheckpointError where it holds anything else."""
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}.", "Copy the file again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object.", "Copy the file again.")
    return values


class FolderWeights:
    """The weights of a Hugging Face folder by our names, read when they are asked for.

    CheckpointError at once where a file is missing or cut off, or where files and config.json do not belong together.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        wanted = build_on_meta(config).state_dict()
        self._meta = wanted
        self._where: dict[str, TensorFile] = {}
        for file in map(TensorFile, shard_files(folder)):
            for name, stored in file.tensors.items():
                if stored.dtype not in _DTYPES:
                    kind = str(stored.dtype).removeprefix("torch.")
                    raise CheckpointError(f"{file.path}: {name} is in {kind}.", "Take the model in bfloat16.")
                slot = slot_of(name, wanted)
                if slot is None or name in self._where:  # a second one, which might differ from the first
                    raise CheckpointError(
                        f"{file.path}: unexpected tensor {name}.", "config.json and the weights do not belong together."
                    )
                if slot[1].shape != stored.shape:
                    raise CheckpointError(
                        f"{file.path}: {name} has shape {list(stored.shape)}, config.json asks for "
                        f"{list(slot[1].shape)}.",
                        "config.json and the weights do not belong together.",
                    )
                self._where[name] = file
        missing = [name for name, _ in published_tensors(wanted) if name not in self._where]
        if missing:
            first = ", ".join(missing[:3])
            raise CheckpointError(
                f"{folder} lacks {len(missing)} tensors, among them {first}.", "Copy the folder again."
            )

    @property
    def in_bfloat16(self) -> bool:
        """Whether bfloat16 holds every matrix as it is stored, but for what is float32 in any case."""
        return all(
            file.tensors[name].dtype == torch.bfloat16 or name.endswith(FLOAT32_ALWAYS)
            for name, file in self._where.items()
        )

    def published(self, name: str) -> Tensor:
        """A tensor by its published name."""
        return self._where[name].read(name)

    def tensor(self, name: str) -> Tensor:
        ((published, _),) = published_tensors({name: self._meta[name]})
        return self.published(published)

    def experts(self, name: str) -> Iterator[Tensor]:
        names = [published for published, _ in published_tensors({name: self._meta[name]})]
        each = len(names) // len(self._meta[name])  # gate and up, or down alone
        for start in range(0, len(names), each):
            parts = [self.published(published) for published in names[start : start + each]]
            yield torch.stack(parts) if each > 1 else parts[0]


def read_hf(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model of a Hugging Face folder; see `model_of`."""
    config = read_published_config(folder)
    return model_of(config, FolderWeights(folder, config), dtype)


def write_hf(
    folder: Path,
    model: Transformer,
    dtype: torch.dtype = torch.float32,
    load_balance_coeff: float = DEFAULT_BALANCE_COEFF,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json and the weights (sharded by `shard_bytes`) into an existing folder.

    Tokenizer, generation_config, card and manifest are the bundle's (release/bundle.py).
    """
    config = published_config(model.config, dtype, load_balance_coeff)
    write_json(folder / "config.json", config)
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in published_tensors(model.state_dict()):
        saved = tensor.detach().to(torch.float32 if name.endswith("expert_bias") else dtype).contiguous()
        bytes_ = saved.numel() * saved.element_size()
        if size and size + bytes_ > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = saved
        size, total = size + bytes_, total + bytes_
    if len(shards) == 1:
        _write_shard(folder / "model.safetensors", shards[0])
        return
    where = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, shard)
        where |= dict.fromkeys(shard, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    # Views of one stack share storage, which safetensors refuses; each tensor gets its own.
    try:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise _storage_error(error, path) from error
    open_to_readers(path)  # safetensors wrote it under a temporary name, as a file of this account alone


def _storage_error(error: SafetensorError, path: Path) -> OSError | CheckpointError:
    """safetensors hides the errno in its text; a full disk must be recognised as one."""
    if "os error 28" in str(error) or "No space left" in str(error):
        return OSError(errno.ENOSPC, "No space left on device", str(path))
    return CheckpointError(f"{path} could not be written: {error}.", "See the message of the file system.")


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, named by its index or the single one."""
    index = folder / INDEX
    if not index.exists():
        return [folder / "model.safetensors"]
    where = read_json_object(index).get("weight_map")
    # A name with a path in it would read, and import would then miss, a file outside the folder.
    if not isinstance(where, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in where.values()
    ):
        raise CheckpointError(f"{index} does not name the files of this folder.", "Copy the file again.")
    return [folder / file for file in sorted(set(where.values()))]
