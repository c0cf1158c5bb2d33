"""In which order documents are drawn: a new permutation of every source each epoch, and which source is next.

Nothing here is random at run time. The order of a source is a pure function of (seed, source, epoch); the source drawn
next is the one furthest behind its share of tokens. So a few counters are the whole state.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from trinity.base.seeds import named_seed


def epoch_permutation(num_documents: int, seed: int, source: str, epoch: int) -> np.ndarray:
    """The order of a source's documents in one epoch, int64 [documents]."""
    return np.random.Generator(np.random.PCG64(named_seed(seed, "order", source, epoch))).permutation(num_documents)


class SourceOrder:
    """The documents of one source, epoch after epoch without end."""

    def __init__(self, num_documents: int, seed: int, source: str) -> None:
        assert num_documents > 0
        self._num_documents, self._seed, self._source = num_documents, seed, source
        self.epoch = 0
        self.position = 0  # documents drawn in this epoch

    @cached_property
    def _permutation(self) -> np.ndarray:
        return epoch_permutation(self._num_documents, self._seed, self._source, self.epoch)

    def draw(self) -> int:
        if self.position == self._num_documents:
            self.move_to(self.epoch + 1, 0)
        document = int(self._permutation[self.position])
        self.position += 1
        return document

    def move_to(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self.__dict__.pop("_permutation", None)


class MixedOrder:
    """Draws documents of several sources so that their tokens approach the weights; indices run over all sources."""

    def __init__(
        self, lengths: Sequence[np.ndarray], weights: Sequence[float], names: Sequence[str], seed: int
    ) -> None:
        """`lengths`: tokens of each document of each source; `weights` sum to 1; `names` keep the orders apart."""
        self._lengths = lengths
        self._orders = [SourceOrder(len(own), seed, name) for own, name in zip(lengths, names, strict=True)]
        self._first: list[int] = np.cumsum([0, *map(len, lengths)]).tolist()
        self.turn_to(weights)

    def turn_to(self, weights: Sequence[float]) -> None:
        """Draw by other weights from here on. Sources go on where they stand; shares are counted from here anew.

        Counted from the beginning, the new mix would first make up for what the old one read too much or too little.
        """
        self._shares = [(source, weight) for source, weight in enumerate(weights) if weight > 0]
        self._tokens = [0] * len(weights)  # drawn of each source under these weights
        self._total = 0

    def draw(self) -> tuple[int, int]:
        """The next document and its tokens: of the source with the largest deficit in tokens, the first of equals."""
        tokens, total = self._tokens, self._total
        source, largest = -1, float("-inf")
        for candidate, weight in self._shares:
            deficit = weight * total - tokens[candidate]
            if deficit > largest:
                source, largest = candidate, deficit
        document = self._orders[source].draw()
        length = int(self._lengths[source][document])
        tokens[source] += length
        self._total += length
        return self._first[source] + document, length

    def lengths_of(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of each document, int64, for indices int64 over all sources."""
        sources = np.searchsorted(self._first, documents, side="right") - 1
        found = np.empty(len(documents), np.int64)
        for source, lengths in enumerate(self._lengths):
            own = sources == source
            found[own] = lengths[documents[own] - self._first[source]]
        return found

    @property
    def tokens_drawn(self) -> tuple[int, ...]:
        """Of each source, under the present weights."""
        return tuple(self._tokens)

    def state(self) -> dict[str, Any]:
        return {
            "epochs": [order.epoch for order in self._orders],
            "positions": [order.position for order in self._orders],
            "tokens": list(self._tokens),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; the weights are the caller's to set before."""
        for order, epoch, position in zip(self._orders, state["epochs"], state["positions"], strict=True):
            order.move_to(epoch, position)
        self._tokens = list(state["tokens"])
        self._total = sum(self._tokens)
