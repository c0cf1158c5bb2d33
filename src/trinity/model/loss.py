"""Cross-entropy and z-loss over chunks of tokens: the whole logits tensor never exists.

    loss = sum over targets of  [ logsumexp(logits) - logits[target] ]  +  z * logsumexp(logits)^2

The gradient is formed chunk by chunk during the forward pass (the idea of Liger's fused linear cross-entropy), so peak
memory is one chunk of logits, and backward is a multiplication.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trinity.kernels.products import multiply

IGNORED = -100
CHUNK_TOKENS = 2048


def chunked_loss(hidden: Tensor, head: Tensor, targets: Tensor, z_loss: float, divisor: float) -> tuple[Tensor, Tensor]:
    """hidden [N, D], head [V, D], targets [N] int64 (IGNORED counts for nothing).

    Returns (loss to differentiate: cross-entropy plus z-loss summed and divided by `divisor`; cross-entropy alone in
    nats, summed and divided likewise, detached). `divisor` is the number of targets of the whole step.
    """
    return ChunkedLoss.apply(hidden, head, targets, z_loss, divisor)  # type: ignore[no-any-return]


class ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, z_loss: float, divisor: float
    ) -> tuple[Tensor, Tensor]:
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        cross_entropy = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            part, target = hidden[start : start + CHUNK_TOKENS], targets[start : start + CHUNK_TOKENS]
            logits = part.new_empty(part.shape[0], head.shape[0])
            multiply(part, head.T, logits)
            logits = logits.float()
            counted = target != IGNORED
            safe = torch.where(counted, target, 0).unsqueeze(1)
            highest = logits.amax(-1, keepdim=True)
            at_target = logits.gather(1, safe).squeeze(1)
            softmax = logits.sub_(highest).exp_()  # in place, one exponential for the loss and its gradient
            norm = softmax.sum(-1, keepdim=True)
            partition = (norm.log() + highest).squeeze(1)  # [n]
            nats = (partition - at_target) * counted
            cross_entropy += nats.sum()
            total += nats.sum() + z_loss * (partition.square() * counted).sum()
            scale = counted / divisor
            grad = softmax.mul_(((1 + 2 * z_loss * partition) * scale).unsqueeze(1) / norm)
            grad.scatter_add_(1, safe, -scale.unsqueeze(1))
            grad = grad.to(hidden.dtype)
            multiply(grad, head, grad_hidden[start : start + CHUNK_TOKENS])
            multiply(grad.T, part, grad_head, add=True)
            del logits, softmax, grad  # before those of the next chunk are there
        ctx.save_for_backward(grad_hidden, grad_head.to(head.dtype))
        cross_entropy = cross_entropy / divisor
        ctx.mark_non_differentiable(cross_entropy)
        return total / divisor, cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grads[0], grad_head * grads[0], None, None, None


def plain_loss(hidden: Tensor, head: Tensor, targets: Tensor, z_loss: float, divisor: float) -> tuple[Tensor, Tensor]:
    """The plain twin of `chunked_loss`, through autograd and the whole logits tensor."""
    logits = (hidden @ head.T).float()
    cross_entropy = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / divisor
    partition = logits.logsumexp(-1).square() * (targets != IGNORED)
    return cross_entropy + z_loss * partition.sum() / divisor, cross_entropy.detach()


@torch.no_grad()
def token_nats(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target in nats: hidden [N, D], targets [N] -> [N] float32; chunked, without gradient."""
    parts = [
        F.cross_entropy((h @ head.T).float(), t, reduction="none")
        for h, t in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0)
