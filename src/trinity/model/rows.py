"""Rows between the order of tokens and that of experts, as gathers both forward and backward.

So both are deterministic and parallel: a scatter would add in the order of its threads.
Shapes: N tokens, K chosen, R = N x K routed rows, D width; row r is choice order[r] % K of token order[r] // K.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class GatherRows(torch.autograd.Function):
    """x [N, D] -> [R, D]: the token of each routed row. Backward gathers too, so it is deterministic and parallel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.shape = (x.shape[0], top_k)
        return x.index_select(0, order // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (order,) = ctx.saved_tensors
        tokens, top_k = ctx.shape
        width = grads[0].shape[1]  # no -1: a process may hold no rows
        return grads[0].index_select(0, inverse(order)).view(tokens, top_k, width).sum(1), None, None


class CombineRows(torch.autograd.Function):
    """rows [R, D], weights [N, K] -> [N, D]: the weighted sum of each token's rows, in the order of its choices."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        tokens, top_k = weights.shape
        back = rows.index_select(0, inverse(order)).view(tokens, top_k, -1)
        ctx.save_for_backward(back, weights, order)
        out = rows.new_empty(tokens, rows.shape[1])  # no view of it: FSDP2 warns of outputs that are views
        torch.bmm(weights.to(rows.dtype).unsqueeze(1), back, out=out.unsqueeze(1))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        back, weights, order = ctx.saved_tensors
        grad = grads[0]
        top_k = weights.shape[1]
        grad_weights = torch.bmm(back, grad.unsqueeze(2)).squeeze(2).to(weights.dtype)
        scale = weights.to(grad.dtype).flatten()[order]
        return grad.index_select(0, order // top_k).mul_(scale.unsqueeze(1)), grad_weights, None


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`."""
    result = torch.empty_like(order)
    result[order] = torch.arange(len(order), device=order.device)
    return result
