"""The Random Sequential Document Buffer (Trinity report, section 3.3): rows of text that resemble each other.

The buffer holds documents, each with a read head. A row is filled by picking a live document at random and copying
from its head until the document or the row ends; the head stays where it stopped. So a long document comes back later
at a random time, nothing is dropped or cut in advance, and no batch is all one document. When the live documents fall
to the capacity, the buffer is filled up to twice the capacity at once.

Differing microbatch losses (BatchHet) fell by 46 % in the report's small runs. A document that ends gives its place
to the last live one at once, which is what purging at the refill comes to, without searching for the finished.

Every process of a run walks the whole buffer for all rows and copies the tokens of its own alone, so picking must cost
little: three arrays of numbers, and random places taken from blocks.
"""

import zlib
from array import array
from base64 import b64decode, b64encode
from typing import Any, NamedTuple

import numpy as np

from trinity.base.errors import CheckpointError
from trinity.base.seeds import named_seed
from trinity.data.order import MixedOrder

_BLOCK = 1024  # random words drawn at once, 64 bits each
_WORD = 2**32


class Segment(NamedTuple):
    """Tokens start..stop-1 of a document."""

    document: int
    start: int
    stop: int


class Places:
    """Uniform integers below a bound, drawn in blocks: the stream of numpy's `Generator.integers`, a few times faster.

    Lemire's method on 32-bit halves of PCG64's words, the low half first, as numpy does for one number at a time.
    """

    def __init__(self, seed: int) -> None:
        self._words = np.random.PCG64(seed)
        self._begin()

    def _begin(self) -> None:
        """Draw the next block; remember where it began."""
        self._at_block: Any = self._words.state
        words = self._words.random_raw(_BLOCK)
        self._halves = np.stack([words & (_WORD - 1), words >> 32], axis=1).ravel().tolist()
        self._used = 0

    def below(self, bound: int) -> int:
        """A number from 0 to bound - 1, for 1 <= bound < 2**32; of one alone nothing is drawn."""
        if bound == 1:
            return 0
        while True:
            if self._used == 2 * _BLOCK:
                self._begin()
            product = self._halves[self._used] * bound
            self._used += 1
            rest = product % _WORD
            if rest >= bound or rest >= (_WORD - bound) % bound:  # the second, exact, is rarely asked
                return product // _WORD

    def state(self) -> dict[str, Any]:
        return {"block": self._at_block, "used": self._used}

    def load_state(self, state: dict[str, Any]) -> None:
        self._words.state = state["block"]
        self._begin()
        self._used = state["used"]


class DocumentBuffer:
    """Live documents and their read heads. Endless: the order it draws from begins a new epoch by itself."""

    def __init__(self, order: MixedOrder, capacity: int, seed: int) -> None:
        self.order, self.capacity = order, capacity  # the capacity may change at any time; the refill reads it
        self._places = Places(named_seed(seed, "rsdb"))
        self._documents, self._heads, self._ends = array("q"), array("q"), array("q")

    @property
    def live(self) -> int:
        return len(self._documents)

    def fill(self, length: int) -> list[Segment]:
        """Segments of one row, in row order, `length` tokens in all. Their heads advance."""
        documents, heads, ends, below = self._documents, self._heads, self._ends, self._places.below
        segments: list[Segment] = []
        room = length
        while room:
            live = len(documents)
            if live <= self.capacity:
                self._refill()
                live = len(documents)
            place = below(live)
            document, head, end = documents[place], heads[place], ends[place]
            stop = head + room
            if stop < end:
                heads[place] = stop
                segments.append(Segment(document, head, stop))
                return segments
            segments.append(Segment(document, head, end))
            room = stop - end
            last_document, last_head, last_end = documents.pop(), heads.pop(), ends.pop()
            if place < live - 1:
                documents[place], heads[place], ends[place] = last_document, last_head, last_end
        return segments

    def _refill(self) -> None:
        draw, more = self.order.draw, 2 * self.capacity - self.live
        for _ in range(more):
            document, tokens = draw()
            self._documents.append(document)
            self._ends.append(tokens)
        self._heads.extend([0] * more)

    def live_documents(self) -> list[tuple[int, int]]:
        """(document, read head) of all live documents, in their places."""
        return list(zip(self._documents, self._heads, strict=True))

    def state(self) -> dict[str, Any]:
        """All that decides what comes next, ready for JSON. Documents and heads are packed: there may be millions."""
        return {
            "documents": _pack(self._documents),
            "heads": _pack(self._heads),
            "order": self.order.state(),
            "random": self._places.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError where the packed numbers cannot be read."""
        self._documents, self._heads = _unpack(state["documents"]), _unpack(state["heads"])
        self._ends = array("q", self.order.lengths_of(np.array(self._documents, np.int64)).tobytes())
        self.order.load_state(state["order"])
        self._places.load_state(state["random"])


def _pack(numbers: "array[int]") -> str:
    """Little-endian int64, deflated, base64."""
    return b64encode(zlib.compress(np.array(numbers, "<i8").tobytes(), 1)).decode()


def _unpack(text: str) -> "array[int]":
    try:
        return array("q", np.frombuffer(zlib.decompress(b64decode(text)), "<i8").astype(np.int64).tobytes())
    except (ValueError, zlib.error) as error:
        raise CheckpointError("The state of the data cannot be read.", "Use the checkpoint before it.") from error
