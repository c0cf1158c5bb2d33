"""Documents and the folders that hold them: Parquet shards with a sealed manifest, written once, read as a stream.

    documents-00000.parquet ...   id, text, source, kind, licence, parents, copies; one row a document
    ledger.jsonl                  what was left out on the way here, one line each, with the rule that said so
    lineage.json                  what the folder was made from
    manifest.json                 sha256 and bytes of every file above

Memory holds one row group (about 8 MiB of text), never the corpus.
"""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trinity.base.durable import MANIFEST, folder_aside, sha256_text, unsealed_differences
from trinity.base.errors import DataError, UsageError
from trinity.base.lineage import LINEAGE, fingerprint, read_lineage, write_lineage
from trinity.data.ledger import Ledger

KINDS_OF_FOLDER = ("documents", "tokens", "mix", "tokenizer")
GROUP_BYTES = 8 * 2**20
SHARD_BYTES = 256 * 2**20
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.large_string()),
        ("source", pa.string()),
        ("kind", pa.string()),
        ("licence", pa.string()),
        ("parents", pa.list_(pa.string())),
        ("copies", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Document:
    """One text with where it came from. Equal texts have equal ids, whatever their source."""

    text: str
    source: str  # 'folder/file.py' or 'file.jsonl:12'
    kind: str  # 'code', 'docs', 'prose', ...: what results are later broken down by
    licence: str = ""
    parents: tuple[str, ...] = ()  # ids of the documents this one was made from, nearest first, the original last
    copies: int = 1  # how often the text occurred before exact duplicates were dropped

    @cached_property
    def id(self) -> str:
        return sha256_text(self.text)

    @property
    def root(self) -> str:
        """The id of the original this text descends from; it decides whether all of them are held out."""
        return self.parents[-1] if self.parents else self.id


def folder_kind(folder: Path) -> str | None:
    """What a folder says it is (documents, tokens, mix, tokenizer, run, ...), None when it says nothing readable."""
    try:
        kind = read_lineage(folder).get("kind")
    except (OSError, ValueError, AttributeError):
        return None
    return kind if isinstance(kind, str) else None


@contextmanager
def data_folder(final: Path, kind: str) -> Iterator[Path]:
    """Build a data folder aside and seal it; refuses to replace a folder that is not a data folder of ours."""
    if final.is_file():
        raise UsageError(f"{final} is a file.", "Give --out the name of a folder.")
    if final.is_dir() and any(final.iterdir()) and folder_kind(final) not in KINDS_OF_FOLDER:
        raise UsageError(
            f"{final} exists and is not a data folder; replacing it would lose its files.", "Choose another --out."
        )
    assert kind in KINDS_OF_FOLDER
    with folder_aside(final) as aside:
        yield aside


class DocumentWriter:
    """Appends documents to the shards of a folder under construction."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.documents = 0
        self.bytes = 0
        self._rows: list[Document] = []
        self._group_bytes = self._shard_bytes = self._shards = 0
        self._file: pq.ParquetWriter | None = None

    def write(self, document: Document) -> None:
        size = len(document.text.encode())
        self._rows.append(document)
        self.documents += 1
        self.bytes += size
        self._group_bytes += size
        if self._group_bytes >= GROUP_BYTES:
            self._end_group()
        if self._shard_bytes >= SHARD_BYTES:
            self._end_shard()

    def finish(self) -> None:
        if self._rows or not self.documents:
            self._end_group()
        self._end_shard()

    def close(self) -> None:
        """Let go of the open shard of a folder that will not be finished."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _end_group(self) -> None:
        if self._file is None:
            name = self.folder / f"documents-{self._shards:05d}.parquet"
            self._file = pq.ParquetWriter(name, SCHEMA, compression="zstd")
        columns = {name: [getattr(document, name) for document in self._rows] for name in SCHEMA.names}
        self._file.write_table(pa.table(columns, schema=SCHEMA))
        self._shard_bytes += self._group_bytes
        self._rows, self._group_bytes = [], 0

    def _end_shard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._shards += 1
            self._shard_bytes = 0


@contextmanager
def writing_documents(
    final: Path, parents: dict[str, Any], made_by: dict[str, Any]
) -> Iterator[tuple[DocumentWriter, Ledger]]:
    """A documents folder in the making: (where documents go, where drops are recorded). Sealed when the block ends."""
    with data_folder(final, "documents") as aside:
        with closing(DocumentWriter(aside)) as writer, closing(Ledger(aside / "ledger.jsonl")) as ledger:
            yield writer, ledger
            writer.finish()
        write_lineage(aside, "documents", parents, made_by)


def read_documents(folder: Path) -> Iterator[Document]:
    """The documents of a folder in the order they were written. Raises DataError naming a missing or cut-off shard."""
    for row in read_rows(folder, SCHEMA.names):
        yield Document(
            row["text"], row["source"], row["kind"], row["licence"], tuple(row["parents"] or ()), row["copies"]
        )


def read_rows(folder: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Chosen columns of every document, in order: a pass over ids alone does not read the texts."""
    for shard in document_shards(folder):
        try:
            with pq.ParquetFile(shard) as file:
                for group in range(file.num_row_groups):
                    yield from file.read_row_group(group, columns=columns).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{shard} cannot be read: {error}.", "Make the folder again.") from error


def num_documents(folder: Path) -> int:
    """How many documents a folder holds, from the ends of its shards alone."""
    try:
        return sum(pq.read_metadata(shard).num_rows for shard in document_shards(folder))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"A shard of {folder} cannot be read: {error}.", "Make the folder again.") from error


def document_shards(folder: Path) -> list[Path]:
    """The shard files of a documents folder, their sizes checked against the manifest."""
    promised = promised_files(folder, "documents")
    return [folder / name for name in sorted(promised) if name.endswith(".parquet")]


_MADE_BY = {
    "documents": "ingest SOURCE",
    "tokens": "tokenize DOCUMENTS --tokenizer TOKENIZER",
    "mix": "mix TOKENS=WEIGHT TOKENS=WEIGHT",
}


def promised_files(folder: Path, kind: str) -> dict[str, dict[str, Any]]:
    """The manifest's files of a data folder of this kind, each present with its size. Raises DataError otherwise."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.", f"Make one: trinity data {_MADE_BY[kind]} --out DIR.")
    found = folder_kind(folder)
    if found != kind:
        raise DataError(
            f"{folder} is not a {kind} folder{f' but a {found} folder' if found else ''}.",
            "'trinity data inspect' shows what a folder is.",
        )
    try:
        promised: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} has no readable manifest.", "Make the folder again.") from error
    for name, entry in promised.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing.", "Make the folder again.")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise DataError(f"{path} has {size} bytes instead of {entry['bytes']}.", "Make the folder again.")
    return promised


def verify_data(folder: Path) -> None:
    """Read every byte of a data folder; raise DataError naming each file that is not as it was written."""
    differences = unsealed_differences(folder)
    if differences:
        raise DataError(f"{folder} is not what was written: {'; '.join(differences)}.", "Make the folder again.")


def content_fingerprint(folder: Path) -> str:
    """A name for the data in a sealed folder: equal content has an equal name, whenever and by whom it was made."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    return fingerprint({name: entry["sha256"] for name, entry in files.items() if name != LINEAGE})
