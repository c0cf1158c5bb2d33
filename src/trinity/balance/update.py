"""Rules that move the router's selection biases once a step, as arithmetic on tensors.

Shapes: [..., E] throughout (layers may be stacked in front). Counts are integers over the whole step and all processes.
"""

import torch
from torch import Tensor

from trinity.config.optim import BalanceConfig


def violation(counts: Tensor) -> Tensor:
    """(mean - n_i) / mean: 1 for an idle expert, 0 at balance, -(E/K - 1) when an expert gets every token (eq. 23)."""
    counts = counts.to(torch.float32)
    mean = counts.mean(-1, keepdim=True)
    return (mean - counts) / mean.clamp(min=1e-20)


def smebu(
    bias: Tensor, momentum: Tensor, counts: Tensor, rate: float, beta: float, kappa: float
) -> tuple[Tensor, Tensor]:
    """Soft-clamped momentum expert bias updates (Trinity Large report, eqs. 23-28) -> (bias, momentum).

    step_i = rate tanh(kappa v_i), centred over experts; momentum <- beta momentum + (1 - beta) step; bias += momentum.
    """
    step = rate * torch.tanh(kappa * violation(counts))
    step = step - step.mean(-1, keepdim=True)
    momentum = beta * momentum + (1 - beta) * step
    return bias + momentum, momentum


def sign(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """Loss-free balancing, re-centred (Trinity Nano, Mini): bias += rate sign(mean - n_i), then minus its mean."""
    # In integers: a float32 mean of large counts would flip the sign of small differences.
    short = torch.sign(counts.sum(-1, keepdim=True) - counts * counts.shape[-1])
    bias = bias + rate * short
    return bias - bias.mean(-1, keepdim=True)


def move_biases(bias: Tensor, momentum: Tensor, counts: Tensor, config: BalanceConfig) -> tuple[Tensor, Tensor]:
    """Apply the configured rule: (bias, momentum) after the step. 'none' leaves both as they are."""
    if config.rule == "smebu":
        return smebu(bias, momentum, counts, config.smebu_lambda, config.smebu_beta, config.smebu_kappa)
    if config.rule == "sign":
        return sign(bias, counts, config.sign_gamma), momentum
    return bias, momentum
