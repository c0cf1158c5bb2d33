"""The data commands as a person types them: text file to token folder, and mistakes that end in one line."""

import json
from pathlib import Path

import pytest

from trinity.cli.main import main
from trinity.config.data import DataConfig
from trinity.data.embedded import embedded_corpus
from trinity.data.loader import Loader


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    for number in range(12):
        Path("notes", f"{number}.txt").write_text(f"Note {number}: the words of this note say what it is about.\n" * 1)
    Path("notes", "twice.txt").write_text(Path("notes", "1.txt").read_text())
    Path("notes", "broken.jsonl").write_text('{"text": "One line of JSON that can be read well."}\n{"text"\n')
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_from_a_folder_of_notes_to_a_mix(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ingested = run(capsys, "data", "ingest", "notes", "--out", "d")
    assert (ingested["documents"], ingested["skipped"]) == (14, {"broken JSON": 1})
    assert run(capsys, "data", "curate", "d", "--out", "c")["dropped"] == {"duplicate": 1}
    assert run(capsys, "tokenizer", "train", "c", "--vocab-size", "300", "--out", "v")["vocab_size"] == 300
    tokens = run(capsys, "data", "tokenize", "c", "--tokenizer", "v", "--out", "t", "--heldout", "0.2")
    assert tokens["train"]["documents"] + tokens["heldout"]["documents"] == 13
    assert tokens["heldout"]["documents"] > 0
    report = run(capsys, "data", "inspect", "t", "--verify")
    assert report["vocab_size"] == 300 and sum(row["documents"] for row in report["kinds"]) == 13
    assert sum(row["copies_dropped"] for row in report["kinds"]) == 1
    assert run(capsys, "data", "inspect", "c")["dropped"] == {"duplicate": 1}
    run(capsys, "data", "curate", "d", "--out", "c2")
    run(capsys, "data", "tokenize", "c2", "--tokenizer", "v", "--out", "t2", "--heldout", "0.5")
    mixed = run(capsys, "data", "mix", "t=0.7", "t2=0.3", "--out", "m")
    assert [source["weight"] for source in mixed["sources"]] == [0.7, 0.3]
    assert run(capsys, "data", "inspect", "m")["folder"] == "mix"
    for command in (["inspect", "t"], ["inspect", "m"], ["inspect", "c"], ["ingest", "notes", "--out", "d"]):
        assert main(["data", *command]) == 0
    assert capsys.readouterr().out.count("\n") > 20


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("data ingest nowhere --out d", 1, "nowhere does not exist"),
        ("data ingest notes --out d --strict", 1, "notes/broken.jsonl:2: broken JSON"),
        ("data ingest notes --out notes", 2, "would lose its files"),
        ("data ingest notes", 2, "--out"),
        ("data ingets notes", 2, "ingets"),
        ("data curate notes --out d", 1, "not a documents folder"),
        ("data tokenize notes --tokenizer nowhere --out d", 1, "no tokenizer at"),
        ("data inspect nowhere", 1, "does not exist"),
        ("data mix notes --out d", 2, "not a share"),
        ("tokenizer train notes --vocab-size 100 --out d", 1, "not a documents folder"),
        ("tokenizer train notes --vocab-size many --out d", 2, "not a count"),
    ],
)
def test_mistakes_end_in_one_line(
    files: Path, capsys: pytest.CaptureFixture[str], command: str, code: int, message: str
) -> None:
    try:
        assert main(command.split()) == code
    except SystemExit as ended:
        assert ended.code == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (files / "d").exists() and len(list((files / "notes").iterdir())) == 14


def test_the_embedded_corpus_is_whole_and_kept(tmp_path: Path) -> None:
    folder = embedded_corpus(tmp_path / "embedded", 512)
    made = (folder / "manifest.json").stat().st_mtime_ns
    assert embedded_corpus(tmp_path / "embedded", 512) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == made
    loader = Loader(folder, DataConfig(sequence_length=128, buffer_documents=16), 0)
    assert loader.tokenizer.vocab_size == 512
    held = list(loader.corpus.heldout())
    assert len(held) > 2 and {document.kind for document in held} <= {"code", "docs"}
    assert loader.corpus.num_tokens > 64 * 1024
