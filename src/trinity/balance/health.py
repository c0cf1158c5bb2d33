"""Health of the routing, from the integer counts of a step. Shapes: counts [L, E], L sparse layers, E experts.

Where it is heading is told by balance/trend.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Health(NamedTuple):
    max_violation: list[float]  # per layer: (max load - mean) / mean; 0 is perfect, E/K - 1 is collapse
    load_entropy: float  # mean over layers of H(load) / ln E; 1 is perfect
    dead_experts: int  # experts, over all layers, that got less than `DEAD_SHARE` of an even share
    bias_norm: float  # largest Euclidean norm of a layer's selection bias


DEAD_SHARE = 0.01


def measure(counts: Tensor, biases: Tensor) -> Health:
    """Health of counts [L, E] and biases [L, E]. The caller decides over how many tokens counts were summed."""
    counts = counts.to(torch.float64)
    mean = counts.mean(-1, keepdim=True).clamp(min=1e-20)
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1e-20)
    entropy = -(share * share.clamp(min=1e-300).log()).sum(-1) / torch.tensor(counts.shape[-1]).log()
    return Health(
        max_violation=((counts.amax(-1, keepdim=True) - mean) / mean).squeeze(-1).tolist(),
        load_entropy=float(entropy.mean()),
        dead_experts=int((counts < DEAD_SHARE * mean).sum()),
        bias_norm=float(biases.norm(dim=-1).max()),
    )
