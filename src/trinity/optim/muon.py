"""Muon for hidden matrices, stacked experts included (one matrix an expert, orthogonalised in a batch).

    m <- mu m + (1 - mu) g          u = orthogonalise((1 - mu) g + mu m)      (Nesterov)
    w <- (1 - lr wd) w - lr sqrt(max(1, fan_out / fan_in)) u

The rate adjustment is the Trinity report's (section 3.4.2), not Moonlight's 0.2 sqrt(max(m, n)). Equal to
torch.optim.Muon (adjust_lr_fn="original") on single matrices; see tests/parity/test_optim.py.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trinity.optim.orthogonalise import orthogonalise


class Muon(Optimizer):
    """Parameters are [..., fan_out, fan_in]: the last two dimensions are the matrix, the others count matrices."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
        dtype: torch.dtype = torch.float32,
        across: "Across | None" = None,
    ) -> None:
        """across: how matrices of which each process holds some rows (sharded 2-D DTensors) become whole."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.steps, self.dtype, self.across = steps, dtype, across
        for group in self.param_groups:
            for parameter in group["params"]:
                assert parameter.dim() >= 2, "Muon moves matrices; vectors belong to AdamW"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update. Matrices of one shape are orthogonalised together, which is what keeps a CPU busy."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Slice]] = defaultdict(list)
            if cut := [parameter for parameter in group["params"] if _is_cut(parameter)]:
                self._step_across(cut, group)
            for parameter in group["params"]:
                if parameter.grad is not None and not _is_cut(parameter):
                    by_shape[parameter.shape[-2], parameter.shape[-1]] += self._slices(parameter)
            for (fan_out, fan_in), slices in by_shape.items():
                rate = group["lr"] * max(1.0, fan_out / fan_in) ** 0.5
                for batch in _batches(slices):
                    updates = [_nesterov(gradient, moment, group["momentum"]) for _, gradient, moment in batch]
                    self._apply(batch, updates, rate, 1 - group["lr"] * group["weight_decay"])

    def _step_across(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Move matrices of which this process holds some rows. Each is orthogonalised whole, by one process."""
        assert self.across is not None
        triples = [self._triple(parameter) for parameter in parameters]
        updates = [_nesterov(gradient, moment, group["momentum"]).to(self.dtype) for _, gradient, moment in triples]
        shapes = [(parameter.shape[0], parameter.shape[1]) for parameter in parameters]
        moved = self.across(updates, shapes, self._orthogonalise_alike)
        for (weight, _, _), part, (fan_out, fan_in) in zip(triples, moved, shapes, strict=True):
            rate = group["lr"] * max(1.0, fan_out / fan_in) ** 0.5
            weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(part.to(weight.dtype), alpha=rate)

    def _orthogonalise_alike(self, matrices: list[Tensor]) -> list[Tensor]:
        """Each matrix orthogonalised; those of one shape together."""
        done: list[Tensor] = list(matrices)
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for index, matrix in enumerate(matrices):
            by_shape[matrix.shape].append(index)
        for shape, indices in by_shape.items():
            many = max(1, _BATCH_VALUES // shape.numel())
            for start in range(0, len(indices), many):
                batch = indices[start : start + many]
                whole = orthogonalise(torch.stack([matrices[index] for index in batch]), self.steps, self.dtype)
                for index, matrix in zip(batch, whole, strict=True):
                    done[index] = matrix
        return done

    def _triple(self, parameter: Tensor) -> "Slice":
        """What this process holds of a parameter, its gradient and its moment."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        assert parameter.grad is not None
        return Slice(local(parameter), local(parameter.grad), local(state["momentum"]))

    def _slices(self, parameter: Tensor) -> Iterator["Slice"]:
        """Views of a parameter, its gradient and moment as stacks [n, fan_out, fan_in] of bounded size."""
        weight, gradient, moment = self._triple(parameter)
        if not weight.numel():
            return
        shape = (-1, *parameter.shape[-2:])
        stacks = (weight.view(shape), gradient.reshape(shape), moment.view(shape))
        many = max(1, _BATCH_VALUES // stacks[0][0].numel())
        for start in range(0, len(stacks[0]), many):
            yield Slice(*(stack[start : start + many] for stack in stacks))

    def _apply(self, batch: list["Slice"], updates: list[Tensor], rate: float, shrink: float) -> None:
        orthogonal = orthogonalise(torch.cat(updates) if len(updates) > 1 else updates[0], self.steps, self.dtype)
        for (weight, _, _), part in zip(batch, orthogonal.split([len(update) for update in updates]), strict=True):
            weight.mul_(shrink).sub_(part.to(weight.dtype), alpha=rate)


class Slice(NamedTuple):
    """Some matrices of one parameter, each [n, fan_out, fan_in]; weight and moment are views and are moved in place."""

    weight: Tensor
    gradient: Tensor
    moment: Tensor


class Across(Protocol):
    """Rows of sharded matrices, their whole shapes and what to do with whole matrices -> the same rows, done.

    parallel/muon.py has it; on one device nothing is cut.
    """

    def __call__(
        self,
        parts: list[Tensor],
        shapes: list[tuple[int, int]],
        orthogonalise: Callable[[list[Tensor]], list[Tensor]],
    ) -> list[Tensor]: ...


def _is_cut(parameter: Tensor) -> bool:
    """Whether processes hold rows of one matrix each. Stacks are sharded by the matrix, so theirs are whole."""
    return isinstance(parameter, DTensor) and parameter.dim() == 2 and parameter.grad is not None


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _nesterov(gradient: Tensor, moment: Tensor, momentum: float) -> Tensor:
    moment.lerp_(gradient, 1 - momentum)
    return gradient.lerp(moment, momentum)


_BATCH_VALUES = 1 << 24  # values orthogonalised at once; bounds the extra memory to about five times this


def _batches(slices: list[Slice]) -> Iterator[list[Slice]]:
    """Neighbouring slices of one shape, joined while they hold at most _BATCH_VALUES values."""
    batch: list[Slice] = []
    size = 0
    for piece in slices:
        if batch and size + piece.weight.numel() > _BATCH_VALUES:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += piece.weight.numel()
    if batch:
        yield batch
