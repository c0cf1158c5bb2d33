"""Context parallelism: the positions of a row are cut into equal stretches, one a process, in order.

Layers are computed on the own stretch; only attention reads further, and each kind of layer only what it needs:

    local layers    the last window - 1 keys and values before the stretch come from the processes that hold them (halo)
    global layers   heads are exchanged for positions (Ulysses): every process attends for a share of the heads over the
                    whole row, so that work is even although late positions see more than early ones

Equal to attention over the whole row. Shapes: q [B, H, t, C]; k, v [B, J, t, C]; t = T / P positions of a stretch.
"""

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from trinity.model.attend import Attend, Packed
from trinity.parallel.expert import Exchange
from trinity.parallel.mesh import World


class Stretch(NamedTuple):
    """The positions of some rows that one process computes: t = T / P of T."""

    tokens: Tensor  # [B, t]
    targets: Tensor  # [B, t]
    positions: Tensor  # [t]
    document_ids: Tensor  # [B, T], of the whole rows


class Rows(Protocol):
    """Rows as a loader gives them: three [B, T] int64 tensors."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def document_ids(self) -> Tensor: ...


def own_stretch(rows: Rows, world: World) -> Stretch:
    """This process's part of `rows`, on its device: all of it unless processes share rows."""
    length = rows.tokens.shape[1] // world.context_size
    here = slice(world.context_rank * length, (world.context_rank + 1) * length)
    tokens, targets, documents = (
        x.to(world.device, non_blocking=True) for x in (rows.tokens[:, here], rows.targets[:, here], rows.document_ids)
    )
    return Stretch(tokens, targets, torch.arange(here.start, here.stop, device=world.device), documents)


def attend_over(document_ids: Tensor, world: World) -> Attend:
    """How a query of a stretch reads its row in this world."""
    return Packed(document_ids) if world.context_size == 1 else ContextParallel(document_ids, world.context_group)


class ContextParallel:
    """An Attend (model/attend.py) over the processes of `group`. document_ids [B, T] are those of the whole rows."""

    def __init__(self, document_ids: Tensor, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.stretch = document_ids.shape[1] // self.size
        self.document_ids = document_ids
        self.whole = Packed(document_ids)
        self.near: dict[int, Packed] = {}  # by length of the halo

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        if window is None:
            return self._over_heads(layer, q, k, v)
        return self._with_halo(layer, q, k, v, window)

    def _with_halo(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Prepend what the window reaches back to, attend, and drop the outputs of those positions."""
        there = [self._reach(peer, self.rank, window) for peer in range(self.size)]
        here = [self._reach(self.rank, peer, window) for peer in range(self.size)]
        both = torch.stack((k, v)).permute(3, 0, 1, 2, 4)  # [t, 2, B, J, C]
        tails = torch.cat([both[self.stretch - reach :] for reach in there])
        halo_k, halo_v = Exchange.apply(tails, here, there, self.group).permute(1, 2, 3, 0, 4)
        before = sum(here)
        if before not in self.near:
            start = self.rank * self.stretch
            self.near[before] = Packed(self.document_ids[:, start - before : start + self.stretch])
        k, v = torch.cat((halo_k, k), dim=2), torch.cat((halo_v, v), dim=2)
        out = self.near[before](layer, F.pad(q, (0, 0, before, 0)), k, v, window)
        return out[:, :, before:]

    def _reach(self, reader: int, holder: int, window: int) -> int:
        """How many of the last positions of `holder` the window of `reader`'s first position reaches."""
        if holder >= reader:
            return 0
        between = (reader - holder - 1) * self.stretch
        return max(0, min(self.stretch, window - 1 - between))

    def _over_heads(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend for 1 / P of the heads over all positions."""
        if k.shape[1] % self.size:  # too few key heads to share: each query head brings its own copy
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        q, k, v = (self._heads_for_positions(x) for x in (q, k, v))
        out = self.whole(layer, q, k, v, None)
        return self._positions_for_heads(out)

    def _heads_for_positions(self, x: Tensor) -> Tensor:
        """[B, H, t, C] -> [B, H / P, T, C]."""
        rows, heads, length, size = x.shape
        parts = x.view(rows, self.size, heads // self.size, length, size).transpose(0, 1)  # by receiving process
        arrived = Exchange.apply(parts, [1] * self.size, [1] * self.size, self.group)  # by stretch
        return arrived.permute(1, 2, 0, 3, 4).reshape(rows, heads // self.size, self.size * length, size)

    def _positions_for_heads(self, x: Tensor) -> Tensor:
        """[B, H / P, T, C] -> [B, H, t, C]."""
        rows, heads, length, size = x.shape
        parts = x.view(rows, heads, self.size, length // self.size, size).permute(2, 0, 1, 3, 4)
        arrived = Exchange.apply(parts, [1] * self.size, [1] * self.size, self.group)  # by share of the heads
        return arrived.transpose(0, 1).reshape(rows, heads * self.size, length // self.size, size)
