"""Muon over sharded matrices: whole matrices travel to owners, are orthogonalised there, and travel back.

Orthogonalising a process's rows alone would be another optimiser, one that depends on the layout. Here each matrix is
orthogonalised whole by one process of the replica, so the update is that of one device whatever the layout. Work is
dealt out by cost, equally on every process. Momentum stays sharded; stacked experts are whole where they are and do not
travel at all.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from trinity.plan.dealing import deal, rounds, rows_of


class Owners:
    """Deals the matrices of a step out over the processes of `group`; an `Across` of optim/muon.py."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def __call__(
        self,
        parts: list[Tensor],
        shapes: list[tuple[int, int]],
        orthogonalise: Callable[[list[Tensor]], list[Tensor]],
    ) -> list[Tensor]:
        """parts[i]: this process's rows of matrix i, of shapes[i] whole -> its rows of the orthogonalised matrices."""
        done: list[Tensor] = []
        for start, stop in rounds(shapes, self.size):
            done += self._one_round(parts[start:stop], shapes[start:stop], orthogonalise)
        return done

    def _one_round(
        self,
        parts: list[Tensor],
        shapes: list[tuple[int, int]],
        orthogonalise: Callable[[list[Tensor]], list[Tensor]],
    ) -> list[Tensor]:
        owned = deal(shapes, self.size)
        mine = [shapes[index] for index in owned[self.rank]]
        sent = [sum(parts[index].numel() for index in owned[peer]) for peer in range(self.size)]
        held = [[rows_of(rows, self.size, peer) * width for rows, width in mine] for peer in range(self.size)]
        received = [sum(sizes) for sizes in held]
        flat = torch.cat([parts[index].reshape(-1) for indices in owned for index in indices])
        arrived = flat.new_empty(sum(received))
        dist.all_to_all_single(arrived, flat, received, sent, group=self.group)
        pieces = [part.split(sizes) for part, sizes in zip(arrived.split(received), held, strict=True)]
        whole = [torch.cat([peer[i] for peer in pieces]).view(shape) for i, shape in enumerate(mine)]
        whole = orthogonalise(whole) if whole else []
        back = [
            matrix.reshape(-1).split([held[peer][i] for peer in range(self.size)]) for i, matrix in enumerate(whole)
        ]
        outgoing = [back[i][peer] for peer in range(self.size) for i in range(len(mine))]
        returned = torch.empty_like(flat)
        flat_back = torch.cat(outgoing).to(flat.dtype) if outgoing else flat.new_empty(0)
        dist.all_to_all_single(returned, flat_back, sent, received, group=self.group)
        order = [index for indices in owned for index in indices]
        results = dict(zip(order, returned.split([parts[index].numel() for index in order]), strict=True))
        return [results[index].view(parts[index].shape) for index in range(len(parts))]
