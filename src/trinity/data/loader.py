"""The loader: rows of tokens with targets and document numbers, and a state that resumes the identical stream."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity.base.errors import DataError
from trinity.config.data import DataConfig
from trinity.data.mix import open_corpus
from trinity.data.rsdb import DocumentBuffer
from trinity.model.loss import IGNORED


class Batch(NamedTuple):
    """B rows of T positions, all int64."""

    tokens: Tensor  # [B, T]
    targets: Tensor  # [B, T]; the document's next token, IGNORED at its last
    document_ids: Tensor  # [B, T]; running number of the segment inside its row, attention stays within equal numbers


class Loader:
    """Batches of a token or mix folder, without end. Equal folder, configuration and seed give an equal stream.

    The number of rows asked for at once does not change the stream: two batches of one row are one of two.
    """

    def __init__(self, folder: Path, config: DataConfig, seed: int) -> None:
        self.corpus = open_corpus(folder)
        self.tokenizer = self.corpus.tokenizer
        self.data_fingerprint = self.corpus.fingerprint
        self._config = config
        order = self.corpus.order(seed)
        # More places than documents would hold nothing but further copies of the same ones.
        capacity = min(config.buffer_documents, self.corpus.num_documents)
        self._buffer = DocumentBuffer(order, self.corpus.length, capacity, seed)

    def next_batch(self, rows: int) -> Batch:
        """The next `rows` rows of config.sequence_length tokens."""
        shape = (rows, self._config.sequence_length)
        tokens, targets = np.empty(shape, np.int64), np.empty(shape, np.int64)
        document_ids = np.zeros(shape, np.int64)
        for row in range(rows):
            at = 0
            for number, (document, start, stop) in enumerate(self._buffer.fill(shape[1])):
                ids = self.corpus.document(document)[start : stop + 1]  # one more than is served: the last one's target
                end = at + stop - start
                tokens[row, at:end] = ids[: stop - start]
                targets[row, at : at + len(ids) - 1] = ids[1:]
                targets[row, at + len(ids) - 1 : end] = IGNORED
                if self._config.intra_document_mask:
                    document_ids[row, at:end] = number
                at = end
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(document_ids))

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on, ready for JSON; a few numbers for each live document."""
        return {"data": self.data_fingerprint, "buffer": self._buffer.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises DataError when the folder holds other data than it did then."""
        if state["data"] != self.data_fingerprint:
            raise DataError(
                f"{self.corpus.path} holds other data ({self.data_fingerprint}) than this run began with "
                f"({state['data']}).",
                "Give the folder the run began with, or start a new run.",
            )
        self._buffer.load_state(state["buffer"])
