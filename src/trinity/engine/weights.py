"""Weights as the compiled decoder reads them: in panels, in float32, bfloat16, 8 or 4 bits (kernels/panels.h).

8 and 4 bits: whole numbers and a float16 scale for every 32 values along the depth; inputs stay float32. Router, norms,
selection bias are float32 in every kind; embeddings, of which a token reads one row, bfloat16 where weights are fewer
bits, and the head has 8 bits. A matrix is one piece of bytes, its panels and then its scales; an expert is one record:
what gate and up are made of, then down. `unpacked` is the twin: the values that the decoder computes with.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from trinity.base.errors import CheckpointError, UsageError
from trinity.ckpt.weights import Weights
from trinity.config.model import ModelConfig
from trinity.kernels.compiled import is_loaded
from trinity.plan.inference import GROUP, PANEL, matrix_bytes, record_bytes

Kind = Literal["float32", "bfloat16", "int8", "int4"]
Dtype = Literal["float32", "bfloat16", "float8", "int8", "int4"]  # float8 is for GPUs: see narrow.py
KINDS: tuple[Kind, ...] = get_args(Kind)  # in the order of kernels/panels.h
NARROW = ("int8", "int4")
WIDEST = 65504 * 7  # of 4 bits, whose scale is a float16
_BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}


def dtype_named(name: str) -> Dtype:
    if name not in get_args(Dtype):
        raise UsageError(f"dtype '{name}' is not offered.", f"Choose one of {', '.join(get_args(Dtype))}.")
    return cast(Dtype, name)


def kind_named(name: str) -> Kind:
    assert name in KINDS, f"{name} was to be refused before"
    return name


def fitted(kind: Kind, depth: int) -> Kind:
    """A depth that is no multiple of 32 stays in float32 where 8 or 4 bits are asked for."""
    return "float32" if depth % GROUP and kind in NARROW else kind


def packed(matrices: Tensor, kind: Kind, name: str = "A matrix") -> Tensor:
    """matrices [..., N, K] -> uint8 [..., bytes of one]. CheckpointError where 8 or 4 bits cannot keep a value."""
    *stack, outputs, depth = matrices.shape
    if matrices.numel() and fitted(kind, depth) in NARROW:
        low, high = matrices.aminmax()  # a nan makes both nan
        if not (low >= -WIDEST and high <= WIDEST):
            raise CheckpointError(
                f"{name} has values from {float(low):g} to {float(high):g}, which {kind} cannot keep.",
                "Its weights are damaged, or need --dtype bfloat16.",
            )
    if matrices.dtype != torch.bfloat16:
        matrices = matrices.float()
    if matrices.device.type != "cpu" or not is_loaded():
        return packed_plainly(matrices, kind)
    out = torch.empty(*stack, matrix_bytes(outputs, depth, kind), dtype=torch.uint8)
    torch.ops.trinity.pack(matrices.reshape(-1, outputs, depth).contiguous(), KINDS.index(kind), out)
    return out


def packed_plainly(matrices: Tensor, kind: Kind) -> Tensor:
    """The twin of kernels/pack.cpp. A scale of 4 bits may be the one beside, where two leave the same error."""
    outputs, depth = matrices.shape[-2:]
    kind = fitted(kind, depth)
    panels = F.pad(matrices.float(), (0, 0, 0, -outputs % PANEL)).unflatten(-2, (-1, PANEL)).transpose(-1, -2)
    if kind not in NARROW:
        return _bytes(panels.to(getattr(torch, kind)))
    groups = panels.unflatten(-2, (-1, GROUP))  # [..., P, K / 32, 32, 64]
    scales = _scales(groups, 127 if kind == "int8" else 7)
    low, high = (-127, 127) if kind == "int8" else (-8, 7)
    whole = (groups / scales.float().clamp(min=1e-30).unsqueeze(-2)).round().clamp(low, high).flatten(-3, -2)
    if kind == "int8":
        return torch.cat((_bytes(whole.to(torch.int8)), _bytes(scales)), dim=-1)
    nibbles = (whole + 8).to(torch.uint8).unflatten(-2, (-1, 2))  # two depths a byte, the first in the low half
    return torch.cat((_bytes(nibbles[..., 0, :] | nibbles[..., 1, :] << 4), _bytes(scales)), dim=-1)


def _bytes(panels: Tensor) -> Tensor:
    """[..., P, K, 64] -> uint8 [..., bytes]."""
    return panels.contiguous().flatten(-3).view(torch.uint8)


def _scales(groups: Tensor, most: int) -> Tensor:
    """groups [..., 32, 64] -> float16 [..., 64]: what makes the largest of each column of 32 `most`, or for 4 bits
    the one of a few near it that leaves the least squared error."""
    widest = groups.abs().amax(-2)
    if most == 127:
        return (widest / most).half()
    best, least = (widest / most).half(), torch.full_like(widest, torch.inf)
    for part in (7.0, 7.4, 7.8, 8.2, 8.6):
        scale = (widest / part).half()
        step = scale.float().clamp(min=1e-30).unsqueeze(-2)
        error = ((groups / step).round().clamp(-8, 7) * step - groups).square().sum(-2)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def unpacked(record: Tensor, outputs: int, depth: int, kind: Kind) -> Tensor:
    """uint8 [..., bytes] -> [..., outputs, depth] float32."""
    values, scales = unpaneled(record, outputs, depth, kind)
    if fitted(kind, depth) in NARROW:
        return values.float() * scales.float().repeat_interleave(GROUP, dim=-1)
    return values.float()


def unpaneled(record: Tensor, outputs: int, depth: int, kind: Kind) -> tuple[Tensor, Tensor]:
    """uint8 [..., bytes] -> [..., outputs, depth] of float32, bfloat16 or int8, the whole numbers of 8 or 4 bits; and
    float16 [..., outputs, depth / 32], their scales."""
    kind, panels = fitted(kind, depth), -(-outputs // PANEL)
    size = panels * PANEL * depth * _BITS[kind] // 8
    values, scales = record[..., :size].contiguous(), record[..., size:].contiguous().view(torch.float16)
    if kind == "int4":
        pairs = torch.stack(
            ((values & 15).unflatten(-1, (-1, PANEL)), (values >> 4).unflatten(-1, (-1, PANEL))), dim=-2
        )
        values = (pairs.flatten(-3) - 8).view(torch.int8)
    else:
        values = values.view(torch.int8 if kind == "int8" else getattr(torch, kind))

    def rows(panels_of: Tensor, length: int) -> Tensor:
        return panels_of.unflatten(-1, (panels, length, PANEL)).transpose(-1, -2).flatten(-3, -2)[..., :outputs, :]

    return rows(values, depth), rows(scales, depth // GROUP if kind in NARROW else 0)


def interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [..., F, D] -> [..., 2 F', D]: 32 of the one, 32 of the other, in turns, so that a panel has both."""
    half, rows = PANEL // 2, gate.shape[-2]
    gate, up = (F.pad(m, (0, 0, 0, -rows % half)).unflatten(-2, (-1, half)) for m in (gate, up))
    return torch.cat((gate, up), dim=-2).flatten(-3, -2)


def interleaved_rows(hidden: int) -> int:
    """2 F' of a hidden width F."""
    return -(-hidden // (PANEL // 2)) * PANEL


class Place(NamedTuple):
    """One tensor of the decoder: a vector or a table of floats, a matrix as bytes, or records of experts [E, bytes]."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def layout(config: ModelConfig, kind: Kind) -> list[Place]:
    """Every tensor of the decoder, in the order in which it takes them."""
    width, heads, size = config.hidden_size, config.num_attention_heads, config.head_dim
    places = []

    def vector(name: str, length: int) -> None:
        places.append(Place(name, torch.float32, (length,)))

    def matrix(name: str, outputs: int, depth: int, kind: Kind = kind) -> None:
        places.append(Place(name, torch.uint8, (matrix_bytes(outputs, depth, kind),)))

    def feed_forward(name: str, hidden: int) -> None:
        matrix(f"{name}.gate_up", interleaved_rows(hidden), width)
        matrix(f"{name}.down", width, hidden)

    embedding = torch.float32 if kind == "float32" else torch.bfloat16
    places.append(Place("embedding", embedding, (config.vocab_size, width)))
    vector("norm", width)
    matrix("head", config.vocab_size, width, head_kind(kind))
    for layer in range(config.num_hidden_layers):
        block = f"layers.{layer}"
        for norm in _NORMS:
            vector(f"{block}.{norm}", size if norm in ("self_attn.q_norm", "self_attn.k_norm") else width)
        matrix(f"{block}.heads", 2 * (heads + config.num_key_value_heads) * size, width)
        matrix(f"{block}.out", width, heads * size)
        if not config.is_sparse(layer):
            feed_forward(f"{block}.mlp", config.intermediate_size)
            continue
        places.append(Place(f"{block}.experts", torch.uint8, (config.num_experts, record_bytes(config, kind))))
        matrix(f"{block}.router", config.num_experts, width, "float32")
        vector(f"{block}.expert_bias", config.num_experts)
        if config.num_shared_experts:
            feed_forward(f"{block}.shared", config.moe_intermediate_size * config.num_shared_experts)
    return places


_NORMS = ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm", "pre_mlp_layernorm",
          "post_mlp_layernorm")  # fmt: skip


def head_kind(kind: Kind) -> Kind:
    return "int8" if kind in NARROW else kind


@torch.no_grad()
def pack(config: ModelConfig, weights: Weights, kind: Kind) -> Iterator[tuple[str, Tensor]]:
    """The values of `layout`, in its order: each tensor whole, or an expert at a time. Holds little more than one."""

    def matrix(name: str, kind: Kind = kind) -> Tensor:
        return packed(weights.tensor(f"{name}.weight"), kind, name)

    def feed_forward(name: str, ours: str) -> Iterator[tuple[str, Tensor]]:
        gate, up = (weights.tensor(f"{ours}.{part}_proj.weight") for part in ("gate", "up"))
        yield f"{name}.gate_up", packed(interleaved(gate, up), kind, ours)
        yield f"{name}.down", matrix(f"{ours}.down_proj")

    embedding = weights.tensor("embed_tokens.weight")
    yield "embedding", embedding.float() if kind == "float32" else embedding.bfloat16()
    yield "norm", weights.tensor("norm.weight").float()
    yield "head", matrix("lm_head", head_kind(kind))
    for layer in range(config.num_hidden_layers):
        block = f"layers.{layer}"
        for norm in _NORMS:
            yield f"{block}.{norm}", weights.tensor(f"{block}.{norm}.weight").float()
        heads = [weights.tensor(f"{block}.self_attn.{part}_proj.weight") for part in ("q", "k", "v", "gate")]
        yield f"{block}.heads", packed(torch.cat(heads), kind, f"{block}.self_attn")
        yield f"{block}.out", matrix(f"{block}.self_attn.o_proj")
        mlp = f"{block}.mlp"
        if not config.is_sparse(layer):
            yield from feed_forward(mlp, mlp)
            continue
        stacks = (weights.experts(f"{mlp}.experts.{part}") for part in ("gate_up_proj", "down_proj"))
        for (gate, up), down in zip(*stacks, strict=True):
            parts = (packed(part, kind, f"{mlp}.experts") for part in (interleaved(gate, up), down))
            yield f"{block}.experts", torch.cat(tuple(parts))
        yield f"{block}.router", matrix(f"{mlp}.router.gate", "float32")
        yield f"{block}.expert_bias", weights.tensor(f"{mlp}.expert_bias").float()
        if config.num_shared_experts:
            yield from feed_forward(f"{block}.shared", f"{mlp}.shared_experts")


@dataclass(frozen=True)
class DecoderWeights:
    """What torch.classes.trinity.Decoder is made of: see its constructor in kernels/decoder.cpp."""

    config: ModelConfig
    kind: Kind
    tensors: Mapping[str, Tensor]  # all of `layout`; records of experts are missing where a cache holds them
    cache: Any = field(default=None)  # torch.classes.trinity.ExpertCache

    @property
    def bytes(self) -> int:
        """Of what is in memory at all times."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def decoder(self) -> Any:
        none = torch.empty(0, dtype=torch.uint8)
        tensors = [self.tensors.get(place.name, none) for place in layout(self.config, self.kind)]
        return torch.classes.trinity.Decoder(
            _shape(self.config, self.kind), _constants(self.config), tensors, self.cache
        )


def decoder_weights(
    config: ModelConfig, weights: Weights, kind: Kind, advance: Callable[[int], None] = lambda _: None
) -> DecoderWeights:
    """All weights packed into memory; of the others little more than a tensor is held at any time.

    `advance` is told the bytes that were made.
    """
    tensors = {place.name: torch.empty(place.shape, dtype=place.dtype) for place in layout(config, kind)}
    filled = dict.fromkeys(tensors, 0)
    for name, part in pack(config, weights, kind):
        flat = tensors[name].view(-1)
        flat[filled[name] : filled[name] + part.numel()] = part.flatten()
        filled[name] += part.numel()
        advance(part.nbytes)
    assert all(filled[name] == tensor.numel() for name, tensor in tensors.items())
    return DecoderWeights(config, kind, tensors)


def _shape(config: ModelConfig, kind: Kind) -> list[int]:
    layers = range(config.num_hidden_layers)
    return [config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads,
            config.num_key_value_heads, config.head_dim, config.num_experts, config.num_experts_per_tok,
            config.sliding_window, config.intermediate_size, config.moe_intermediate_size,
            config.moe_intermediate_size * config.num_shared_experts, KINDS.index(kind), KINDS.index(head_kind(kind)),
            *(int(config.is_global(layer)) for layer in layers),
            *(int(config.is_sparse(layer)) for layer in layers)]  # fmt: skip


def _constants(config: ModelConfig) -> list[float]:
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (even / config.head_dim)
    scale = config.hidden_size**0.5 if config.mup_enabled else 1.0
    return [config.rms_norm_eps, config.route_scale, scale, *frequencies.tolist()]
