"""Which process orthogonalises which matrix whole (parallel/muon.py does it, plan/wire.py counts what that sends)."""

import heapq
from functools import lru_cache

VALUES_AT_ONCE = 1 << 26  # values of whole matrices that one process owns in one exchange; bounds the extra memory


def deal(shapes: list[tuple[int, int]], size: int) -> list[list[int]]:
    """Which matrices each of `size` processes owns: the dearest first, each to the one with the least work so far,
    the first of equals."""
    work, owned = [(0, rank) for rank in range(size)], [[] for _ in range(size)]
    for index in sorted(range(len(shapes)), key=lambda index: -_cost(shapes[index])):
        done, owner = work[0]
        owned[owner].append(index)
        heapq.heapreplace(work, (done + _cost(shapes[index]), owner))
    return owned


def rows_of(rows: int, size: int, rank: int) -> int:
    """Rows of a matrix that process `rank` of `size` holds: FSDP2 cuts as torch.chunk does."""
    most = -(-rows // size)
    return max(0, min(most, rows - rank * most))


def _cost(shape: tuple[int, int]) -> int:
    """Proportional to the FLOPs of one Newton-Schulz iteration."""
    short, long = min(shape), max(shape)
    return short * short * (2 * long + short)


def rounds(shapes: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Stretches [start, stop) of neighbouring matrices exchanged at once: so many values that `size` processes own
    VALUES_AT_ONCE each, or one matrix."""
    most = VALUES_AT_ONCE * size
    found, start, held = [], 0, 0
    for index, (rows, width) in enumerate(shapes):
        if index > start and held + rows * width > most:
            found.append((start, index))
            start, held = index, 0
        held += rows * width
    return [*found, (start, len(shapes))] if shapes else []


@lru_cache
def values_sent(shapes: tuple[tuple[int, int], ...], size: int, rank: int) -> int:
    """Values that process `rank` of `size` sends in one update: rows to the owners, and what it owns back."""
    sent = 0
    for start, stop in rounds(list(shapes), size):
        part = list(shapes[start:stop])
        for owner, indices in enumerate(deal(part, size)):
            for rows, width in (part[index] for index in indices):
                mine = rows_of(rows, size, rank)
                sent += (rows - mine if owner == rank else mine) * width
    return sent
