"""Muon for hidden matrices, stacked experts included (one matrix an expert, orthogonalised in a batch).

    m <- mu m + (1 - mu) g          u = orthogonalise((1 - mu) g + mu m)      (Nesterov)
    w <- (1 - lr wd) w - lr sqrt(max(1, fan_out / fan_in)) u

The rate adjustment is the Trinity report's (section 3.4.2), not Moonlight's 0.2 sqrt(max(m, n)). Equal to
torch.optim.Muon (adjust_lr_fn="original") on single matrices; see tests/parity/test_optim.py.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
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
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.steps, self.dtype = steps, dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                assert parameter.dim() >= 2, "Muon moves matrices; vectors belong to AdamW"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update. Matrices of one shape are orthogonalised together, which is what keeps a CPU busy."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Slice]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape[-2], parameter.shape[-1]] += self._slices(parameter)
            for (fan_out, fan_in), slices in by_shape.items():
                rate = group["lr"] * max(1.0, fan_out / fan_in) ** 0.5
                for batch in _batches(slices):
                    updates = [_nesterov(gradient, moment, group["momentum"]) for _, gradient, moment in batch]
                    self._apply(batch, updates, rate, 1 - group["lr"] * group["weight_decay"])

    def _slices(self, parameter: Tensor) -> Iterator["Slice"]:
        """Views of a parameter, its gradient and moment as stacks [n, fan_out, fan_in] of bounded size."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        assert parameter.grad is not None
        shape = (-1, *parameter.shape[-2:])
        stacks = (parameter.view(shape), parameter.grad.reshape(shape), state["momentum"].view(shape))
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
