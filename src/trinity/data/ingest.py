"""From files to documents: folders of .txt, .md and .py, JSONL (plain, .gz, .zst), Parquet, and the word `stdlib`.

Order is deterministic (names sorted) and every document says where it came from: 'folder/file.py', 'file.jsonl:12',
'file.txt:840' for the part of a long text that starts on line 840. What cannot be read is recorded in the ledger with
file and line and counted, or with `strict` ends the command there.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trinity.base.errors import DataError
from trinity.base.lineage import LINEAGE
from trinity.data.documents import Document, writing_documents
from trinity.data.ledger import Ledger
from trinity.data.readers import KIND_OF_SUFFIX, UNREADABLE, Trouble, read_file, suffix_of
from trinity.data.stdlib import library_files, module_documents

STDLIB = "stdlib"


@dataclass(frozen=True)
class SourceFile:
    path: Path
    name: str  # how documents from it name their source
    size: int  # bytes
    trouble: str = ""  # why the system lets nobody look at it


@dataclass(frozen=True)
class IngestSummary:
    out: str
    documents: int
    bytes: int
    documents_by_kind: dict[str, int]
    skipped: dict[str, int]  # ledger rule -> how many
    ignored: dict[str, int]  # suffix of files of other kinds -> how many


def ingest(
    sources: list[str],
    out: Path,
    strict: bool = False,
    text_field: str = "text",
    progress: Callable[[int], None] | None = None,
) -> IngestSummary:
    """Read every source into a documents folder at `out`. `progress` is told the bytes of each file done.

    Raises DataError when a source is missing or nothing in all of them can be read, and in strict mode at the first
    file or line that cannot.
    """
    ignored: Counter[str] = Counter()
    files = [(source, found) for source in sources for found in source_files(source, ignored)]
    if not files:
        kinds = ", ".join(KIND_OF_SUFFIX)
        seen = f" ({sum(ignored.values())} files of other kinds)" if ignored else ""
        raise DataError(f"There is nothing to ingest in {', '.join(sources)}{seen}.", f"Files that are read: {kinds}.")
    kinds_seen: Counter[str] = Counter()
    with writing_documents(
        out, {"sources": sources}, {"command": "data ingest", "text_field": text_field, "strict": strict}
    ) as (writer, ledger):
        for source, file in files:
            for found in library_module(file) if source == STDLIB else read_source(file, text_field):
                if isinstance(found, Trouble):
                    record(found, ledger, strict)
                elif not found.text.strip():
                    ledger.drop("empty", found.source)
                else:
                    writer.write(found)
                    kinds_seen[found.kind] += 1
            if progress:
                progress(file.size)
        if not writer.documents:
            raise DataError(
                f"No document could be read from {', '.join(sources)}; {sum(ledger.counts.values())} were left out, "
                f"first {ledger.first}.",
                "Check the files, or --text-field for JSONL and Parquet.",
            )
    return IngestSummary(
        str(out), writer.documents, writer.bytes, dict(sorted(kinds_seen.items())), dict(ledger.counts), dict(ignored)
    )


def read_source(file: SourceFile, text_field: str) -> Iterator[Document | Trouble]:
    if file.trouble:
        yield Trouble(file.name, UNREADABLE, file.trouble)
    else:
        yield from read_file(file.path, file.name, text_field)


def library_module(file: SourceFile) -> Iterator[Document | Trouble]:
    try:
        yield from module_documents(file.name)
    except DataError as error:
        yield Trouble(file.name, UNREADABLE, str(error.__cause__))


def record(trouble: Trouble, ledger: Ledger, strict: bool) -> None:
    if strict:
        raise DataError(
            f"{trouble.source}: {trouble.rule}{f' ({trouble.detail})' if trouble.detail else ''}.",
            "Mend it, or leave out --strict to skip and count such lines.",
        )
    ledger.drop(trouble.rule, trouble.source, detail=trouble.detail)


def source_bytes(sources: list[str]) -> int:
    """Bytes that `ingest` will read, for a progress display."""
    return sum(file.size for source in sources for file in source_files(source, Counter()))


def source_files(source: str, ignored: Counter[str]) -> list[SourceFile]:
    """The files one source stands for, sorted by name. Counts files of other kinds by suffix in `ignored`."""
    if source == STDLIB:
        return [SourceFile(Path(name), name, size) for name, size in library_files()]
    root = Path(source)
    if root.is_file():
        if suffix_of(root.name) not in KIND_OF_SUFFIX:
            raise DataError(
                f"{root} is not a kind of file that can be read.", f"Known suffixes: {', '.join(KIND_OF_SUFFIX)}."
            )
        return [SourceFile(root, root.name, root.stat().st_size)]
    if not root.is_dir():
        raise DataError(f"{root} does not exist.", f"Give a folder, a file, or the word '{STDLIB}'.")
    found = []
    for path, size, trouble in walk(root):
        if trouble or suffix_of(path.name) in KIND_OF_SUFFIX:
            name = Path(root.resolve().name, path.relative_to(root)).as_posix()
            found.append(SourceFile(path, name, size, trouble))
        else:
            ignored[path.suffix.lower() or "no suffix"] += 1
    return sorted(found, key=lambda file: file.name)


def walk(root: Path) -> Iterator[tuple[Path, int, str]]:
    """(path, bytes, trouble) of the files below a folder, and of folders and files that the system refuses to show.

    Hidden ones, byte code and sealed folders of ours (an earlier --out) are passed over.
    """
    refused: list[OSError] = []
    for place, folders, files in os.walk(root, onerror=refused.append):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name != "__pycache__" and not os.path.exists(Path(place, name, LINEAGE))
        )
        for name in sorted(files):
            path = Path(place, name)
            try:
                if not name.startswith(".") and path.is_file():
                    yield path, path.stat().st_size, ""
            except OSError as error:
                refused.append(error)
    for error in refused:
        yield Path(error.filename), 0, error.strerror or str(error)
