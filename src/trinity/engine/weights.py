"""Weights as the compiled decoder reads them: in panels, in float32, bfloat16, 8 or 4 bits (kernels/panels.h).

8 and 4 bits: whole numbers and a float16 scale for every 32 values along the depth; inputs stay float32. Router, norms,
selection bias are float32 in every kind; embeddings, of which a token reads one row, bfloat16 where weights are fewer
bits. `unpacked` is the twin: the values that the decoder computes with.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from trinity.model.block import Block
from trinity.model.experts import MixtureOfExperts
from trinity.model.layers import SwiGLU
from trinity.model.transformer import Transformer

Kind = Literal["float32", "bfloat16", "int8", "int4"]
PANEL, GROUP = 64, 32


@dataclass(frozen=True)
class Packed:
    """Matrices [..., N, K] in panels [..., P, K, 64]; for 8 and 4 bits with scales [..., P, K / 32, 64], else empty."""

    values: Tensor  # float32, bfloat16, int8, or uint8 [..., P, K / 2, 64] with two depths a byte, the first low
    scales: Tensor  # float16

    def unpacked(self, outputs: int) -> Tensor:
        """[..., N, K] float32."""
        values = self.values
        if values.dtype == torch.uint8:
            pairs = torch.stack((values & 15, values >> 4), dim=-2)  # [..., P, K / 2, 2, 64]
            values = pairs.flatten(-3, -2).float() - 8
        values = values.float()
        if self.scales.numel():
            values = values * self.scales.float().repeat_interleave(GROUP, dim=-2)
        return values.transpose(-1, -2).flatten(-3, -2)[..., :outputs, :]


def packed(matrices: Tensor, kind: Kind) -> Packed:
    """matrices [..., N, K]. A depth that is no multiple of 32 stays in float32 where 8 or 4 bits are asked for."""
    outputs, depth = matrices.shape[-2:]
    none = torch.empty(0, dtype=torch.float16)
    if depth % GROUP and kind in ("int8", "int4"):
        kind = "float32"
    panels = F.pad(matrices.float(), (0, 0, 0, -outputs % PANEL)).unflatten(-2, (-1, PANEL)).transpose(-1, -2)
    if kind in ("float32", "bfloat16"):
        return Packed(panels.to(getattr(torch, kind)).contiguous(), none)
    groups = panels.unflatten(-2, (-1, GROUP))  # [..., P, K / 32, 32, 64]
    scales = _scales(groups, 127 if kind == "int8" else 7)
    low, high = (-127, 127) if kind == "int8" else (-8, 7)
    whole = (groups / scales.float().clamp(min=1e-30).unsqueeze(-2)).round().clamp(low, high).flatten(-3, -2)
    if kind == "int8":
        return Packed(whole.to(torch.int8).contiguous(), scales.contiguous())
    nibbles = (whole + 8).to(torch.uint8).unflatten(-2, (-1, 2))
    return Packed((nibbles[..., 0, :] | nibbles[..., 1, :] << 4).contiguous(), scales.contiguous())


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


def interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [..., F, D] -> [..., 2 F', D]: 32 of the one, 32 of the other, in turns, so that a panel has both."""
    half, rows = PANEL // 2, gate.shape[-2]
    gate, up = (F.pad(m, (0, 0, 0, -rows % half)).unflatten(-2, (-1, half)) for m in (gate, up))
    return torch.cat((gate, up), dim=-2).flatten(-3, -2)


@dataclass(frozen=True)
class DecoderWeights:
    """What torch.classes.trinity.Decoder is made of: see its constructor in kernels/decoder.cpp."""

    shape: list[int]
    constants: list[float]
    tensors: list[Tensor]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def decoder_weights(model: Transformer, kind: Kind) -> DecoderWeights:
    """The weights of a model in panels; one layer at a time is held twice."""
    config = model.config
    frequencies = 1.0 / config.rope_theta ** (
        torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    )
    few = kind in ("int8", "int4")
    embedding = model.embed_tokens.weight.detach()
    tensors = [embedding.bfloat16() if few or kind == "bfloat16" else embedding.float().contiguous()]
    tensors += [model.norm.weight.detach().float(), *_two(model.lm_head.weight, "int8" if few else kind)]
    for block in model.layers:
        assert isinstance(block, Block)
        tensors += _layer(block, kind)
    shape = [config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads,
             config.num_key_value_heads, config.head_dim, config.num_experts, config.num_experts_per_tok,
             config.sliding_window, config.intermediate_size, config.moe_intermediate_size,
             config.moe_intermediate_size * config.num_shared_experts]  # fmt: skip
    shape += [int(config.is_global(layer)) for layer in range(config.num_hidden_layers)]
    shape += [int(config.is_sparse(layer)) for layer in range(config.num_hidden_layers)]
    scale = config.hidden_size**0.5 if config.mup_enabled else 1.0
    return DecoderWeights(shape, [config.rms_norm_eps, config.route_scale, scale, *frequencies.tolist()], tensors)


@torch.no_grad()
def _layer(block: Block, kind: Kind) -> Iterator[Tensor]:
    attention, mlp = block.self_attn, block.mlp
    for norm in (block.input_layernorm, attention.q_norm, attention.k_norm, block.post_attention_layernorm,
                 block.pre_mlp_layernorm, block.post_mlp_layernorm):  # fmt: skip
        yield norm.weight.float().contiguous()
    heads = (attention.q_proj, attention.k_proj, attention.v_proj, attention.gate_proj)
    yield from _two(torch.cat([projection.weight for projection in heads]), kind)
    yield from _two(attention.o_proj.weight, kind)
    if not isinstance(mlp, MixtureOfExperts):
        yield from _feed_forward(mlp, kind)
        return
    gate, up = mlp.experts.gate_up_proj.unbind(1)
    yield from _two(interleaved(gate, up), kind)
    yield from _two(mlp.experts.down_proj, kind)
    yield from _two(mlp.router.gate.weight, "float32")
    yield mlp.expert_bias.float().contiguous()
    if mlp.shared_experts is not None:
        yield from _feed_forward(mlp.shared_experts, kind)


def _feed_forward(mlp: SwiGLU, kind: Kind) -> Iterator[Tensor]:
    yield from _two(interleaved(mlp.gate_proj.weight, mlp.up_proj.weight), kind)
    yield from _two(mlp.down_proj.weight, kind)


@torch.no_grad()
def _two(matrices: Tensor, kind: Kind) -> Iterator[Tensor]:
    made = packed(matrices.detach(), kind)
    yield made.values
    yield made.scales
