"""Muon for hidden matrices, stacked experts included (one matrix an expert, orthogonalised in a batch).

    m <- mu m + (1 - mu) g          u = orthogonalise((1 - mu) g + mu m)      (Nesterov)
    w <- (1 - lr wd) w - lr sqrt(max(1, fan_out / fan_in)) u

The rate adjustment is the Trinity report's (section 3.4.2), not Moonlight's 0.2 sqrt(max(m, n)). Equal to
torch.optim.Muon (adjust_lr_fn="original") on single matrices; see tests/parity/test_optim.py.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

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
            by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._nesterov(parameter, group["momentum"])
                    by_shape[tuple(parameter.shape[-2:])].append((parameter, update))
            for (fan_out, fan_in), pairs in by_shape.items():
                rate = group["lr"] * max(1.0, fan_out / fan_in) ** 0.5
                for batch in _batches(pairs):
                    self._apply(batch, rate, 1 - group["lr"] * group["weight_decay"])

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = parameter.grad
        assert gradient is not None
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)

    def _apply(self, pairs: list[tuple[Tensor, Tensor]], rate: float, shrink: float) -> None:
        updates = [update.flatten(0, -3) if update.dim() > 2 else update.unsqueeze(0) for _, update in pairs]
        orthogonal = orthogonalise(torch.cat(updates) if len(updates) > 1 else updates[0], self.steps, self.dtype)
        for (parameter, _), part in zip(pairs, orthogonal.split([len(update) for update in updates]), strict=True):
            parameter.mul_(shrink).sub_(part.view_as(parameter).to(parameter.dtype), alpha=rate)


_BATCH_VALUES = 1 << 24  # values orthogonalised at once; bounds the extra memory to about four times this


def _batches(pairs: list[tuple[Tensor, Tensor]]) -> Iterable[list[tuple[Tensor, Tensor]]]:
    """Neighbouring parameters of one shape, joined until they hold _BATCH_VALUES values."""
    batch: list[tuple[Tensor, Tensor]] = []
    size = 0
    for pair in pairs:
        if batch and size + pair[0].numel() > _BATCH_VALUES:
            yield batch
            batch, size = [], 0
        batch.append(pair)
        size += pair[0].numel()
    if batch:
        yield batch
