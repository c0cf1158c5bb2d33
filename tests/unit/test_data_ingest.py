"""Ingest: every kind of file in, deterministic order and sources, and everything broken named, counted or refused."""

import errno
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from trinity.base.errors import DataError
from trinity.data import ingest as ingesting
from trinity.data import readers
from trinity.data.documents import Document, read_documents
from trinity.data.ingest import IngestSummary, ingest
from trinity.data.readers import suffix_of
from trinity.data.stdlib import docstrings, library_files, module_documents, module_name, topic_documents


def read(tmp_path: Path, *sources: Path, **options: bool | str) -> tuple[IngestSummary, list[Document], list[dict]]:
    summary = ingest([str(source) for source in sources], tmp_path / "out", **options)  # type: ignore[arg-type]
    lines = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    return summary, list(read_documents(tmp_path / "out")), lines


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with one document of each kind of file, and two files that are none."""
    folder = tmp_path / "corpus"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "secret.txt").write_text("not read")
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfprose\r\nas it is")
    (folder / "a.md").write_text("# docs")
    (folder / "deep" / "er" / "c.py").write_text("code = 1\n")
    (folder / "d.jsonl").write_text(
        '{"text": "first"}\n\n{"text": "third", "kind": "mail", "source": "x", "licence": "MIT"}'
    )
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zipped"}\n'))
    frames = [zstandard.compress(b'{"text": "z'), zstandard.compress(b'std"}\n{"text": "two"}')]
    (folder / "f.jsonl.zst").write_bytes(b"".join(frames))
    pq.write_table(pa.table({"text": ["row", None], "n": [1, 2]}), folder / "g.parquet")
    (folder / "photo.PNG").write_bytes(b"\x89PNG")
    (folder / "Makefile").write_text("all:")
    return folder


def test_every_kind_of_file_is_read_in_order_with_its_source(tmp_path: Path, corpus: Path) -> None:
    summary, documents, ledger = read(tmp_path, corpus)
    assert [(document.source, document.text, document.kind) for document in documents] == [
        ("corpus/a.md", "# docs", "docs"),
        ("corpus/b.txt", "prose\r\nas it is", "prose"),
        ("corpus/d.jsonl:1", "first", "prose"),
        ("x", "third", "mail"),
        ("corpus/deep/er/c.py", "code = 1\n", "code"),
        ("corpus/e.jsonl.gz:1", "zipped", "prose"),
        ("corpus/f.jsonl.zst:1", "zstd", "prose"),
        ("corpus/f.jsonl.zst:2", "two", "prose"),
        ("corpus/g.parquet:1", "row", "prose"),
    ]
    assert documents[3].licence == "MIT"
    assert summary.ignored == {".png": 1, "no suffix": 1}
    assert summary.skipped == {"no text in field 'text'": 1}
    assert [line["source"] for line in ledger] == ["corpus/g.parquet:2"]
    assert summary.documents == 9


def test_an_earlier_output_inside_the_source_is_not_read_again(tmp_path: Path, corpus: Path) -> None:
    ingest([str(corpus)], corpus / "out")
    assert ingest([str(corpus)], corpus / "out").documents == 9


BROKEN = {
    "latin.txt": (b"fine\ncaf\xe9\n", "latin.txt:2: not UTF-8"),
    "latin.py": (b"x = '\xe9'", "latin.py:1: not UTF-8"),
    "json.jsonl": (b'{"text": "ok"}\n{"text": \n', r"json.jsonl:2: broken JSON"),
    "field.jsonl": (b'{"text": "ok"}\n{"txt": "?"}\n', "field.jsonl:2: no text in field 'text'"),
    "list.jsonl": (b'[1]\n{"text": "ok"}\n', "list.jsonl:1: not a JSON object"),
    "bytes.jsonl": (b'{"text": "ok"}\n{"text": "\xff"}\n', "bytes.jsonl:2: not UTF-8"),
    "half.jsonl": (b'{"text": "ok"}\n{"text": "\\ud83d"}\n', "half.jsonl:2: not UTF-8"),
    "deep.jsonl": (b'{"text": "ok"}\n' + b"[" * 100_000 + b"\n", "deep.jsonl:2: broken JSON"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "ok"}\n' * 9)[:-9], "cut.jsonl.gz:.*: compressed stream broken off"),
    "not.jsonl.gz": (b"plainly not", "not.jsonl.gz:1: compressed stream broken off"),
    "cut.jsonl.zst": (
        zstandard.compress(b'{"text": "ok"}\n' * 9)[:-4],
        "cut.jsonl.zst:.*: compressed stream broken off",
    ),
    "not.jsonl.zst": (b"plainly not", "not.jsonl.zst:1: compressed stream broken off"),
    "cut.parquet": (b"PAR1 and no more", "cut.parquet:1: broken Parquet"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_counted_and_named_or_stops_a_strict_run(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(content)
    (folder / "good.txt").write_text("good text")
    summary, documents, ledger = read(tmp_path, folder)
    assert sum(summary.skipped.values()) == 1 == len(ledger)
    assert "good text" in [document.text for document in documents]
    assert all(document.text in ("good text", "ok") for document in documents)
    with pytest.raises(DataError, match=message):
        ingest([str(folder)], tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_nothing_to_read_is_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="nowhere does not exist"):
        ingest([str(tmp_path / "nowhere")], tmp_path / "out")
    with pytest.raises(DataError, match="nothing to ingest"):
        ingest([str(tmp_path / "in")], tmp_path / "out")
    (tmp_path / "in" / "photo.png").write_bytes(b"")
    with pytest.raises(DataError, match="1 files of other kinds"):
        ingest([str(tmp_path / "in")], tmp_path / "out")
    with pytest.raises(DataError, match="not a kind of file"):
        ingest([str(tmp_path / "in" / "photo.png")], tmp_path / "out")
    (tmp_path / "in" / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="bad.txt:1: not UTF-8"):
        ingest([str(tmp_path / "in")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_text_field(tmp_path: Path) -> None:
    file = tmp_path / "qa.jsonl"
    file.write_text('{"question": "why?", "text": "no"}\n')
    _, documents, _ = read(tmp_path, file, text_field="question")
    assert [document.text for document in documents] == ["why?"]


def test_a_long_text_becomes_parts_that_join_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PART_CHARACTERS", 100)
    text = "".join(f"Line {line} of a long story.\n" + "\n" * (line % 4 == 3) for line in range(60)) + "x" * 950
    (tmp_path / "story.txt").write_text(text)
    _, documents, _ = read(tmp_path, tmp_path / "story.txt")
    assert len(documents) > 10
    assert "".join(document.text for document in documents) == text
    lines = text.split("\n")
    for document in documents[:10]:
        number = int(document.source.rpartition(":")[2])
        assert document.text.split("\n")[0] == lines[number - 1]


def test_suffixes() -> None:
    assert [suffix_of(name) for name in ("a.b.TXT", "x.jsonl.GZ", "x.tar.gz", "none", "a.json")] == [
        ".txt",
        ".jsonl.gz",
        ".gz",
        "",
        ".json",
    ]


def test_the_library_gives_source_and_docstrings() -> None:
    names = [name for name, _ in library_files()]
    assert "json/__init__.py" in names and "argparse.py" in names
    assert not [name for name in names if name.startswith("test/") or "site-packages" in name or "idle_test" in name]
    code, docs = module_documents("json/decoder.py")
    assert (code.kind, docs.kind, docs.source) == ("code", "docs", "json/decoder.py:docs")
    assert docs.parents == (code.id,) and docs.root == code.root
    assert "# json.decoder\n" in docs.text and "### json.decoder.JSONDecoder.raw_decode(self, s, idx=0)" in docs.text
    assert list(module_documents("encodings/cp1252.py")) == []


def test_docstrings_as_a_readable_text() -> None:
    source = '"""Mod."""\nclass A:\n    """An A."""\n    def f(self, x=1): "Do f."\n    def _g(self): "hidden"\n'
    assert docstrings(source, "m") == "# m\n\nMod.\n\n## m.A\n\nAn A.\n\n### m.A.f(self, x=1)\n\nDo f.\n"
    assert docstrings("x = 1", "m") == docstrings("def broken(", "m") == ""
    assert [module_name(name) for name in ("json/__init__.py", "os.py")] == ["json", "os"]
    topics = list(topic_documents("topics = {'b': 'The b.\\n', 'a': 'The a.'}"))
    assert [document.text for document in topics] == ["The a.", "The b.\n"]


@pytest.fixture
def deny(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes the system refuse to open a file or list a folder; file modes mean nothing to an administrator."""
    denied: set[str] = set()

    def refusing(function: Callable) -> Callable:
        def opened(path, *given, **named):
            if str(path) in denied:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return function(path, *given, **named)

        return opened

    monkeypatch.setattr(Path, "open", refusing(Path.open))
    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    return lambda path: denied.add(str(path))


def test_what_the_system_refuses_to_show_is_recorded(tmp_path: Path, corpus: Path, deny: Callable) -> None:
    for refused in (corpus / "a.md", corpus / "d.jsonl", corpus / "f.jsonl.zst", corpus / "deep" / "er"):
        deny(refused)
    summary, documents, ledger = read(tmp_path, corpus)
    refused = [(line["source"], line["detail"]) for line in ledger if line["rule"] == "unreadable"]
    names = ("a.md", "d.jsonl", "deep/er", "f.jsonl.zst")
    assert refused == [(f"corpus/{name}", "Permission denied") for name in names]
    assert summary.skipped["unreadable"] == 4 and documents[0].source == "corpus/b.txt"
    with pytest.raises(DataError, match=r"^corpus/a.md: unreadable \(Permission denied\)\."):
        read(tmp_path, corpus, strict=True)


@pytest.mark.parametrize("name", ["b.txt", "."])
def test_a_source_that_cannot_be_read_is_not_blamed_on_the_folder_to_write(
    tmp_path: Path, corpus: Path, deny: Callable, name: str
) -> None:
    deny(corpus / name)
    with pytest.raises(DataError, match=r"No document could be read .* first .*[Uu]nreadable"):
        read(tmp_path, corpus / name)
    assert not (tmp_path / "out").exists()


def test_a_folder_whose_name_looks_like_a_file_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt" / "deep.md").mkdir(parents=True)
    (tmp_path / "notes.txt" / "deep.md" / "a.txt").write_text("words")
    _, documents, _ = read(tmp_path, tmp_path / "notes.txt")
    assert [document.source for document in documents] == ["notes.txt/deep.md/a.txt"]


def test_a_module_of_the_library_that_cannot_be_read_is_recorded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ingesting, "library_files", lambda: [("abc.py", 9), ("no_such_module.py", 9)])
    summary, documents, ledger = read(tmp_path, Path("stdlib"))
    assert documents[0].source == "abc.py" and summary.skipped == {"unreadable": 1}
    assert ledger[0]["source"] == "no_such_module.py" and "No such file" in ledger[0]["detail"]
