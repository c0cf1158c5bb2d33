"""What some sequences read in one step: as lists, and as tensors for a device.

Sequences with few new tokens (answers, with or without drafts) come first in a Step. Each of their tokens is a row of
its own, which sees the past by its own position: one step of so many rows differs from the next in nothing but the
numbers in its tensors, and can be repeated (engine/graphs.py). Parts of prompts, `texts`, follow.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.engine.pages import pages_for

FEW = 8  # tokens of one sequence that are rows of their own; more are read as a text


class Rows(NamedTuple):
    """What one sequence has in a step."""

    tokens: list[int]
    position: int  # of the first
    pages: list[int]  # of global layers, from the text's beginning on, with room for these tokens
    ring: list[int]  # of local layers
    wanted: int = 1  # of how many of the last rows the logits are asked for

    @property
    def is_few(self) -> bool:
        return len(self.tokens) <= FEW

    @property
    def blocks(self) -> int:
        """Pages of the text, these tokens included."""
        return pages_for(self.position + len(self.tokens))


class Output(NamedTuple):
    """What a step made for the wanted rows, in order."""

    logits: Tensor  # [N, V] float32, on the runner's device
    likeliest: list[int]  # the first of each row's greatest logits; -1 where one of them is not finite


class ExpertReads(NamedTuple):
    """What became of experts that were asked for, where memory does not hold all of them; since the start."""

    hits: int  # were in memory
    misses: int  # had to be read from the file
    bytes: int  # read
    stalled_seconds: float  # in which a thread had to wait for an expert


@dataclass(frozen=True)
class Step:
    """M rows of S sequences, on one device."""

    rows: Tensor  # [M, 4] int64: token, position, sequence, and 1 (0 where the row only fills a place)
    pages: Tensor  # [S, W] int64, of global layers
    rings: Tensor  # [S, R] int64, pages of local layers
    few: int  # rows of sequences with few tokens, the first ones
    width: int  # pages that hold the text of any of these
    texts: tuple[Rows, ...] = ()  # of the rows behind them

    def to(self, device: torch.device) -> "Step":
        rows, pages, rings = (tensor.to(device) for tensor in (self.rows, self.pages, self.rings))
        return Step(rows, pages, rings, self.few, self.width, self.texts)

    def take(self, other: "Step") -> None:
        """Have the numbers of another step of this shape."""
        for mine, its in zip((self.rows, self.pages, self.rings), (other.rows, other.pages, other.rings), strict=True):
            mine.copy_(its, non_blocking=True)


def step_of(rows: list[Rows]) -> Step:
    """A step of these rows, those of few tokens first, on the CPU."""
    few = [one for one in rows if one.is_few]
    count = sum(len(one.tokens) for one in few)
    width = max((one.blocks for one in few), default=1)
    return Step(*_tensors(rows, max(one.blocks for one in rows)), count, width, tuple(rows[len(few) :]))


def filled_step(rows: list[Rows], size: int, width: int) -> Step:
    """A step of rows of few tokens with exactly `size` rows, as many sequences and `width` pages, on the CPU.

    Places that are left read the first row again, and write once more what it wrote.
    """
    values, pages, rings = _tensors(rows, width)
    again = values[:1] * torch.tensor([1, 1, 1, 0])
    values = torch.cat((values, again.expand(size - len(values), -1)))
    pages, rings = (torch.cat((t, t.new_zeros(size - len(t), t.shape[1]))) for t in (pages, rings))
    return Step(values, pages, rings, size, width)


def _tensors(rows: list[Rows], width: int) -> tuple[Tensor, Tensor, Tensor]:
    values = [
        (token, one.position + place, number, 1)
        for number, one in enumerate(rows)
        for place, token in enumerate(one.tokens)
    ]
    pages = [one.pages[:width] + [0] * (width - len(one.pages)) for one in rows]
    return torch.tensor(values), torch.tensor(pages), torch.tensor([one.ring for one in rows])
