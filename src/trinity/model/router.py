"""The router: sigmoid scores, a bias that selects and never weighs, and the sequence-wise balance loss.

Everything here is float32 in every mode. Shapes: N tokens, E experts, K chosen.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trinity.config.model import ModelConfig
from trinity.kernels.products import linear
from trinity.model.layers import Linear


class Routing(NamedTuple):
    """Where tokens go. Returned by the router, never stored: the training step sums counts and moves biases."""

    chosen: Tensor  # [N, K] int64, expert of each slot
    weights: Tensor  # [N, K] float32, normalised over the chosen and scaled
    scores: Tensor  # [N, E] float32, sigmoid of the logits, without bias

    def counts(self) -> Tensor:
        """Tokens sent to each expert: [E] int64."""
        return torch.bincount(self.chosen.flatten(), minlength=self.scores.shape[1])


class Router(nn.Module):
    """Chooses the top K of sigmoid(gate(x)) + bias; weighs by the unbiased scores (report section 2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.route_scale = config.route_scale
        self.gate = Linear(config.hidden_size, config.num_experts)

    def forward(self, x: Tensor, expert_bias: Tensor) -> Routing:
        """x: [N, D], expert_bias: [E] -> Routing."""
        scores = linear(x.float(), self.gate.weight.float()).sigmoid()
        chosen = torch.topk(scores.detach() + expert_bias, self.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.route_scale
        return Routing(chosen, weights, scores)


def sequence_balance_loss(
    routing: Routing, rows: int, parts: int = 1, over_parts: Callable[[Tensor], Tensor] = lambda counts: counts
) -> Tensor:
    """Mean over rows of sum_i f_i P_i (report section 2): 1 when a row spreads its tokens evenly, else more.

    f_i is E / (K T) times the tokens of the row sent to expert i; P_i the row's mean normalised score of expert i.
    Where a row is cut into `parts` over processes, `over_parts` sums integer counts over them; the parts' results then
    add up to that of the whole row, since f has no gradient and P is a mean.
    """
    experts, top_k = routing.scores.shape[1], routing.chosen.shape[1]
    here = routing.scores.shape[0] // rows
    length = here * parts
    probability = routing.scores / (routing.scores.sum(-1, keepdim=True) + 1e-20)
    probability = probability.view(rows, here, experts).sum(1) / length
    row = torch.arange(rows, device=routing.chosen.device).repeat_interleave(here * top_k)
    counts = torch.bincount(row * experts + routing.chosen.flatten(), minlength=rows * experts).view(rows, experts)
    frequency = over_parts(counts).float() * (experts / (top_k * length))
    return (frequency * probability).sum(-1).mean()
