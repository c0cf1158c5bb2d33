"""The routed experts of a layer from tokens to tokens, by the compiled kernels: see experts.cpp.

The twin is what model/experts.py composes of torch's own operators.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trinity.kernels.products import held_gradient

_PADDING = 15  # rows that each expert may take more in what is kept (experts.cpp)


class RoutedExperts(torch.autograd.Function):
    """Each token's chosen experts, weighed and summed -> [N, D]. Float32 tensors on a CPU.

    x [N, D]; gate_up [E, 2, F, D]; down [E, D, F]; weights [N, K]; order [N x K] int64: rows grouped by expert, row r
    being choice order[r] % K of token order[r] // K; ends [E] int64: cumulative counts. A row outside every expert's
    stretch is not allowed.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, order: Tensor, ends: Tensor
    ) -> Tensor:
        x, weights, order, ends = (t.contiguous() for t in (x, weights, order, ends))
        out = torch.empty_like(x)
        kept = x.new_empty(order.shape[0] + _PADDING * ends.shape[0], 2 * down.shape[2])
        rows = x.new_empty(order.shape[0], x.shape[1])  # what each row makes, before they are summed
        torch.ops.trinity.experts(x, order, ends, weights, gate_up, down, out, kept, rows)
        ctx.save_for_backward(x, gate_up, down, weights, order, ends, kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, gate_up, down, weights, order, ends, kept = ctx.saved_tensors
        grad_x, grad_weights = torch.empty_like(x), torch.empty_like(weights)
        held = [held_gradient(ctx, index) if ctx.needs_input_grad[index] else None for index in (1, 2)]
        filled = [torch.empty_like(m) if h is None else h for m, h in zip((gate_up, down), held, strict=True)]
        rows = x.new_empty(order.shape[0], x.shape[1])
        torch.ops.trinity.experts_backward(
            grads[0].contiguous(), x, order, ends, weights, gate_up, down, kept, grad_x, grad_weights, *filled,
            held[0] is not None, held[1] is not None, rows,
        )  # fmt: skip
        to_gate_up, to_down = (new if h is None else None for new, h in zip(filled, held, strict=True))
        return grad_x, to_gate_up, to_down, grad_weights, None, None
