"""One optimiser step, top to bottom: microbatches, loss, clipping, verdict, update, and then the router biases.

loss = [ cross-entropy + z-loss ] / targets of the step  +  alpha * sequence-wise balance loss (sum over layers)

Every figure is of the whole step, over all processes, so that each of them decides alike.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.balance.update import move_biases
from trinity.config.run import RunConfig
from trinity.data.loader import Batch
from trinity.model.dispatch import Dispatch
from trinity.model.loss import IGNORED, chunked_loss
from trinity.model.router import Routing, sequence_balance_loss
from trinity.optim.schedule import factor_at
from trinity.parallel.apply import sum_over_replicas
from trinity.parallel.context import attend_over, own_stretch
from trinity.parallel.expert import dispatch_over
from trinity.parallel.mesh import World
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
    losses: tuple[float, ...] = ()  # of the step's microbatches of all processes, in the order of the stream


def accumulate(
    state: TrainState, batches: list[Batch], config: RunConfig, dispatch: Dispatch | None = None
) -> Measured:
    """Forward and backward over this process's microbatches; gradients are left on the parameters, clipped.

    dispatch: another way to the experts than this world's, such as `forced_balance`.
    """
    world, model = state.world, state.model
    dispatch = dispatch or dispatch_over(world)
    stretches = [own_stretch(batch, world) for batch in batches]
    learnt = torch.stack([(batch.targets != IGNORED).sum() for batch in stretches])  # [M]
    targets = int(world.sum(learnt.sum()))
    rows = sum(len(batch.tokens) for batch in stretches) * world.data_size
    # [data ranks, M, (share of the loss, targets)]: each process fills in its own, and the sum holds everybody's.
    table = torch.zeros(world.data_size, len(stretches), 2, dtype=torch.float64, device=world.device)
    table[world.data_rank, :, 1] = learnt.double()
    added = torch.zeros(2, dtype=torch.float64, device=world.device)  # z-loss, balance loss
    counts = torch.zeros(len(model.expert_biases()), config.model.num_experts, dtype=torch.int64, device=world.device)
    for number, batch in enumerate(stretches):
        sum_over_replicas(model, wanted=number == len(stretches) - 1)
        output = model(batch.tokens, batch.positions, attend_over(batch.document_ids, world), dispatch)
        loss, cross_entropy = chunked_loss(
            output.hidden.flatten(0, 1),
            model.lm_head.weight,
            batch.targets.flatten(),
            config.balance.z_loss,
            divisor=max(targets, 1),
        )
        table[world.data_rank, number, 0] = cross_entropy
        added[0] += loss.detach() - cross_entropy
        if config.balance.sequence_loss and output.routings:
            balance = config.balance.sequence_loss * _spread(output.routings, len(batch.tokens), world)
            balance = balance * (len(batch.tokens) / rows)
            added[1] += balance.detach()
            loss = loss + balance
        loss.backward()
        if output.routings:
            counts += torch.stack([routing.counts() for routing in output.routings])
    grad_norm = _clip(state.optimisers.gradients(), config.optim.clip_norm, world)
    return _measured(world.sum(table), world.sum(added), grad_norm, world.sum(counts), targets)


def _spread(routings: list[Routing], rows: int, world: World) -> Tensor:
    """The sequence-wise balance loss of this process's positions, summed over layers."""
    parts = world.context_size
    return torch.stack(
        [sequence_balance_loss(routing, rows, parts, world.sum_over_context) for routing in routings]
    ).sum()


def _clip(gradients: list[Tensor], largest: float, world: World) -> float:
    """Scale this process's gradients so that their global norm is at most `largest` (0: no bound); the norm before.

    Within one replica every value of a gradient is held once: dense ones by the shards, experts by their owners.
    Replicas have the same gradients, but may add them up in another order; the largest norm makes all scale alike.
    """
    square = torch.stack(torch._foreach_norm(gradients)).double().square().sum()  # pyright: ignore[reportPrivateImportUsage]
    norm = float(world.largest_of_replicas(world.sum_over_shards(square)).sqrt())
    if largest and math.isfinite(norm) and norm > largest:
        torch._foreach_mul_(gradients, largest / (norm + 1e-6))  # pyright: ignore[reportPrivateImportUsage]
    return norm


def _measured(table: Tensor, added: Tensor, grad_norm: float, counts: Tensor, targets: int) -> Measured:
    losses = table[..., 0] * targets / table[..., 1].clamp(min=1)  # [data ranks, M]; 0 where nothing was learnt
    read = table[..., 1] > 0
    highest, mean = losses.where(read, -math.inf).max(), losses.sum() / read.sum().clamp(min=1)
    return Measured(
        loss=float(table[..., 0].sum()),
        z_loss=float(added[0]),
        balance_loss=float(added[1]),
        grad_norm=grad_norm,
        batch_het=max(0.0, float(highest - mean)),
        counts=counts.cpu(),
        targets=targets,
        losses=tuple(losses.T.flatten().tolist()),
    )


def learning_rates(tokens: int, config: RunConfig) -> tuple[float, float]:
    """(Muon's, AdamW's) rate of the step that ends at `tokens` tokens: the schedule at its middle, never zero."""
    factor = factor_at(tokens - config.batch_at(tokens - 1) / 2, config)
    return factor * config.optim.muon_lr, factor * config.optim.adamw_lr


def apply_update(state: TrainState, measured: Measured, config: RunConfig, rates: tuple[float, float]) -> None:
    """Move weights by the clipped gradients and biases by the counts. Gradients are dropped."""
    state.optimisers.set_rates(*rates)
    state.optimisers.step()
    state.optimisers.zero_grad()
    biases = state.model.expert_biases()
    if biases:
        counts = measured.counts.to(state.bias_momentum.device)
        moved, state.bias_momentum = move_biases(torch.stack(biases), state.bias_momentum, counts, config.balance)
        for bias, new in zip(biases, moved, strict=True):
            bias.copy_(new)


def drop_update(state: TrainState) -> None:
    """Leave weights and biases as they are."""
    state.optimisers.zero_grad()
