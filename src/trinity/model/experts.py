"""Routed experts, stacked: three matrices an expert, one grouped matmul for all of them, and its plain twin.

Shapes: N tokens, K chosen, R = N x K routed rows, E experts, D width, F hidden width.
"""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from trinity.config.model import ModelConfig
from trinity.kernels.products import GroupedProduct, fits
from trinity.model.dispatch import Dispatch
from trinity.model.layers import GatePacked, SwiGLU
from trinity.model.router import Router, Routing


class Experts(nn.Module):
    """E SwiGLU experts. The published per-expert matrices are stacked along the first dimension (ckpt/names.py)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, hidden = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2, hidden, width))  # [:, 0] gate, [:, 1] up
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows [R, D] grouped by expert, ends [E] their cumulative counts -> [R, D], each through its own expert."""
        return through_experts(rows, ends, self.gate_up_proj, self.down_proj)


class MixtureOfExperts(nn.Module):
    """shared(x) + sum over the chosen experts of weight x expert(x). `expert_bias` belongs to selection alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared_experts = (
            SwiGLU(config.hidden_size, config.moe_intermediate_size * config.num_shared_experts)
            if config.num_shared_experts
            else None
        )
        self.expert_bias: Tensor
        self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, x: Tensor, dispatch: Dispatch) -> tuple[Tensor, Routing]:
        """x: [B, T, D] -> ([B, T, D], Routing over the B x T tokens). `dispatch` brings tokens to experts and back."""
        flat = x.flatten(0, 1)
        routing = self.router(flat, self.expert_bias)
        out = dispatch(self.experts, flat, routing)
        if self.shared_experts is not None:
            out = out + self.shared_experts(flat)
        return out.view_as(x), routing


def through_experts(rows: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """down[e](silu(gate[e](row)) * up[e](row)) for each expert's stretch of rows [R, D]; gate_up [E, 2, F, D]."""
    return grouped_matmul(GatePacked.apply(grouped_matmul(rows, gate_up, ends)), down, ends)


def grouped_matmul(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """rows[a:b] @ weights[e].T for each expert's stretch [a, b) of rows: [R, I] x [E, ..., I] -> [R, O].

    The middle dimensions of `weights` count together as O; `ends` [E] int64 are the cumulative row counts. On a CPU by
    the compiled kernels, else by grouped_mm, and by the loop where that does not take the shapes: its strides must be
    multiples of 16 bytes. Float32 shapes without values (a dry run) pass as on a CPU; grouped_mm refuses to trace them.
    """
    if fits(rows, weights) or (rows.dtype == torch.float32 and (rows.is_meta or isinstance(rows, FakeTensor))):
        return GroupedProduct.apply(rows, weights, ends)
    weights = weights.flatten(1, -2)
    aligned = 16 // rows.element_size()
    if rows.shape[1] % aligned or weights.shape[1] % aligned:
        return grouped_matmul_loop(rows, weights, ends)
    return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends.to(torch.int32))


def grouped_matmul_loop(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """The plain twin of `grouped_matmul`: one matmul an expert. (unbind, not indexing: its backward is one stack.)"""
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    weights = weights.flatten(1, -2)
    return torch.cat([part @ weight.T for part, weight in zip(rows.split(sizes), weights.unbind(0), strict=True)])
