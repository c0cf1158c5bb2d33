"""Document folders: streams that come back whole, sealed shards, and folders that are not ours to replace."""

import errno
from pathlib import Path

import pytest

from trinity.base.errors import DataError, StorageError, UsageError
from trinity.data import documents
from trinity.data.documents import Document, num_documents, read_documents, read_rows, verify_data, writing_documents


def write(folder: Path, texts: list[str]) -> list[Document]:
    made = [Document(text, f"file.txt:{line}", "prose", "CC0", ("p", "q"), line) for line, text in enumerate(texts, 1)]
    with writing_documents(folder, {}, {}) as (writer, _):
        for document in made:
            writer.write(document)
    return made


def test_documents_come_back_as_they_were_over_many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "GROUP_BYTES", 50)
    monkeypatch.setattr(documents, "SHARD_BYTES", 120)
    made = write(tmp_path / "d", [f"{'é🙂' * number} text {number}" for number in range(20)])
    assert len(list((tmp_path / "d").glob("*.parquet"))) > 3
    assert list(read_documents(tmp_path / "d")) == made
    assert num_documents(tmp_path / "d") == 20
    assert [row["id"] for row in read_rows(tmp_path / "d", ["id"])] == [document.id for document in made]


def test_an_empty_folder_of_documents_is_readable(tmp_path: Path) -> None:
    write(tmp_path / "d", [])
    assert list(read_documents(tmp_path / "d")) == []


def test_root_is_the_last_parent() -> None:
    original = Document("a", "a.txt", "prose")
    assert original.root == original.id
    assert Document("b", "b.txt", "prose", parents=("near", "far")).root == "far"


def test_a_cut_off_or_altered_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path / "d", ["some text that is long enough to be cut"] * 3)
    shard = tmp_path / "d" / "documents-00000.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    with pytest.raises(DataError, match=r"documents-00000.parquet has \d+ bytes instead of"):
        list(read_documents(tmp_path / "d"))
    shard.write_bytes(whole[:-9] + b"altered!!")
    with pytest.raises(DataError, match=r"documents-00000.parquet was altered"):
        verify_data(tmp_path / "d")
    with pytest.raises(DataError, match=r"documents-00000.parquet cannot be read"):
        list(read_documents(tmp_path / "d"))
    shard.unlink()
    with pytest.raises(DataError, match=r"documents-00000.parquet is missing"):
        num_documents(tmp_path / "d")


def test_other_folders_are_not_documents(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        list(read_documents(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="is not a documents folder"):
        list(read_documents(tmp_path))
    (tmp_path / "lineage.json").write_text("[")
    with pytest.raises(DataError, match="is not a documents folder"):
        list(read_documents(tmp_path))


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UsageError, match="would lose its files"):
        write(tmp_path / "thesis", ["x"])
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    with pytest.raises(UsageError, match="is a file"):
        write(tmp_path / "thesis" / "chapter.txt", ["x"])


def test_a_full_disk_leaves_the_folder_before_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write(tmp_path / "d", ["kept"])

    def refuse(self: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(documents.DocumentWriter, "_end_group", refuse)
    with pytest.raises(StorageError, match="disk is full"):
        write(tmp_path / "d", ["lost"])
    assert list(read_documents(tmp_path / "d")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
