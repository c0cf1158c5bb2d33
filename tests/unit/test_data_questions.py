"""Question pairs from docstrings: what is asked, what is left out, and the held-out side of the token folder."""

import errno
import json
from pathlib import Path

import pytest

from trinity.align.conversations import read_conversations
from trinity.base.durable import unsealed_differences
from trinity.base.lineage import read_lineage
from trinity.cli.main import main
from trinity.data import questions, stdlib
from trinity.data.documents import writing_documents
from trinity.data.questions import LONGEST_ANSWER, docstring_pairs, write_questions
from trinity.data.stdlib import library_folder, module_documents, module_name
from trinity.data.tokenise import tokenise
from trinity.data.tokens import TokenFolder
from trinity.text.tokenizer import Tokenizer

MODULE = '''
"""About the module."""
def plain(a, b=1, *rest, key: int = 2, **more):
    """Says what
    it does.

    And a second paragraph."""
def _private():
    """Not asked about."""
def undocumented(): ...
async def waits():
    "Waits."
class Thing:
    """A thing."""
    def method(self, x):
        """Does it."""
    def _hidden(self):
        """Not asked about."""
    class Inner:
        """Inside."""
class _Hidden:
    """Not asked about."""
    def method(self):
        """Nor this."""
def long():
    """%s"""
''' % ("x" * (LONGEST_ANSWER + 1))


@pytest.fixture
def library(tmp_path: Path, monkeypatch) -> Path:
    """A library of three modules: one to ask about, one private, one that does not parse."""
    folder = tmp_path / "library"
    (folder / "package").mkdir(parents=True)
    sources = {"package/__init__.py": MODULE, "_private.py": MODULE, "broken.py": "def ("}
    for name, source in sources.items():
        (folder / name).write_text(source)
    monkeypatch.setattr(stdlib, "library_folder", lambda: folder)
    monkeypatch.setattr(questions, "library_files", lambda: [(name, len(text)) for name, text in sources.items()])
    return folder


def test_what_is_asked_and_what_is_left_out(library: Path):
    pairs = [(pair.name, pair.question, pair.answer) for pair in docstring_pairs()]
    assert pairs == [
        ("package.plain", "What does package.plain do?", "Says what it does."),
        ("package.plain", "How is package.plain called?", "package.plain(a, b=1, *rest, key: int=2, **more)"),
        ("package.waits", "What does package.waits do?", "Waits."),
        ("package.waits", "How is package.waits called?", "package.waits()"),
        ("package.Thing", "What does package.Thing do?", "A thing."),
        ("package.Thing.method", "What does package.Thing.method do?", "Does it."),
        ("package.Thing.method", "How is package.Thing.method called?", "package.Thing.method(self, x)"),
        ("package.Thing.Inner", "What does package.Thing.Inner do?", "Inside."),
    ]


@pytest.fixture(scope="module")
def few_modules() -> list[tuple[str, int]]:
    names = ("argparse.py", "collections/__init__.py", "datetime.py", "json/__init__.py", "os.py", "textwrap.py")
    return [(name, (library_folder() / name).stat().st_size) for name in names]


def test_pairs_of_the_library_are_conversations_that_can_be_learnt(few_modules, tmp_path, monkeypatch, debug_data):
    monkeypatch.setattr(questions, "library_files", lambda: few_modules)
    counts = write_questions(tmp_path / "one", 0.4)
    tokenizer, names = Tokenizer.load(debug_data), {}
    for side, count in counts.items():
        path = tmp_path / "one" / f"{side}.jsonl"
        found = read_conversations(path, tokenizer, 2048, strict=True)
        assert len(found.rendered) == count > 0 and found.cut == 0
        asked = [json.loads(line)["messages"][0]["content"] for line in path.read_text("utf-8").splitlines()]
        assert len(asked) == count
        names[side] = {question.split()[2] for question in asked}
    assert not names["train"] & names["heldout"], "both questions about a name are on the same side"
    assert not unsealed_differences(tmp_path / "one") and read_lineage(tmp_path / "one")["kind"] == "conversations"
    monkeypatch.setattr(questions, "library_files", lambda: few_modules[::-1])
    write_questions(tmp_path / "two", 0.4)
    for side in counts:
        one, two = (
            sorted((tmp_path / folder / f"{side}.jsonl").read_bytes().split(b"\n")) for folder in ("one", "two")
        )
        assert one == two, "which side a pair is on depends on its module alone"


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.7])
def test_no_training_pair_comes_from_a_held_out_module(few_modules, fraction, tmp_path, monkeypatch, debug_data):
    """The sides are those of a token folder made with the same share, module by module."""
    monkeypatch.setattr(questions, "library_files", lambda: few_modules)
    with writing_documents(tmp_path / "documents", {}, {}) as (writer, _):
        for name, _ in few_modules:
            for document in module_documents(name):
                writer.write(document)
    tokenise(tmp_path / "documents", Tokenizer.load(debug_data), tmp_path / "tokens", fraction)
    write_questions(tmp_path / "questions", fraction)
    folder = TokenFolder.open(tmp_path / "tokens")
    for side, split in (("train", folder.train), ("heldout", folder.heldout)):
        modules = {module_name(source.removesuffix(":docs")) for source in split.sources}
        lines = (tmp_path / "questions" / f"{side}.jsonl").read_text("utf-8").splitlines()
        names = [json.loads(line)["messages"][0]["content"].split()[2] for line in lines]
        assert {name.split(".")[0] for name in names} == modules
    assert read_lineage(tmp_path / "questions")["made_by"]["heldout_fraction"] == fraction


def test_the_command_counts_what_it_wrote(library: Path, tmp_path: Path, capsys):
    assert main(["data", "questions", "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["train"] + told["heldout"] == 8
    assert (tmp_path / "out" / "train.jsonl").read_text().count("\n") == told["train"]
    assert main(["data", "questions", "--out", str(tmp_path / "none"), "--heldout", "1.5"]) == 2
    assert "A held-out share of 1.5 is impossible" in capsys.readouterr().err and not (tmp_path / "none").exists()
    assert main(["data", "questions", "--out", str(tmp_path / "out")]) == 0
    assert f"{told['train']} pairs in {tmp_path / 'out' / 'train.jsonl'}" in capsys.readouterr().out


def test_a_module_that_cannot_be_read_is_named_and_not_the_folder_to_write(library, tmp_path, capsys, monkeypatch):
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # file modes mean nothing to an administrator
    assert main(["data", "questions", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "package/__init__.py cannot be read: Permission denied" in error and str(tmp_path / "out") not in error
