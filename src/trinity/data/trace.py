"""What was read of the stream, for when a stretch of it turns out guilty: positions, and the newest documents."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from trinity.data.rsdb import Segment

REMEMBERED = 65536  # pieces of documents; 16 thousand rows of a large run's step hold about twice as many


class Place(NamedTuple):
    """How much was read from the beginning of the stream."""

    rows: int = 0
    tokens: int = 0


class Stretch(NamedTuple):
    """A stretch of the stream, from `first` up to `end`, and the documents in it."""

    first: Place
    end: Place
    documents: list[int]  # distinct, the newest first
    complete: bool  # whether these are all; else the oldest are forgotten


class Trace:
    """Counts rows and tokens, and remembers which documents the newest rows were cut from."""

    def __init__(self) -> None:
        self.place = Place()
        self._pieces: deque[tuple[int, int]] = deque(maxlen=REMEMBERED)  # (row, document)
        self._forgotten = 0  # rows below this are not, or not wholly, remembered
        self._lost = Place()

    def note(self, segments: Sequence[Segment]) -> None:
        """One more row of the stream, made of these pieces."""
        for segment in segments:
            if len(self._pieces) == REMEMBERED:
                self._forgotten = self._pieces[0][0] + 1
            self._pieces.append((self.place.rows, segment.document))
        length = sum(segment.stop - segment.start for segment in segments)
        self.place = Place(self.place.rows + 1, self.place.tokens + length)

    def move_to(self, place: Place) -> None:
        """The stream goes on from `place`; nothing before it is remembered."""
        self.place = self._lost = place
        self._pieces.clear()
        self._forgotten = place.rows

    def since(self, first: Place) -> Stretch:
        """All that was read from `first` on."""
        found = dict.fromkeys(document for row, document in reversed(self._pieces) if row >= first.rows)
        return Stretch(first, self.place, list(found), self._forgotten <= first.rows)

    def lose(self, first: Place) -> Stretch:
        """What was read since `first` and will not be read again, without what was lost before."""
        stretch = self.since(max(first, self._lost))
        self._lost = self.place
        return stretch
