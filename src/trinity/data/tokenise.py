"""From a documents folder and a tokenizer to a token folder: [begin] ids [end] of every document, split in two.

    tokens.json                    kinds, counts by split, width of a token, tokenizer fingerprint
    tokenizer.json                 the tokenizer itself, so that the folder needs nothing else
    train/, heldout/
        tokens-00000.bin ...       raw little-endian uint16 (vocabulary up to 65,536) or uint32; a document is never cut
        offsets.npy                int64 [documents + 1], where each document begins, in tokens over all shards
        ids.npy kinds.npy copies.npy bytes.npy    per document: sha256, index into kinds, duplicate count, UTF-8 bytes
        documents.parquet          per document: id, source, licence, parents
    lineage.json, manifest.json

Which split a document belongs to depends on nothing but the hash of the text it descends from: copies of a text, and a
text and what was made from it, are on the same side in every folder. One text that was made from several originals is
held out if any of them is.

The tokenizer was trained on whatever documents its maker gave it, held-out ones included: it has seen how often their
byte pairs occur, which is all it keeps of them.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trinity.base.durable import sha256_text, write_json
from trinity.base.errors import DataError, UsageError
from trinity.base.lineage import write_lineage
from trinity.data.documents import Document, content_fingerprint, data_folder, read_documents, read_rows
from trinity.text.tokenizer import Tokenizer

BATCH_CHARACTERS = 4 * 2**20  # of text encoded at once, spread over the cores by document
SHARD_TOKENS = 2**28
HELDOUT_FRACTION = 0.02
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class SplitSummary:
    documents: int
    tokens: int
    bytes: int
    shards: list[int]  # tokens in each shard file


def tokenise(
    folder: Path,
    tokenizer: Tokenizer,
    out: Path,
    heldout_fraction: float = HELDOUT_FRACTION,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> dict[str, SplitSummary]:
    """Write the token folder `out`; returns what each split holds. `progress` is told the documents done."""
    refuse_impossible_share(heldout_fraction)
    sides = Sides(read_rows(folder, ["id", "parents"]), heldout_fraction)
    width = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    with data_folder(out, "tokens") as aside, ExitStack() as open_files:
        kinds: list[str] = []
        writers = {split: SplitWriter(aside / split, width, shard_tokens) for split in SPLITS}
        for writer in writers.values():
            open_files.callback(writer.close)
        for batch in batches(read_documents(folder)):
            for document, ids in zip(batch, tokenizer.encode_batch([entry.text for entry in batch]), strict=True):
                if document.kind not in kinds:
                    kinds.append(document.kind)
                marked = np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype=width)
                split = "heldout" if sides.held_out(document.id) else "train"
                writers[split].write(document, kinds.index(document.kind), marked)
            if progress:
                progress(len(batch))
        summaries = {split: writer.finish() for split, writer in writers.items()}
        if not summaries["train"].documents:
            raise DataError(f"{folder} holds no document to train on.", "Ingest some text first.")
        write_json(
            aside / "tokens.json",
            {
                "dtype": width.name,
                "vocab_size": tokenizer.vocab_size,
                "tokenizer": tokenizer.fingerprint,
                "heldout_fraction": heldout_fraction,
                "kinds": kinds,
                "splits": {split: asdict(summary) for split, summary in summaries.items()},
            },
        )
        tokenizer.save(aside)
        parents = {"documents": content_fingerprint(folder), "tokenizer": tokenizer.fingerprint}
        write_lineage(aside, "tokens", parents, {"command": "data tokenize", "heldout_fraction": heldout_fraction})
    return summaries


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def refuse_impossible_share(heldout_fraction: float) -> None:
    if not 0 <= heldout_fraction < 1:
        raise UsageError(f"A held-out share of {heldout_fraction} is impossible.", "Give a number from 0 up to 1.")


def hash_share(root: str) -> float:
    """A number in [0, 1) that depends on nothing but the original a document descends from."""
    return int(sha256_text(f"heldout/{root}")[:13], 16) / 16**13


class Sides:
    """Which documents are held out: those whose original's hash falls below the fraction.

    A corpus so small that the hash puts all on one side gives the originals at the end of the range to the other, so
    that two originals are enough to train on one and measure on the other. A single original is trained on.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], fraction: float) -> None:
        self._share: dict[str, float] = {}
        children: set[str] = (
            set()
        )  # equal texts stay together, whether all of them know what they were made from or not
        for row in rows:
            id, parents = row["id"], row["parents"]
            share = hash_share(parents[-1] if parents else id)
            if parents and id in children:
                self._share[id] = min(share, self._share[id])  # held out if one of its originals is
            elif parents or id not in self._share:
                self._share[id] = share
            if parents:
                children.add(id)
        shares = set(self._share.values())
        self._limit = fraction
        if fraction and len(shares) > 1 and fraction <= min(shares):
            self._limit = sorted(shares)[1]
        elif len(shares) > 1 and fraction > max(shares):
            self._limit = max(shares)
        elif len(shares) == 1:
            self._limit = 0.0

    def held_out(self, id: str) -> bool:
        return self._share[id] < self._limit


class SplitWriter:
    """Writes the shards and the index of one split."""

    def __init__(self, folder: Path, width: np.dtype[Any], shard_tokens: int) -> None:
        folder.mkdir()
        self._folder, self._width, self._shard_tokens = folder, width, shard_tokens
        self._shards: list[int] = [0]
        self._file = self._open_shard()
        self._offsets, self._copies, self._bytes = array("q", [0]), array("q"), array("q")
        self._kinds = array("H")
        self._rows: dict[str, list[Any]] = {"id": [], "source": [], "licence": [], "parents": []}

    def _open_shard(self) -> Any:
        return (self._folder / shard_name(len(self._shards) - 1)).open("wb")

    def write(self, document: Document, kind: int, ids: np.ndarray) -> None:
        """Append one document; a shard that would grow past its size is ended first."""
        if self._shards[-1] and self._shards[-1] + len(ids) > self._shard_tokens:
            self._file.close()
            self._shards.append(0)
            self._file = self._open_shard()
        self._file.write(ids.tobytes())
        self._shards[-1] += len(ids)
        self._offsets.append(self._offsets[-1] + len(ids))
        self._copies.append(document.copies)
        self._bytes.append(len(document.text.encode()))
        self._kinds.append(kind)
        for name, column in self._rows.items():
            column.append(list(document.parents) if name == "parents" else getattr(document, name))

    def close(self) -> None:
        self._file.close()

    def finish(self) -> SplitSummary:
        """Write the index; returns what the split holds."""
        self.close()
        ids = np.frombuffer(bytes.fromhex("".join(self._rows["id"])), dtype=np.uint8).reshape(-1, 32)
        for name, values in (
            ("offsets", np.array(self._offsets, dtype=np.int64)),
            ("ids", ids),
            ("copies", np.array(self._copies, dtype=np.int64)),
            ("kinds", np.array(self._kinds, dtype=np.uint16)),
            ("bytes", np.array(self._bytes, dtype=np.int64)),
        ):
            np.save(self._folder / f"{name}.npy", values)
        strings = pa.list_(pa.string())
        schema = pa.schema({name: strings if name == "parents" else pa.string() for name in self._rows})
        pq.write_table(pa.table(self._rows, schema=schema), self._folder / "documents.parquet", compression="zstd")
        return SplitSummary(len(self._copies), self._offsets[-1], sum(self._bytes), self._shards)


def shard_name(number: int) -> str:
    return f"tokens-{number:05d}.bin"
