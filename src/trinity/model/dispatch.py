"""How tokens reach their experts and come back, as an argument of the model's forward.

A sparse layer routes its tokens and calls `dispatch(experts, x, routing)`. Where the experts are belongs to the caller:
here (`locally`), or spread over processes (parallel/expert.py).
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from trinity.model.router import Routing

# (x [N, D], weights [N, K] or None, order [N x K], ends [E]) -> [N, D]: Experts.forward, or that of the experts here.
ChosenExperts = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]


class Dispatch(Protocol):
    def __call__(self, experts: ChosenExperts, x: Tensor, routing: Routing) -> Tensor: ...


def locally(experts: ChosenExperts, x: Tensor, routing: Routing) -> Tensor:
    """x [N, D] -> [N, D]: the weighted sum of each token's chosen experts, all of them here. Nothing is dropped."""
    chosen, order = routing.chosen.flatten().sort(stable=True)  # rows grouped by expert
    numbers = torch.arange(routing.scores.shape[1], device=chosen.device)
    # Where each expert's stretch ends. Counts would have a GPU wait for the host.
    return experts(x, routing.weights, order, torch.searchsorted(chosen, numbers, right=True))
