"""Weights that are read when they are asked for, by our names: of a model in memory, a run's checkpoint, a folder."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from trinity.base.errors import CheckpointError
from trinity.base.progress import progress
from trinity.ckpt.shards import StoredPart
from trinity.ckpt.tensor_file import TensorFile
from trinity.config.model import ModelConfig
from trinity.model.init import build_on_meta
from trinity.model.transformer import Transformer

PACKED = "packed.safetensors"  # of a folder that holds weights as the engine has them
MARK = "trinity_packed"  # a key of its config.json
FLOAT32_ALWAYS = ("expert_bias", "router.gate.weight", "norm.weight", "layernorm.weight")


class Weights(Protocol):
    def tensor(self, name: str) -> Tensor:
        """A whole tensor, as it is stored."""
        ...

    def experts(self, name: str) -> Iterator[Tensor]:
        """A stack of experts, one at a time."""
        ...


class HeldWeights:
    """Of a state dict."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def tensor(self, name: str) -> Tensor:
        return self._state[name].detach()

    def experts(self, name: str) -> Iterator[Tensor]:
        yield from self.tensor(name)


class CheckpointWeights:
    """Of a checkpoint of a run, whose bytes have been checked. CheckpointError where it is of another architecture."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self._part = StoredPart(folder)
        self._part.check(build_on_meta(config).state_dict())

    def tensor(self, name: str) -> Tensor:
        stored = self._part.tensors[name]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        self._part.read_into({name: tensor})
        return tensor

    def experts(self, name: str) -> Iterator[Tensor]:
        yield from self.tensor(name)


class PackedWeights:
    """Of a folder that `trinity export --format packed` wrote: only the engine reads its file."""

    def __init__(self, file: TensorFile) -> None:
        self.file = file

    def refuse(self) -> NoReturn:
        raise CheckpointError(
            f"{self.file.path.parent} holds weights packed for inference.", "Name the model that it was exported from."
        )

    def tensor(self, name: str) -> NoReturn:
        self.refuse()

    def experts(self, name: str) -> NoReturn:
        self.refuse()


def model_of(
    config: ModelConfig, weights: Weights, dtype: torch.dtype = torch.float32, label: str = "Reading a model"
) -> Transformer:
    """A model in `dtype`, in memory once; router, norms and selection bias are float32 in any case."""
    model = build_on_meta(config)
    state = {
        name: keep_precision(name, torch.empty(meta.shape, dtype=dtype), dtype)
        for name, meta in model.state_dict().items()
    }
    with progress(label, sum(tensor.nbytes for tensor in state.values())) as advance:
        for name, tensor in state.items():
            places, values = (tensor, weights.experts(name)) if tensor.dim() > 2 else ([tensor], [weights.tensor(name)])
            for place, value in zip(places, values, strict=True):
                place.copy_(value)
                advance(place.nbytes)
    model.load_state_dict(state, assign=True)
    return model


def keep_precision(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in `dtype`, or in float32 where it decides routing or normalises (design: numerical contract)."""
    return tensor.to(torch.float32 if name.endswith(FLOAT32_ALWAYS) else dtype)
