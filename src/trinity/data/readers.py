"""One reader for each kind of file: a file becomes a stream of documents, and of troubles where something is broken.

A reader never raises for bad input and never gives half of it a document's name: a text file is checked whole before
its first part is given, a compressed stream that breaks off gives what came before the break and then a Trouble.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from trinity.data.documents import Document

KIND_OF_SUFFIX = {
    ".txt": "prose",
    ".md": "docs",
    ".py": "code",
    ".jsonl": "prose",
    ".jsonl.gz": "prose",
    ".jsonl.zst": "prose",
    ".parquet": "prose",
}
UNREADABLE = "unreadable"
# A long .txt or .md (a book, a whole corpus in one file) is cut at blank lines into parts of about this many
# characters, so that part of it can be held out and memory stays small. Code, JSONL and Parquet are never cut.
PART_CHARACTERS = 64 * 1024


@dataclass(frozen=True)
class Trouble:
    """A file or line that cannot be read: where, which rule it breaks, and the particulars."""

    source: str
    rule: str
    detail: str = ""


def suffix_of(name: str) -> str:
    """'a.JSONL.gz' -> '.jsonl.gz', 'a.tar.gz' -> '.gz'."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    double = "".join(suffixes[-2:])
    return double if double in KIND_OF_SUFFIX else "".join(suffixes[-1:])


def read_file(path: Path, name: str, text_field: str) -> Iterator[Document | Trouble]:
    """Documents and troubles of one file; `name` is what they call their source."""
    suffix = suffix_of(name)
    try:
        if suffix == ".parquet":
            yield from read_parquet(path, name, text_field)
        elif suffix.startswith(".jsonl"):
            yield from read_jsonl(path, name, text_field)
        else:
            yield from read_text(path, name, KIND_OF_SUFFIX[suffix], whole=suffix == ".py")
    except OSError as error:
        yield Trouble(name, UNREADABLE, error.strerror or str(error))


def read_text(path: Path, name: str, kind: str, whole: bool) -> Iterator[Document | Trouble]:
    """A text file as one document, or a long one as parts. Line ends stay as they are; a byte order mark is dropped."""
    bad_line = first_undecodable_line(path)
    if bad_line:
        yield Trouble(f"{name}:{bad_line}", "not UTF-8")
        return
    with path.open(encoding="utf-8-sig", newline="") as file:
        if whole or path.stat().st_size <= PART_CHARACTERS * 3 // 2:
            yield Document(file.read(), name, kind)
            return
        for line, text in parts(file):
            yield Document(text, f"{name}:{line}", kind)


def first_undecodable_line(path: Path) -> int:
    """The number of the first line that is not UTF-8, 0 when all are: no UTF-8 character contains a line end."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def parts(file: IO[str]) -> Iterator[tuple[int, str]]:
    """(first line, text) of consecutive parts; joined they are the file. Cut at blank lines, else at any line end."""
    lines: list[str] = []
    size, first, number = 0, 1, 1
    while line := file.readline(PART_CHARACTERS):
        lines.append(line)
        size += len(line)
        number += line.endswith(("\n", "\r"))
        if size >= PART_CHARACTERS and (not line.strip() or size >= 2 * PART_CHARACTERS):
            yield first, "".join(lines)
            lines, size, first = [], 0, number
    if lines:
        yield first, "".join(lines)


def read_jsonl(path: Path, name: str, text_field: str) -> Iterator[Document | Trouble]:
    number = 0
    try:
        with opened(path, name) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield parse_line(line, f"{name}:{number}", text_field)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        yield Trouble(f"{name}:{number + 1}", "compressed stream broken off", str(error))


def parse_line(line: bytes, where: str, text_field: str) -> Document | Trouble:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Trouble(where, "not UTF-8")
    except (ValueError, RecursionError) as error:
        return Trouble(where, "broken JSON", str(error)[:200])
    if not isinstance(value, dict):
        return Trouble(where, "not a JSON object")
    return from_fields(value, where, text_field)


def from_fields(values: dict[str, Any], where: str, text_field: str) -> Document | Trouble:
    """A document from a row's fields: its text, and source, kind and licence where the row has them as strings."""
    text = values.get(text_field)
    if not isinstance(text, str):
        return Trouble(where, f"no text in field '{text_field}'")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Trouble(where, "not UTF-8", "half of a surrogate pair")
    given = {key: values[key] for key in ("source", "kind", "licence") if isinstance(values.get(key), str)}
    return Document(text, given.get("source") or where, given.get("kind") or "prose", given.get("licence", ""))


def opened(path: Path, name: str) -> IO[bytes]:
    suffix = suffix_of(name)
    if suffix == ".jsonl.gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".jsonl.zst":
        return ZstdLines(path)  # type: ignore[return-value]
    return path.open("rb")


class ZstdLines:
    """The lines of a .zst file. Unlike the library's stream reader it notices a stream that breaks off."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")

    def __enter__(self) -> "ZstdLines":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[bytes]:
        rest = b""
        for chunk in self._chunks():
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
        if rest:
            yield rest

    def _chunks(self) -> Iterator[bytes]:
        frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
        while compressed := self._file.read(1 << 16):
            while compressed:
                begun = True
                yield frame.decompress(compressed)
                compressed = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
        if begun:
            raise EOFError("the file ends inside a frame")


def read_parquet(path: Path, name: str, text_field: str) -> Iterator[Document | Trouble]:
    """One document a row; the source is the row's own or 'file.parquet:row', counted from 1."""
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                yield Trouble(name, f"no text in field '{text_field}'")
                return
            columns = [key for key in (text_field, "source", "kind", "licence") if key in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield from_fields(row, f"{name}:{number}", text_field)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        yield Trouble(f"{name}:{number + 1}", "broken Parquet", " ".join(str(error).split())[:200])
