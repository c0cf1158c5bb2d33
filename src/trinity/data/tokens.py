"""Reading a token folder: documents as slices of memory-mapped shards, with their kinds, sizes and copies."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

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

    def _column(self, name: str) -> np.ndarray:
        return np.load(self._folder / f"{name}.npy", mmap_mode="r" if self.num_documents else None)

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [documents + 1]: where each document begins, in tokens from the split's beginning."""
        return self._column("offsets")

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [documents]: tokens of each document, begin and end mark included."""
        return np.diff(self.offsets)

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
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
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
        return pq.read_table(self._folder / "documents.parquet", columns=[column]).column(column).to_pylist()


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

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path)

    @cached_property
    def fingerprint(self) -> str:
        """Names the data: equal documents through an equal tokenizer have an equal name.

        Parquet is left out: its bytes differ between versions of the library that writes it, the documents do not.
        """
        files = promised_files(self.path, "tokens")
        return fingerprint(
            {
                name: entry["sha256"]
                for name, entry in files.items()
                if name.endswith((".bin", ".npy", FILE, "tokens.json"))
            }
        )


def verify_tokens(path: Path) -> None:
    """Read and hash every file of a token folder; raises DataError naming those that were altered."""
    promised_files(path, "tokens")
    verify_data(path)
