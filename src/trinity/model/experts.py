"""Routed experts, stacked: three matrices an expert, and every token through those it chose.

Shapes: N tokens, K chosen, R = N x K routed rows, E experts, D width, F hidden width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trinity.config.model import ModelConfig
from trinity.kernels.compiled import fits
from trinity.kernels.experts import RoutedExperts
from trinity.model.dispatch import Dispatch
from trinity.model.layers import GatePacked, SwiGLU
from trinity.model.router import Router, Routing
from trinity.model.rows import CombineRows, GatherRows, inverse


class Experts(nn.Module):
    """E SwiGLU experts. The published per-expert matrices are stacked along the first dimension (ckpt/names.py)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, hidden = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2, hidden, width))  # [:, 0] gate, [:, 1] up
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x: Tensor, weights: Tensor | None, order: Tensor, ends: Tensor) -> Tensor:
        """x [N, D], weights [N, K] -> [N, D]: see `through_experts`."""
        return through_experts(x, weights, order, ends, self.gate_up_proj, self.down_proj)

    def by_row(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x [N, D], weights and chosen [N, K] -> [N, D]: see `one_by_one`."""
        return one_by_one(x, weights, chosen, self.chosen)

    def chosen(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of the matrices of an expert for each of `choice` [N]."""
        return self.gate_up_proj.index_select(0, choice), self.down_proj.index_select(0, choice)


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


def through_experts(
    x: Tensor, weights: Tensor | None, order: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """sum over a token's choices of weight x down[e](silu(gate[e](x)) * up[e](x)): x [N, D], weights [N, K] -> [N, D].

    order [R] groups the rows by expert: row r is choice order[r] % K of token order[r] // K; ends [E] are the
    cumulative counts, int64; gate_up [E, 2, F, D]; down [E, D, F]. Without weights each row of x goes through one
    expert, K = 1. On a CPU by the compiled kernels.
    """
    if fits(x, gate_up, down):
        weights = x.new_ones(len(x), 1) if weights is None else weights
        return RoutedExperts.apply(x, gate_up, down, weights, order, ends)
    return routed(
        x,
        weights,
        order,
        lambda rows: grouped_matmul(rows, gate_up, ends),
        lambda rows: grouped_matmul(rows, down, ends),
    )


def routed(
    x: Tensor,
    weights: Tensor | None,
    order: Tensor,
    gate_up: Callable[[Tensor], Tensor],
    down: Callable[[Tensor], Tensor],
) -> Tensor:
    """`through_experts` with these two products of rows that are grouped by expert."""
    rows = GatherRows.apply(x, order, 1 if weights is None else weights.shape[1])
    rows = down(GatePacked.apply(gate_up(rows)))
    return GatherRows.apply(rows, inverse(order), 1) if weights is None else CombineRows.apply(rows, weights, order)


def one_by_one(
    x: Tensor, weights: Tensor, chosen: Tensor, matrices: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Tensor:
    """The same for few rows, without a look at which experts are chosen: of each choice the matrices for every row,
    [N, 2, F, D] and [N, D, F], and a product of that row. x [N, D], weights and chosen [N, K] -> [N, D]."""
    made = torch.zeros_like(x, dtype=torch.float32)
    for weight, choice in zip(weights.unbind(1), chosen.unbind(1), strict=True):
        gate_up, down = matrices(choice)
        rows = torch.bmm(gate_up.flatten(1, 2), x.to(gate_up.dtype).unsqueeze(2)).squeeze(2)
        rows = torch.bmm(down, GatePacked.apply(rows).unsqueeze(2)).squeeze(2)
        made = torch.addcmul(made, rows.float(), weight.unsqueeze(1))
    return made.to(x.dtype)


def grouped_matmul(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """rows[a:b] @ weights[e].T for each expert's stretch [a, b) of rows: [R, I] x [E, ..., I] -> [R, O].

    The middle dimensions of `weights` count together as O. By grouped_mm, and by the loop where that does not take the
    shapes: its strides must be multiples of 16 bytes.
    """
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
