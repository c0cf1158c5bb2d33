"""The Random Sequential Document Buffer (Trinity report, section 3.3): rows of text that resemble each other.

The buffer holds documents, each with a read head. A row is filled by picking a live document at random and copying
from its head until the document or the row ends; the head stays where it stopped. So a long document comes back later
at a random time, nothing is dropped or cut in advance, and no batch is all one document. When the live documents fall
to the capacity, the buffer is filled up to twice the capacity at once.

Differing microbatch losses (BatchHet) fell by 46 % in the report's small runs. A document that ends gives its place
to the last live one at once, which is what purging at the refill comes to, without searching for the finished.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from trinity.base.seeds import named_seed
from trinity.data.order import MixedOrder


class Segment(NamedTuple):
    """Tokens start..stop-1 of a document."""

    document: int
    start: int
    stop: int


class DocumentBuffer:
    """Live documents and their read heads. Endless: the order it draws from begins a new epoch by itself."""

    def __init__(self, order: MixedOrder, length_of: Callable[[int], int], capacity: int, seed: int) -> None:
        self._order, self._length_of, self._capacity = order, length_of, capacity
        self._random = np.random.Generator(np.random.PCG64(named_seed(seed, "rsdb")))
        self._documents: list[int] = []
        self._heads: list[int] = []

    @property
    def live(self) -> int:
        return len(self._documents)

    def fill(self, length: int) -> list[Segment]:
        """Segments of one row, in row order, `length` tokens in all. Their heads advance."""
        segments: list[Segment] = []
        room = length
        while room:
            if self.live <= self._capacity:
                self._refill()
            place = int(self._random.integers(self.live))
            document, head = self._documents[place], self._heads[place]
            end = self._length_of(document)
            stop = min(head + room, end)
            segments.append(Segment(document, head, stop))
            room -= stop - head
            if stop == end:
                self._remove(place)
            else:
                self._heads[place] = stop
        return segments

    def _refill(self) -> None:
        while self.live < 2 * self._capacity:
            self._documents.append(self._order.draw())
            self._heads.append(0)

    def _remove(self, place: int) -> None:
        last_document, last_head = self._documents.pop(), self._heads.pop()
        if place < self.live:
            self._documents[place], self._heads[place] = last_document, last_head

    def state(self) -> dict[str, Any]:
        """All that decides what comes next, ready for JSON: a few numbers for each live document."""
        return {
            "documents": list(self._documents),
            "heads": list(self._heads),
            "order": self._order.state(),
            "random": self._random.bit_generator.state,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._documents, self._heads = list(state["documents"]), list(state["heads"])
        self._order.load_state(state["order"])
        self._random.bit_generator.state = state["random"]
