"""The loader: rows of tokens with targets and document numbers, and a state that resumes the identical stream.

Every process of a run has the same loader in the same state. It walks the read heads over all rows, which costs a
fraction of a second for a step of 134M tokens, and copies the tokens of its own rows only. So the stream is a function
of data, configuration and seed alone, and any number of processes goes on where any other number stopped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity.base.errors import DataError
from trinity.config.data import DataConfig
from trinity.data.corpora import Corpora
from trinity.data.rsdb import DocumentBuffer, Segment
from trinity.data.trace import Place, Stretch, Trace
from trinity.model.loss import IGNORED


class Batch(NamedTuple):
    """B rows of T positions, all int64."""

    tokens: Tensor  # [B, T]
    targets: Tensor  # [B, T]; the document's next token, IGNORED at its last
    document_ids: Tensor  # [B, T]; running number of the segment inside its row, attention stays within equal numbers


class Loader:
    """Batches of a token or mix folder, without end. Equal folders, configuration and seed give an equal stream.

    The number of rows asked for at once does not change the stream: two batches of one row are one of two. `later`
    names what `turn_to` may turn to: the data of later phases, numbered from 1, each by the setting that asks for it.
    """

    def __init__(self, folder: Path, config: DataConfig, seed: int, later: Mapping[str, Path] | None = None) -> None:
        self.corpora = Corpora(folder, later or {})
        self.corpus = self.corpora.union
        self.tokenizer = self.corpus.tokenizer
        self.data_fingerprint = self.corpora.fingerprint
        self._config = config
        self.trace = Trace()
        self._number, self._row = 0, config.sequence_length
        self._buffer = DocumentBuffer(self.corpus.order(seed), self._capacity(), seed)

    def _capacity(self) -> int:
        # More places than documents would hold nothing but further copies of the same ones.
        return min(self._config.buffer_documents, self.corpora.num_documents(self._number))

    def turn_to(self, number: int, row: int) -> None:
        """Draw new documents from corpus `number` and cut rows of `row` tokens from here on; nothing if so already.

        Documents that are live are read to their end, sources go on where they stand: nothing is dropped, nothing is
        read twice.
        """
        self._row = row
        if number != self._number:
            self._number = number
            self._buffer.order.turn_to(self.corpora.weights(number))
            self._buffer.capacity = self._capacity()

    def next_batch(self, rows: int, place: int = 0, places: int = 1) -> Batch:
        """Of the next `rows` x `places` rows the block of `rows` numbered `place`; the others are passed over.

        Block k holds the same rows whatever the number of places, so each microbatch does, and figures over
        microbatches (BatchHet) do not depend on the number of processes.
        """
        for _ in range(rows * place):
            self._next_row()
        batch = self._copied([self._next_row() for _ in range(rows)])
        for _ in range(rows * (places - place - 1)):
            self._next_row()
        return batch

    def _next_row(self) -> list[Segment]:
        segments = self._buffer.fill(self._row)
        self.trace.note(segments)
        return segments

    def _copied(self, rows: list[list[Segment]]) -> Batch:
        shape = (len(rows), self._row)
        tokens, targets = np.empty(shape, np.int64), np.empty(shape, np.int64)
        document_ids = np.zeros(shape, np.int64)
        for row, segments in enumerate(rows):
            at = 0
            for number, (document, start, stop) in enumerate(segments):
                ids = self.corpus.document(document)[start : stop + 1]  # one more than is served: the last one's target
                end = at + stop - start
                tokens[row, at:end] = ids[: stop - start]
                targets[row, at : at + len(ids) - 1] = ids[1:]
                targets[row, at + len(ids) - 1 : end] = IGNORED
                if self._config.intra_document_mask:
                    document_ids[row, at:end] = number
                at = end
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(document_ids))

    def live_documents(self) -> list[tuple[int, int]]:
        """(document, read head) of every document that is begun or waiting in the buffer."""
        return self._buffer.live_documents()

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on, ready for JSON. It is the same on every process."""
        return {
            "data": self.data_fingerprint,
            "corpus": self._number,
            "row": self._row,
            "buffer": self._buffer.state(),
            "read": list(self.trace.place),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises DataError when a folder holds other data than it did then."""
        if state["data"] != self.data_fingerprint:
            raise DataError(
                f"{self.corpus.path} holds other data ({self.data_fingerprint}) than this run began with "
                f"({state['data']}).",
                "Give the folder the run began with, or start a new run.",
            )
        self.turn_to(state["corpus"], state["row"])
        self._buffer.load_state(state["buffer"])
        self.trace.move_to(Place(*state["read"]))

    def lose(self, state: dict[str, Any]) -> Stretch:
        """The stretch read since `state` was taken, which a roll-back to it leaves behind."""
        return self.trace.lose(Place(*state["read"]))
