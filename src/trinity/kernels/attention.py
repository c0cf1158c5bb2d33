"""Attention over stretches of keys, by the compiled kernels: see attention.cpp. The twin is model/attend.py's mask.

Shapes: q [B, H, T, C]; k, v [B, J, T, C] with H a multiple of J; first [B, T] int64: query t sees keys first[t] .. t.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class StretchAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(C)) v over each query's stretch -> [B, H, T, C]. Float32 tensors on a CPU."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> Tensor:
        q, k, v, first = (x.contiguous() for x in (q, k, v, first))
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:-1])
        torch.ops.trinity.attend(q, k, v, first, q.shape[-1] ** -0.5, out, sums)
        ctx.save_for_backward(q, k, v, first, out, sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v, first, out, sums = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(q), torch.zeros_like(q)
        saved = (q, k, v, first, q.shape[-1] ** -0.5, out, sums)
        torch.ops.trinity.attend_backward(grads[0].contiguous(), *saved, grad_q, grad_k, grad_v)
        if k.shape[1] != q.shape[1]:  # query heads that share a key head
            grad_k, grad_v = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (grad_k, grad_v))
        return grad_q, grad_k, grad_v, None
