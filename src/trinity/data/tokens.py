"""Reading a token folder: documents as slices of memory-mapped shards, with their kinds, sizes and copies."""

import json
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trinity.base.durable import sha256_file
from trinity.base.errors import DataError
from trinity.base.lineage import fingerprint
from trinity.data.documents import promised_files, verify_data
from trinity.data.tokenise import SPLITS, shard_name
from trinity.text.tokenizer import FILE, Tokenizer


class TokenSplit:
    """The documents of one split, by index from 0. Nothing is read before it is asked for."""

    def __init__(self, folder: Path, meta: dict[str, Any], width: np.dtype[Any], kinds: list[str]) -> None:
        self._folder, self._width = folder, width
        self.kinds = kinds
        self.num_documents: int = meta["documents"]
        self.num_tokens: int = meta["tokens"]
        self.num_bytes: int = meta["bytes"]
        self._shard_tokens: list[int] = meta["shards"]
        self._kept: np.ndarray | None = None  # places in the files of the documents shown; None: all of them

    def without(self, places: np.ndarray) -> "TokenSplit":
        """The same split as if the documents at `places` were not there; the others close up."""
        other = TokenSplit.__new__(TokenSplit)
        other._folder, other._width, other.kinds = self._folder, self._width, self.kinds
        other._shard_tokens = self._shard_tokens
        shown = np.arange(self.num_documents) if self._kept is None else self._kept
        other._kept = np.delete(shown, places)
        other.num_documents = len(other._kept)
        other.num_tokens, other.num_bytes = int(other.lengths.sum()), int(other.bytes.sum())
        return other

    def _stored(self, name: str) -> np.ndarray:
        path = self._folder / f"{name}.npy"
        return np.load(path, mmap_mode="r" if sum(self._shard_tokens) else None)

    def _column(self, name: str) -> np.ndarray:
        return self._stored(name) if self._kept is None else self._stored(name)[self._kept]

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [documents in the files + 1]: where each begins, in tokens from the split's beginning."""
        return self._stored("offsets")

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [documents]: tokens of each document, begin and end mark included."""
        lengths = np.diff(self.offsets)
        return lengths if self._kept is None else lengths[self._kept]

    @cached_property
    def bytes(self) -> np.ndarray:
        """int64 [documents]: UTF-8 bytes of each document's text."""
        return self._column("bytes")

    @cached_property
    def copies(self) -> np.ndarray:
        """int64 [documents]: how often the text occurred before duplicates were dropped."""
        return self._column("copies")

    @cached_property
    def kind_index(self) -> np.ndarray:
        """uint16 [documents]: index into `kinds`."""
        return self._column("kinds")

    @cached_property
    def ids(self) -> np.ndarray:
        """uint8 [documents, 32]: the sha256 of each text."""
        return self._column("ids")

    @cached_property
    def _shards(self) -> list[np.ndarray]:
        return [
            np.memmap(self._folder / shard_name(number), self._width, "r") if tokens else np.empty(0, self._width)
            for number, tokens in enumerate(self._shard_tokens)
        ]

    @cached_property
    def _shard_starts(self) -> np.ndarray:
        return np.cumsum([0, *self._shard_tokens])

    def document(self, index: int) -> np.ndarray:
        """The ids of one document, begin and end mark included; a view of the shard, uint16 or uint32."""
        place = index if self._kept is None else int(self._kept[index])
        start, stop = int(self.offsets[place]), int(self.offsets[place + 1])
        shard = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        base = int(self._shard_starts[shard])
        return self._shards[shard][start - base : stop - base]

    def document_id(self, index: int) -> str:
        return self.ids[index].tobytes().hex()

    def kind(self, index: int) -> str:
        return self.kinds[int(self.kind_index[index])]

    @cached_property
    def sources(self) -> list[str]:
        """Where each document came from."""
        return self.described("source")

    def described(self, column: str) -> list[Any]:
        """A column of documents.parquet (id, source, licence, parents) for all documents."""
        return self._described([column]).column(column).to_pylist()

    def _described(self, columns: list[str]) -> pa.Table:
        table = pq.read_table(self._folder / "documents.parquet", columns=columns)
        return table if self._kept is None else table.take(pa.array(self._kept))

    def lineage(self) -> tuple[pa.ChunkedArray, np.ndarray]:
        """Ids of the documents and of all they were made from, and for each id (int64) the document that names it."""
        names, documents, first = [], [np.empty(0, np.int64)], 0
        for batch in self._described(["id", "parents"]).to_batches():
            numbers, parents = np.arange(first, first + len(batch)), batch.column("parents")
            names += [batch.column("id"), parents.flatten()]
            documents += [numbers, np.repeat(numbers, parents.value_lengths().to_numpy(zero_copy_only=False))]
            first += len(batch)
        return pa.chunked_array(names, pa.string()), np.concatenate(documents)


class TokenFolder:
    """An opened token folder. Sizes are checked on opening, every byte by `verify_tokens`."""

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path = path
        self.vocab_size: int = meta["vocab_size"]
        self.tokenizer_fingerprint: str = meta["tokenizer"]
        self.heldout_fraction: float = meta["heldout_fraction"]
        self.kinds: list[str] = meta["kinds"]
        width = np.dtype(meta["dtype"]).newbyteorder("<")
        self.train, self.heldout = (
            TokenSplit(path / split, meta["splits"][split], width, self.kinds) for split in SPLITS
        )
        self._left_out: list[int] = []

    @staticmethod
    def open(path: Path) -> "TokenFolder":
        """Raises DataError naming a missing or cut-off file, or saying what the folder is instead."""
        promised_files(path, "tokens")
        try:
            return TokenFolder(path, json.loads((path / "tokens.json").read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path / 'tokens.json'} cannot be read: {error}.", "Tokenize the documents again."
            ) from error

    def without(self, places: np.ndarray) -> "TokenFolder":
        """The same folder without the training documents at `places`; its fingerprint says so."""
        if not len(places):
            return self
        other = copy(self)
        other.__dict__.pop("fingerprint", None)
        other.train, other._left_out = self.train.without(places), places.tolist()
        return other

    @property
    def num_left_out(self) -> int:
        return len(self._left_out)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises DataError where its bytes are not those of the manifest: every id would mean something else."""
        if sha256_file(self.path / FILE) != promised_files(self.path, "tokens")[FILE]["sha256"]:
            raise DataError(
                f"{self.path / FILE} was altered (sha256 differs from the manifest's).",
                "Restore the file from a copy, such as the tokenizer.json of a run that read this folder.",
            )
        return Tokenizer.load(self.path)

    @cached_property
    def fingerprint(self) -> str:
        """Names the data: equal documents through an equal tokenizer have an equal name.

        Parquet is left out: its bytes differ between versions of the library that writes it, the documents do not.
        """
        files = promised_files(self.path, "tokens")
        data = {
            name: entry["sha256"]
            for name, entry in files.items()
            if name.endswith((".bin", ".npy", FILE, "tokens.json"))
        }
        return fingerprint([data, self._left_out] if self._left_out else data)


def verify_tokens(path: Path) -> None:
    """Read and hash every file of a token folder; raises DataError naming those that were altered."""
    promised_files(path, "tokens")
    verify_data(path)
