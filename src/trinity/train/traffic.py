"""Counts what a step sends: every collective that a process calls, real, or without values in a rehearsal (dryrun.py).

Bytes that leave this process, by the bandwidth-optimal algorithms, n processes:

    all-gather        (n - 1) x its own part           all-to-all    what goes to the others, by the splits of the call
    reduce-scatter    (n - 1) x the part it gets       all-reduce    2 (n - 1) / n x the tensor

What a collective is for is told by its kind, its tensor and the moment; plan/wire.py has the same names.
"""

from collections import defaultdict
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from trinity.model.experts import Experts
from trinity.model.transformer import Transformer
from trinity.parallel.mesh import World

ONCE = ("Muon's matrices", "routing counts", "gradient norm", "figures of the step", "weights' gradients over replicas",
        "experts' gradients over replicas")  # a step, not a microbatch  # fmt: skip
_LOSSES = "losses of microbatches"
_SILENT = ("c10d.barrier.default", "c10d.monitored_barrier_.default")


class Kind(NamedTuple):
    purpose: str
    collective: str


@dataclass
class Sent:
    """All calls of one kind: bytes that left this process, those of them during backward, and calls."""

    bytes: float = 0.0
    in_backward: float = 0.0
    calls: int = 0


def of_whole_step(kind: Kind, walked: Sent, share: float) -> Sent:
    """What a step sends of one kind, if `share` times as many microbatches are walked as were."""
    if kind.purpose in ONCE:
        return walked
    calls = 1 if kind.purpose == _LOSSES else round(walked.calls * share)  # one table of all microbatches
    return Sent(walked.bytes * share, walked.in_backward * share, calls)


class Traffic(TorchDispatchMode):
    """While entered, `sent` grows with every collective. Those of one process alone send nothing.

    To be entered before `Storages` (storages.py): it looks into operators on DTensors, which that must not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[Kind, Sent] = defaultdict(Sent)
        self._of_experts: set[int] = set()
        self._after_backward = False

    def watch(self, model: Transformer, world: World) -> None:
        """Know the experts of this model by the size of what is gathered, and its forward passes."""
        experts = [module for module in model.modules() if isinstance(module, Experts)]
        self._of_experts = {_unit(module, world) for module in experts if world.sparse is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its collectives are of plain tensors, and come here by themselves
        if _in_backward():
            self._after_backward = True
        if func.namespace in ("c10d", "_c10d_functional") and str(func) not in _SILENT:
            self._count(str(func), args)
        return func(*args, **(kwargs or {}))

    def begin_forward(self, *_: Any) -> None:
        """To be called before each forward pass (a hook): what follows belongs to it, not to the end of the step."""
        self._after_backward = False

    def _count(self, name: str, args: Any) -> None:
        assert name in _READ, f"the collective {name} is not counted"
        collective, tensor, group, leaving = _READ[name](args)
        if group.size() == 1:
            return
        entry = self.sent[Kind(self._purpose(collective, tensor, args), collective)]
        entry.bytes += leaving
        entry.in_backward += leaving * _in_backward()
        entry.calls += 1

    def _purpose(self, collective: str, tensor: Tensor, args: Any) -> str:
        """What a collective is for. `tensor`: this process's part of what is gathered, reduced or exchanged."""
        whose = "experts" if tensor.numel() in self._of_experts else "weights"
        if collective == "all-gather":
            return f"{whose} gathered"
        if collective == "reduce-scatter":
            return f"{whose}' gradients"
        if collective == "all-to-all":
            return _exchanged(tensor, args)
        if _in_backward():
            return f"{whose}' gradients over replicas"
        if tensor.dim() == 2:
            return "routing counts" if self._after_backward else "counts of the balance loss"
        if tensor.dim() == 3:
            return _LOSSES
        is_norm = tensor.dim() == 0 and tensor.is_floating_point()
        return "gradient norm" if is_norm else "figures of the step"


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportAttributeAccessIssue]


def _exchanged(tensor: Tensor, args: Any) -> str:
    """Counts are integers, Muon's matrices flat, routed rows [R, D]; attention's are [.., .., B, heads, ..]."""
    if not tensor.is_floating_point():
        return "counts of rows"
    if tensor.dim() <= 2:
        return "Muon's matrices" if tensor.dim() == 1 else "rows of experts"
    group = _group(args[2])
    to_itself = args[4][group.rank()] if args[4] else 1
    return "heads for positions" if to_itself else "keys of the window"


def _unit(experts: Experts, world: World) -> int:
    """Values of a layer's experts that one process gathers, padding included."""
    assert world.sparse is not None
    processes = world.sparse["expert"].size() * world.sparse["expert_shard"].size()
    return sum(-(-len(p) // processes) * prod(p.shape[1:]) for p in experts.parameters())


class _Call(NamedTuple):
    collective: str
    tensor: Tensor
    group: dist.ProcessGroup
    leaving: float


def _group(boxed: Any) -> dist.ProcessGroup:
    return boxed if isinstance(boxed, dist.ProcessGroup) else dist.ProcessGroup.unbox(boxed)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gather(args: Any) -> _Call:
    part, group = args[1], _group(args[2])
    return _Call("all-gather", part, group, (group.size() - 1) * _size(part))


def _scatter(args: Any) -> _Call:
    part, group = args[0], _group(args[2])
    return _Call("reduce-scatter", part, group, (group.size() - 1) * _size(part))


def _reduce(args: Any) -> _Call:
    (tensor,), group = args[0], _group(args[1])
    return _Call("all-reduce", tensor, group, 2 * (group.size() - 1) / group.size() * _size(tensor))


def _exchange(args: Any) -> _Call:
    tensor, group, splits = args[1], _group(args[2]), args[4]
    first = _size(tensor) // max(1, len(tensor))
    stays = splits[group.rank()] if splits else len(tensor) // group.size()
    return _Call("all-to-all", tensor, group, _size(tensor) - stays * first)


_READ = {
    "c10d._allgather_base_.default": _gather,
    "c10d._reduce_scatter_base_.default": _scatter,
    "c10d.allreduce_.default": _reduce,
    "c10d.alltoall_base_.default": _exchange,
}
