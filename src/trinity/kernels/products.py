"""Matrix products with their gradients: the compiled kernels where they fit, else what torch has.

A weight's gradient is added straight to the `.grad` it already has, in the product itself. Autograd would otherwise
fill a second tensor as large as all experts in every microbatch, and read both to add them.

Shapes: I and O are the inner and outer width of a matrix.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trinity.kernels.compiled import fits

_FEW_ROWS = 16  # below this a product is a walk over the weights, and torch's own call is the shorter one


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., I], weight [O, I] -> [..., O]."""
    if x.numel() >= _FEW_ROWS * x.shape[-1] and fits(x, weight):
        return Product.apply(x, weight)
    return F.linear(x, weight)


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a b or out += a b, of matrices; not differentiable."""
    if fits(a, b, out):
        torch.ops.trinity.matmul(a, b, out, add)
    elif add:
        out.add_(a @ b) if out.dtype != a.dtype else out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


class Product(torch.autograd.Function):
    """x weight^T of float32 tensors on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        torch.ops.trinity.matmul(x.reshape(-1, x.shape[-1]), weight.T, out.view(-1, weight.shape[0]), False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
            torch.ops.trinity.matmul(grad, weight, grad_x.view(-1, x.shape[-1]), False)
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        held = held_gradient(ctx, 1)
        out = torch.empty_like(weight) if held is None else held
        torch.ops.trinity.matmul(grad.T, x.reshape(-1, x.shape[-1]), out, held is not None)
        return grad_x, out if held is None else None


def held_gradient(ctx: Any, index: int) -> Tensor | None:
    """The `.grad` that input `index` of a Function already has, if this backward pass would do no more than add to it.

    None when there is none yet, when the input is no leaf, when something listens to its gradient, and when gradients
    are asked for by torch.autograd.grad, which must not touch `.grad`.
    """
    node = ctx.next_functions[index][0]
    leaf = getattr(node, "variable", None)
    if leaf is None or leaf.grad is None or leaf._backward_hooks or leaf._post_accumulate_grad_hooks:
        return None
    try:
        wanted = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # raised, and only then, inside torch.autograd.grad
        return None
    plain = type(leaf.grad) is Tensor and leaf.grad.is_contiguous() and leaf.grad.dtype == leaf.dtype
    return leaf.grad if wanted and plain else None
