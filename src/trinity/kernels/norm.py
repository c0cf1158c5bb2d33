"""RMSNorm of float32 rows on a CPU in one pass each way, by the compiled kernels: see norm.cpp."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Normalise(torch.autograd.Function):
    """x / rms(x) * weight over the last dimension: x [..., C], weight [C] -> [..., C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        out, scale = torch.empty_like(x), x.new_empty(x.shape[:-1])
        torch.ops.trinity.normalise(_rows(x), weight, eps, _rows(out), scale.view(-1))
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        arguments = (_rows(grads[0].contiguous()), _rows(x), weight, scale.view(-1), _rows(grad_x), grad_weight)
        torch.ops.trinity.normalise_backward(*arguments)
        return grad_x, grad_weight, None


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])
