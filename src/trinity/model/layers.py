"""The small parts: RMSNorm, rotary embedding, SwiGLU feed-forward.

Shapes: B rows, T positions, D width, F hidden width, C head size, N = B x T tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trinity.kernels.compiled import fits
from trinity.kernels.norm import Normalise
from trinity.kernels.products import linear


class RMSNorm(nn.Module):
    """x / rms(x) * weight, statistics and gain in float32 whatever the input's precision (T5 order)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if fits(x, self.weight):
            return Normalise.apply(x, self.weight, self.eps)
        if x.is_cuda:  # one kernel there; composed of many elsewhere
            return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
        return NormaliseRows.apply(x.float(), self.weight, self.eps).to(x.dtype)


class NormaliseRows(torch.autograd.Function):
    """F.rms_norm in fewer passes over memory, forward and backward (torch composes it of many on a CPU)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normal = x * scale
        ctx.save_for_backward(normal, scale, weight)
        return normal * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        normal, scale, weight = ctx.saved_tensors
        product = grads[0] * normal
        grad_weight = product.flatten(0, -2).sum(0)
        shared = (product @ weight).div_(weight.shape[0]).unsqueeze(-1)  # mean over the row of grad * weight * normal
        return (grads[0] * weight).addcmul_(normal, shared, value=-1).mul_(scale), grad_weight, None


class Linear(nn.Linear):
    """A linear map without bias; AFMoE has none. Initialised by init.py alone."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return linear(input, self.weight)

    def reset_parameters(self) -> None:
        """Left to init.py, which draws each matrix from its own named seed."""


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, hidden)
        self.up_proj = Linear(width, hidden)
        self.down_proj = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GatePacked(torch.autograd.Function):
    """silu(gate) * up of a packed [..., 2F] tensor (gate first); backward fills one packed gradient, without a cat."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> Tensor:
        ctx.save_for_backward(packed)
        gate, up = packed.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # type: ignore[override]
        (packed,) = ctx.saved_tensors
        gate, up = packed.chunk(2, dim=-1)
        grad = torch.empty_like(packed)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        torch.mul(grads[0], silu, out=grad_up)
        # d silu = sigmoid + silu (1 - sigmoid) = silu + sigmoid (1 - silu)
        torch.mul(grads[0], up, out=grad_gate)
        grad_gate.mul_(silu.addcmul_(sigmoid, 1 - silu))
        return grad


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding: positions [..., T] -> two float32 tensors [..., T, C / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None].float() * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the halves of each head against each other (NeoX form).

    x: [B, heads, T, C]; angles: two tensors [T, C / 2] or [B, T, C / 2].
    """
    cos, sin = (angle.to(x.dtype).unsqueeze(-3) for angle in angles)
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        ((first * cos).addcmul(second, sin, value=-1), (second * cos).addcmul(first, sin)),
        dim=-1,
    )
