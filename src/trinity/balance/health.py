"""Health of the routing, from the integer counts of a step. Shapes: counts [L, E], L sparse layers, E experts."""

from collections import deque
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


class CollapseAlarm:
    """Speaks up when MaxVio climbs: the recent mean over `factor` times the mean before it, and above `floor`.

    The Large report tells of a long flat MaxVio, then a sudden climb before experts collapsed, unseen in the loss.
    """

    def __init__(self, recent: int = 20, before: int = 100, factor: float = 2.0, floor: float = 1.0) -> None:
        self.recent, self.before, self.factor, self.floor = recent, before, factor, floor
        self.history: deque[float] = deque(maxlen=recent + before)

    def observe(self, max_violation: float) -> str | None:
        """Take one step's largest MaxVio; a sentence when it looks like the start of a collapse, else None."""
        self.history.append(max_violation)
        if len(self.history) < self.recent + self.before:
            return None
        values = list(self.history)
        earlier, now = sum(values[: self.before]) / self.before, sum(values[self.before :]) / self.recent
        if now > self.floor and now > self.factor * earlier:
            self.history.clear()
            return f"MaxVio rose from {earlier:.2f} to {now:.2f} in {self.recent} steps: experts may be collapsing"
        return None
