"""How tokens reach their experts and come back, as an argument of the model's forward.

A sparse layer routes its tokens and calls `dispatch(experts, x, routing)`. Where the experts are belongs to the caller:
here (`locally`), or spread over processes (parallel/expert.py).

Shapes: N tokens, K chosen, R = N x K routed rows, E experts, D width.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trinity.model.router import Routing

GroupedExperts = Callable[[Tensor, Tensor], Tensor]  # rows [R, D] grouped by expert, ends [E] -> [R, D]


class Dispatch(Protocol):
    def __call__(self, experts: GroupedExperts, x: Tensor, routing: Routing) -> Tensor: ...


def locally(experts: GroupedExperts, x: Tensor, routing: Routing) -> Tensor:
    """x [N, D] -> [N, D]: the weighted sum of each token's chosen experts, all of them here. Nothing is dropped."""
    order = routing.chosen.flatten().argsort(stable=True)  # rows grouped by expert
    rows = GatherRows.apply(x, order, routing.chosen.shape[1])
    rows = experts(rows, routing.counts().cumsum(0))
    return CombineRows.apply(rows, routing.weights, order)


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
        return torch.bmm(weights.to(rows.dtype).unsqueeze(1), back).squeeze(1)

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
