"""Curation: what repeats leaves, with the rule and the number in the ledger."""

import json
from pathlib import Path

import pytest

from trinity.base.errors import DataError
from trinity.data.curate import (
    broken_rule,
    curate,
    duplicate_line_character_share,
    duplicate_line_share,
    top_ngram_share,
)
from trinity.data.documents import Document, read_documents, writing_documents
from trinity.data.tokenise import hash_share

PROSE = "A fair sentence of ordinary length says something once, and then it ends without any repetition."


def test_measures_on_paper() -> None:
    assert duplicate_line_share("a\nb\n\na\na\n") == 0.5
    assert duplicate_line_character_share("aaa\nb\naaa\n") == pytest.approx(3 / 7)
    assert top_ngram_share("a b a b c", 2) == pytest.approx(4 / 5)
    assert top_ngram_share("all words differ here", 2) == top_ngram_share("", 3) == top_ngram_share("one", 2) == 0
    assert duplicate_line_share("") == duplicate_line_character_share(" \n") == 0


@pytest.mark.parametrize(
    ("text", "kind", "rule"),
    [
        (PROSE, "prose", None),
        ("  short \n", "code", "too short"),
        (PROSE + ("\nClick here" + "!" * 3) * 9, "prose", "duplicate lines"),
        ("".join(f"{word}\n" for word in PROSE.split()) + f"{PROSE}\n" * 2, "prose", "characters in duplicate lines"),
        ("buy now " * 20, "prose", "top 2-gram"),
        ("return None\n" * 20, "code", None),
    ],
)
def test_each_rule_names_itself(text: str, kind: str, rule: str | None) -> None:
    broken = broken_rule(text, kind)
    assert (broken and broken[0]) == rule


def test_duplicates_leave_one_with_the_count_and_every_drop_is_written_down(tmp_path: Path) -> None:
    def folder(name: str, documents: list[Document]) -> Path:
        with writing_documents(tmp_path / name, {}, {}) as (writer, _):
            for document in documents:
                writer.write(document)
        return tmp_path / name

    first = Document(PROSE, "a.txt", "prose")
    again = [Document(PROSE, f"copy{number}.txt", "prose", copies=2) for number in range(2)]
    other = Document(PROSE + " Truly.", "b.txt", "prose")
    source = folder("in", [first, other, *again, *(Document("tiny", name, "prose") for name in ("c.txt", "d.txt"))])
    summary = curate(source, tmp_path / "out")
    kept = list(read_documents(tmp_path / "out"))
    assert [(document.source, document.copies) for document in kept] == [("a.txt", 5), ("b.txt", 1)]
    assert summary.dropped == {"duplicate": 3, "too short": 1}
    ledger = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    assert [(line["source"], line["rule"], line["number"]) for line in ledger] == [
        ("copy0.txt", "duplicate", 5),
        ("copy1.txt", "duplicate", 5),
        ("c.txt", "too short", 4),
        ("d.txt", "duplicate", 2),
    ]
    assert ledger[0]["document"] == first.id
    assert curate(tmp_path / "out", tmp_path / "out").documents == 2  # a folder may be curated onto itself
    with pytest.raises(DataError, match=r"No document of .* stays: 2 were dropped, first x.txt: too short"):
        curate(folder("bad", [Document("x", "x.txt", "prose"), Document("y", "y.txt", "prose")]), tmp_path / "none")


def test_the_copy_that_stays_knows_the_original_that_is_held_out_first(tmp_path: Path) -> None:
    originals = [Document(f"{PROSE} {number}", f"{number}.txt", "prose") for number in range(5)]
    copy = Document(PROSE, "copy.txt", "prose")
    children = [Document(PROSE, "child", "prose", parents=(original.id,)) for original in originals]
    with writing_documents(tmp_path / "in", {}, {}) as (writer, _):
        for document in [copy, *originals, *children]:
            writer.write(document)
    curate(tmp_path / "in", tmp_path / "out")
    kept = list(read_documents(tmp_path / "out"))
    assert len(kept) == 6 and kept[0].copies == 6
    assert kept[0].root == min((original.id for original in originals), key=hash_share)
