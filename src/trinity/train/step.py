"""One optimiser step, top to bottom: microbatches, loss, clipping, verdict, update, and then the router biases.

loss = [ cross-entropy + z-loss ] / targets of the step  +  alpha * sequence-wise balance loss (sum over layers)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.balance.update import move_biases
from trinity.config.run import RunConfig
from trinity.data.loader import Batch
from trinity.model.attend import Packed
from trinity.model.loss import IGNORED, chunked_loss
from trinity.model.router import sequence_balance_loss
from trinity.optim.schedule import rate_factor
from trinity.train.state import TrainState


class Measured(NamedTuple):
    """What the forward and backward passes of one step found, before anything moves."""

    loss: float  # cross-entropy, nats per target
    z_loss: float  # as added to the loss
    balance_loss: float  # as added to the loss
    grad_norm: float  # global, before clipping
    batch_het: float  # max - mean of the microbatch losses (report section 5)
    counts: Tensor  # [L, E] int64, tokens sent to each expert over the whole step
    targets: int


def accumulate(state: TrainState, batches: list[Batch], config: RunConfig) -> Measured:
    """Forward and backward over the step's microbatches; gradients are left on the parameters, clipped."""
    targets = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
    rows = sum(len(batch.tokens) for batch in batches)
    losses, shares, z_total, balance_total = [], [], 0.0, 0.0
    counts: Tensor | None = None
    for batch in batches:
        output = state.model(batch.tokens, attend=Packed(batch.document_ids))
        loss, cross_entropy = chunked_loss(
            output.hidden.flatten(0, 1),
            state.model.lm_head.weight,
            batch.targets.flatten(),
            config.balance.z_loss,
            divisor=targets,
        )
        z_total += float(loss.detach() - cross_entropy)
        if config.balance.sequence_loss and output.routings:
            spread = torch.stack(
                [sequence_balance_loss(routing, len(batch.tokens)) for routing in output.routings]
            ).sum()
            balance = config.balance.sequence_loss * spread * (len(batch.tokens) / rows)
            balance_total += float(balance.detach())
            loss = loss + balance
        loss.backward()
        share = int((batch.targets != IGNORED).sum()) / targets
        shares.append(share)
        losses.append(float(cross_entropy) / share if share else 0.0)
        sent = torch.stack([routing.counts() for routing in output.routings]) if output.routings else None
        counts = sent if counts is None or sent is None else counts + sent
    grad_norm = float(
        torch.nn.utils.clip_grad_norm_(
            state.model.parameters(), config.optim.clip_norm or math.inf, error_if_nonfinite=False
        )
    )
    return Measured(
        loss=sum(loss * share for loss, share in zip(losses, shares, strict=True)),
        z_loss=z_total,
        balance_loss=balance_total,
        grad_norm=grad_norm,
        batch_het=max(losses) - sum(losses) / len(losses),
        counts=counts if counts is not None else torch.zeros(0, config.model.num_experts, dtype=torch.int64),
        targets=targets,
    )


def learning_rates(tokens: int, config: RunConfig) -> tuple[float, float]:
    """(Muon's, AdamW's) rate of the step that ends at `tokens` tokens: the schedule at its middle, never zero."""
    factor = rate_factor(tokens - config.train.batch_tokens / 2, config.horizon, config.optim)
    return factor * config.optim.muon_lr, factor * config.optim.adamw_lr


def apply_update(state: TrainState, measured: Measured, config: RunConfig, rates: tuple[float, float]) -> None:
    """Move weights by the clipped gradients and biases by the counts. Gradients are dropped."""
    state.optimisers.set_rates(*rates)
    state.optimisers.step()
    state.optimisers.zero_grad()
    biases = state.model.expert_biases()
    if biases:
        moved, state.bias_momentum = move_biases(
            torch.stack(biases), state.bias_momentum, measured.counts, config.balance
        )
        for bias, new in zip(biases, moved, strict=True):
            bias.copy_(new)


def drop_update(state: TrainState) -> None:
    """Leave weights and biases as they are."""
    state.optimisers.zero_grad()
