"""Follows the memory of tensors: every storage from its creation to its end, by what it is for, and the highest sum.

Works on real tensors and on those without values, which have the sizes all the same. What an operator allocates and
frees within itself is not seen.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_WHOLE = {"c10d._allgather_base_.default": 0, "c10d._reduce_scatter_base_.default": 1}  # which argument is whole


@dataclass
class Peak:
    """The fullest moment of a stage: bytes in all, and by what they are for."""

    bytes: int = 0
    parts: dict[str, int] = field(default_factory=dict)


class Storages(TorchDispatchMode):
    """While entered, every storage that an operator returns is followed until it is freed.

    `stage` is what goes on; storages are named after the stage that made them unless `name` says otherwise. Whole
    layers that FSDP gathers, and gradients on their way to be summed, are "gathered".
    """

    def __init__(self, stage: str) -> None:
        super().__init__()
        self._stage = stage
        self.alive: Counter[str] = Counter()
        self.total = 0
        self.peaks: dict[str, Peak] = {}
        self._known: dict[int, _Known] = {}

    @property
    def stage(self) -> str:
        in_backward = torch._C._current_graph_task_id() != -1  # pyright: ignore[reportAttributeAccessIssue]
        return "backward" if in_backward else self._stage

    @stage.setter
    def stage(self, stage: str) -> None:
        self._stage = stage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.device.type != "meta":
                self._see(_held(value))
        whole = _WHOLE.get(str(func)) if func.namespace == "c10d" else None
        if whole is not None:
            self.name([args[whole]], "gathered")
        return result

    @contextmanager
    def following(self) -> Iterator["Storages"]:
        """Enter, and see storages resized too (FSDP frees and fills its whole layers that way)."""
        resize = torch.UntypedStorage.resize_

        def seen(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._see(storage, "gathered")
            return result

        torch.UntypedStorage.resize_ = seen  # type: ignore[method-assign]
        try:
            with self:
                yield self
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    def name(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what the storages of `tensors` are for."""
        for tensor in tensors:
            self._see(_held(tensor), kind)

    def _see(self, storage: torch.UntypedStorage, kind: str | None = None) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _Known(kind or self.stage, 0, weakref.ref(storage, lambda _: self._gone(key)))
        elif size == known.size and kind in (None, known.kind):
            return
        self.alive[known.kind] -= known.size
        self.total += size - known.size
        known.kind, known.size = kind or known.kind, size
        self.alive[known.kind] += size
        peak = self.peaks.setdefault(self.stage, Peak())
        if self.total > peak.bytes:
            peak.bytes, peak.parts = self.total, dict(self.alive)

    def _gone(self, key: int) -> None:
        known = self._known.pop(key)
        self.alive[known.kind] -= known.size
        self.total -= known.size


def _held(tensor: Tensor) -> torch.UntypedStorage:
    """What this process holds of a tensor: a DTensor is a wrapper as large as the whole."""
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()


@dataclass
class _Known:
    kind: str
    size: int
    watched: Any
