"""A corpus: one token folder, or several with weights written down in a mix folder. What the loader and audits open.

    mix.json             {"tokenizer": fingerprint, "sources": [{"path": relative to this folder, "weight",
                         "fingerprint", "dropped"}]}
    dropped-00000.npy    int64 ["dropped"] for each source: its training documents that the mix does not read

What one source holds out no other may train on: a document that is held out elsewhere, that was made from a held-out
text, or from which one was made, is dropped from training. Sources tokenized with different held-out shares, or so
small that the share was rounded for them, would otherwise teach what is later measured.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trinity.base.durable import write_json
from trinity.base.errors import DataError, UsageError
from trinity.base.lineage import fingerprint, write_lineage
from trinity.data.documents import data_folder, folder_kind, promised_files
from trinity.data.order import MixedOrder
from trinity.data.tokens import TokenFolder, TokenSplit
from trinity.text.tokenizer import Tokenizer

MIX = "mix.json"


class HeldoutDocument(NamedTuple):
    """A document that no training run of this corpus reads."""

    text: str
    kind: str
    ids: np.ndarray  # int64 [tokens], begin and end mark included
    bytes: int
    id: str


class Corpus:
    """One or more token folders as one: training documents by index over all, held-out documents as a stream."""

    def __init__(self, path: Path, sources: Sequence[TokenFolder], weights: Sequence[float]) -> None:
        """`weights` sum to 1. Raises DataError when a source has nothing to train on or the tokenizers differ."""
        self.path, self.sources, self.weights = path, tuple(sources), tuple(weights)
        for source in sources:
            if not source.train.num_documents:
                raise DataError(f"{source.path} holds no document to train on.", "Ingest more text.")
        refuse_mixed_tokenizers(sources)
        self._first = np.cumsum([0, *(source.train.num_documents for source in sources)])

    @property
    def num_documents(self) -> int:
        return int(self._first[-1])

    @property
    def num_tokens(self) -> int:
        return sum(source.train.num_tokens for source in self.sources)

    @cached_property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(kind for source in self.sources for kind in source.kinds))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.sources[0].tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """Names what is read: the sources' data and their weights."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint
        return fingerprint([[source.fingerprint, weight] for source, weight in zip(self.sources, self.weights)])

    def locate(self, index: int) -> tuple[TokenSplit, int]:
        """The training split a document lies in, and its index there (for its kind, copies, bytes and id)."""
        source = int(np.searchsorted(self._first, index, side="right")) - 1
        return self.sources[source].train, index - int(self._first[source])

    def document(self, index: int) -> np.ndarray:
        """Ids of a training document, begin and end mark included."""
        split, place = self.locate(index)
        return split.document(place)

    def length(self, index: int) -> int:
        split, place = self.locate(index)
        return int(split.lengths[place])

    def order(self, seed: int) -> MixedOrder:
        """The order training documents are drawn in. A source's order depends on the others only by what they drop."""
        names = [source.fingerprint for source in self.sources]
        return MixedOrder([source.train.lengths for source in self.sources], self.weights, names, seed)

    def heldout(self) -> Iterator[HeldoutDocument]:
        """Held-out documents, sorted by hash: any first part of them is a fair sample of all kinds."""
        splits = [source.heldout for source in self.sources]
        places = sorted(
            (split.document_id(place), number, place)
            for number, split in enumerate(splits)
            for place in range(split.num_documents)
        )
        before = ""
        for id, number, place in places:
            if id == before:  # two sources may hold the same document
                continue
            before = id
            split = splits[number]
            ids = split.document(place).astype(np.int64)
            text = self.tokenizer.decode(ids.tolist())
            yield HeldoutDocument(text, split.kind(place), ids, int(split.bytes[place]), id)


def open_corpus(path: Path | str) -> Corpus:
    """Open a token folder or a mix folder. Raises DataError for anything else, or for a source that has changed."""
    folder = Path(path)
    if folder_kind(folder) != "mix":
        return Corpus(folder, [TokenFolder.open(folder)], [1.0])
    promised_files(folder, "mix")
    try:
        entries = [
            (entry["path"], entry["weight"], entry["fingerprint"], np.load(folder / dropped_name(number)))
            for number, entry in enumerate(read_sources(folder))
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MIX} cannot be read: {error}.", "Make the mix again.") from error
    sources, weights = [], []
    for place, weight, promised, dropped in entries:
        source = TokenFolder.open(Path(os.path.normpath(folder / place)))
        if source.fingerprint != promised:
            raise DataError(
                f"{source.path} has changed since the mix was made ({source.fingerprint}, was {promised}).",
                "Make the mix again.",
            )
        sources.append(source.without(dropped))
        weights.append(weight)
    return Corpus(folder, sources, weights)


def read_sources(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / MIX).read_text())["sources"]


def parse_shares(arguments: list[str]) -> list[tuple[Path, float]]:
    """'A=0.7' 'B=0.3' -> folders and weights that sum to 1. Raises UsageError."""
    shares = []
    for argument in arguments:
        path, _, text = argument.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not path or not 0 < weight < math.inf:
            raise UsageError(
                f"'{argument}' is not a share.", "Write FOLDER=WEIGHT with a weight above 0, such as web=0.7."
            )
        shares.append((Path(path), weight))
    if len({path.resolve() for path, _ in shares}) < len(shares):
        raise UsageError("A folder is named twice.", "Give each folder one weight.")
    total = sum(weight for _, weight in shares)
    return [(path, weight / total) for path, weight in shares]


def write_mix(shares: list[tuple[Path, float]], out: Path) -> Corpus:
    """Write a mix folder of token folders (no token is copied) and open it.

    Raises DataError, before anything is written, for what cannot be mixed and for a source that has nothing left.
    """
    folders = [TokenFolder.open(path) for path, _ in shares]
    Corpus(out, folders, [weight for _, weight in shares])
    dropped = held_out_elsewhere(folders)
    for folder, places in zip(folders, dropped, strict=True):
        if len(places) == folder.train.num_documents:
            raise DataError(
                f"{folder.path} has nothing left to train on: all {len(places)} of its documents are held out by "
                "another source, or related to text that is.",
                "Tokenize the sources with the same --heldout, or leave this one out.",
            )
    with data_folder(out, "mix") as aside:
        sources = [
            {
                "path": os.path.relpath(folder.path.resolve(), out.resolve()),
                "weight": weight,
                "fingerprint": folder.fingerprint,
                "dropped": len(places),
            }
            for folder, (_, weight), places in zip(folders, shares, dropped, strict=True)
        ]
        for number, places in enumerate(dropped):
            np.save(aside / dropped_name(number), places)
        write_json(aside / MIX, {"tokenizer": folders[0].tokenizer_fingerprint, "sources": sources})
        parents = {f"tokens:{source['path']}": source["fingerprint"] for source in sources}
        write_lineage(aside, "mix", parents, {"command": "data mix"})
    return open_corpus(out)


def held_out_elsewhere(sources: Sequence[TokenFolder]) -> list[np.ndarray]:
    """For each source the training documents (int64, ascending) that share text or ancestor with a held-out one."""
    chunks = [chunk for source in sources for chunk in source.heldout.lineage()[0].chunks]
    held = pc.SetLookupOptions(pa.chunked_array(chunks, pa.string()).unique())
    found = []
    for source in sources:
        names, documents = source.train.lineage()
        found.append(np.unique(documents[pc.call_function("is_in", [names], held).to_numpy()]))
    return found


def dropped_name(number: int) -> str:
    return f"dropped-{number:05d}.npy"


def refuse_mixed_tokenizers(sources: Sequence[TokenFolder]) -> None:
    first = sources[0]
    for source in sources[1:]:
        if source.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise DataError(
                f"{source.path} and {first.path} were made with different tokenizers "
                f"({source.tokenizer_fingerprint} and {first.tokenizer_fingerprint}).",
                "Tokenize both with the same tokenizer.",
            )
