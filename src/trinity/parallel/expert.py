"""Expert parallelism: neighbouring processes share the experts of a layer, and rows travel to them and back.

    rows sorted by expert -> all-to-all (uneven, by counts) -> sorted by local expert -> experts -> the same way back

Process p of P holds experts p E / P ... (p + 1) E / P - 1. Nothing is dropped and nothing padded; a process that gets
no rows takes part all the same. Equal to `model.dispatch.locally` up to the order of sums over processes.

Shapes: N tokens and R = N x K rows of this process, R' rows it receives, E experts, D width.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from trinity.model.dispatch import ChosenExperts, Dispatch, locally
from trinity.model.router import Routing
from trinity.model.rows import CombineRows, GatherRows
from trinity.parallel.mesh import World


def dispatch_over(world: World) -> Dispatch:
    """How tokens reach their experts in this world: over processes where these share the experts."""
    return locally if world.expert_size == 1 else ExpertParallel(world.expert_group)


class Splits(NamedTuple):
    """How the rows of one layer travel."""

    sent: Tensor  # [P, E / P] int64: this process's rows for each expert
    received: Tensor  # [P, E / P] int64: rows from each process for each of its experts
    there: list[int]  # [P] rows to each process
    here: list[int]  # [P] rows from each process


def forced_balance(world: World) -> Dispatch:
    """A way to the experts that gives each equally many rows, whatever the router chose: no value of it is read.

    A rehearsal has no values (train/dryrun.py); a benchmark sets the real router beside it.
    """
    return _balanced_locally if world.expert_size == 1 else ForcedBalance(world.expert_group)


class ExpertParallel:
    """A Dispatch (model/dispatch.py) over the processes of `group`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size = group, group.size()

    def __call__(self, experts: ChosenExperts, x: Tensor, routing: Routing) -> Tensor:
        order = routing.chosen.flatten().argsort(stable=True)
        rows = GatherRows.apply(x, order, routing.chosen.shape[1])
        sent, received, there, here = self.splits(routing)
        rows = Exchange.apply(rows, here, there, self.group)
        by_expert = _by_local_expert(received, sum(here))
        rows = experts(rows, None, by_expert, received.sum(0).cumsum(0))
        rows = Exchange.apply(rows, there, here, self.group)
        return CombineRows.apply(rows, routing.weights, order)

    def splits(self, routing: Routing) -> Splits:
        sent = routing.counts().view(self.size, -1)
        received = self.exchange_counts(sent)
        return Splits(sent, received, sent.sum(1).tolist(), received.sum(1).tolist())

    def exchange_counts(self, sent: Tensor) -> Tensor:
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent.contiguous(), group=self.group)
        return received


class ForcedBalance(ExpertParallel):
    """Exchanges counts and rows as always, of rows dealt out evenly: what travels is known without looking."""

    def __call__(self, experts: ChosenExperts, x: Tensor, routing: Routing) -> Tensor:
        return super().__call__(experts, x, dealt_evenly(routing))

    def splits(self, routing: Routing) -> Splits:
        """As every process of the group deals alike, each sends and gets the same whatever its peer."""
        rows, experts = routing.chosen.numel(), routing.scores.shape[1]
        each = [rows // experts + (expert < rows % experts) for expert in range(experts)]
        share = experts // self.size
        there = [sum(each[peer * share : (peer + 1) * share]) for peer in range(self.size)]
        sent = torch.tensor(each, device=routing.chosen.device).view(self.size, share)
        return Splits(sent, self.exchange_counts(sent), there, [there[self.group.rank()]] * self.size)


def _balanced_locally(experts: ChosenExperts, x: Tensor, routing: Routing) -> Tensor:
    return locally(experts, x, dealt_evenly(routing))


def dealt_evenly(routing: Routing) -> Routing:
    """The same weights and scores, the experts taken in turn."""
    turns = torch.arange(routing.chosen.numel(), device=routing.chosen.device) % routing.scores.shape[1]
    return routing._replace(chosen=turns.view_as(routing.chosen))


def _by_local_expert(received: Tensor, rows: int) -> Tensor:
    """The order that groups rows, which arrive by process and then by expert, by expert and then by process: [R']."""
    experts = torch.arange(received.numel(), device=received.device) % received.shape[1]
    return experts.repeat_interleave(received.flatten(), output_size=rows).argsort(stable=True)


class Exchange(torch.autograd.Function):
    """All-to-all of rows [R, ...] -> [R', ...]: `there[p]` rows go to process p, `here[p]` come from it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, here: list[int], there: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.splits = (here, there, group)
        return _exchange(rows, here, there, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        here, there, group = ctx.splits
        return _exchange(grads[0], there, here, group), None, None, None


def _exchange(rows: Tensor, here: list[int], there: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty((sum(here), *rows.shape[1:]))
    dist.all_to_all_single(arrived, rows.contiguous(), here, there, group=group)
    return arrived
