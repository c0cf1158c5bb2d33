"""Token folders: documents whole in shards, a held-out split by hash, sizes and hashes checked, damage named."""

from pathlib import Path

import numpy as np
import pytest

from trinity.base.errors import DataError, UsageError
from trinity.data.documents import Document, writing_documents
from trinity.data.heldout import heldout_documents
from trinity.data.tokenise import Sides, hash_share, tokenise
from trinity.data.tokens import TokenFolder, verify_tokens
from trinity.text.tokenizer import Tokenizer
from trinity.text.train_bpe import train_bpe


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(iter(["some words to learn from, some words to read\n" * 5]), 300)


def documents_folder(path: Path, documents: list[Document]) -> Path:
    with writing_documents(path, {}, {}) as (writer, _):
        for document in documents:
            writer.write(document)
    return path


def numbered(count: int) -> list[Document]:
    return [
        Document(f"Text {number} " + "wörds <|im_end|> " * (number % 7), f"{number}.txt", ("prose", "code")[number % 2])
        for number in range(count)
    ]


def test_every_document_comes_back_from_its_shard(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = numbered(60)
    source = documents_folder(tmp_path / "d", made)
    summary = tokenise(source, tokenizer, tmp_path / "t", heldout_fraction=0.2, shard_tokens=300)
    assert len(summary["train"].shards) > 3 and max(summary["train"].shards) <= 300
    folder = TokenFolder.open(tmp_path / "t")
    by_id = {document.id: document for document in made}
    for split in (folder.train, folder.heldout):
        assert split.num_tokens == split.lengths.sum() == split.offsets[-1]
        for place in range(split.num_documents):
            document = by_id.pop(split.document_id(place))
            ids = split.document(place)
            assert ids.dtype == np.uint16
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            assert not set(ids[1:-1].tolist()) & set(range(32))
            assert tokenizer.decode(ids.tolist()) == document.text
            assert split.kind(place) == document.kind
            assert split.bytes[place] == len(document.text.encode())
            assert split.sources[place] == document.source
            assert split.copies[place] == 1
    assert not by_id
    assert 3 <= folder.heldout.num_documents <= 25
    assert folder.tokenizer.fingerprint == tokenizer.fingerprint == folder.tokenizer_fingerprint
    verify_tokens(tmp_path / "t")


def test_held_out_documents_come_in_hash_order_with_their_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = numbered(60)
    tokenise(documents_folder(tmp_path / "d", made), tokenizer, tmp_path / "t", heldout_fraction=0.3)
    held = list(heldout_documents(tmp_path / "t"))
    assert [document.id for document in held] == sorted(document.id for document in held)
    texts = {document.id: document for document in made}
    for document in held:
        original = texts[document.id]
        assert (document.text, document.kind) == (original.text, original.kind)
        assert document.bytes == len(original.text.encode())
        assert tokenizer.decode(document.ids.tolist()) == original.text
    few = list(heldout_documents(tmp_path / "t", max_bytes=held[0].bytes + 1))
    assert [document.id for document in few] == [document.id for document in held[:2]]


def test_the_split_depends_on_the_original_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = numbered(40)
    children = [Document(f"About {parent.id}", "x", "docs", parents=(parent.id,)) for parent in made]
    grandchildren = [Document(f"On {c.id}", "y", "docs", parents=(c.id, *c.parents)) for c in children]
    copies = [Document(child.text, "elsewhere", "docs") for child in children]
    orders = ([*made, *children, *grandchildren, *copies], [*children, *reversed(made), *copies, *grandchildren])
    held = []
    for number, order in enumerate(orders):
        tokenise(documents_folder(tmp_path / f"d{number}", order), tokenizer, tmp_path / f"t{number}", 0.25)
        split = TokenFolder.open(tmp_path / f"t{number}").heldout
        held.append({split.document_id(place) for place in range(split.num_documents)})
    assert held[0] == held[1]
    for parent, child, grandchild in zip(made, children, grandchildren, strict=True):
        assert len({document.id in held[0] for document in (parent, child, grandchild)}) == 1
    assert {document.id for document in made} & held[0] == {d.id for d in made if hash_share(d.id) < 0.25}


def test_a_text_made_from_several_originals_is_held_out_if_any_of_them_is(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = numbered(40)
    held = next(document for document in made if hash_share(document.id) < 0.25)
    trained = [document for document in made if hash_share(document.id) >= 0.25][:3]
    for number, order in enumerate([[held, *trained], [*trained, held]]):
        children = [Document("The same summary of several.", "x", "docs", parents=(parent.id,)) for parent in order]
        copy = Document("The same summary of several.", "y", "docs")
        folder = documents_folder(tmp_path / f"d{number}", [*made, children[0], copy, *children[1:]])
        tokenise(folder, tokenizer, tmp_path / f"t{number}", 0.25)
        tokens = TokenFolder.open(tmp_path / f"t{number}")
        assert copy.id in tokens.heldout.described("id")
        assert not set(tokens.heldout.described("id")) & set(tokens.train.described("id"))
        assert {parent.id for parent in trained} < set(tokens.train.described("id"))


def sides(count: int, fraction: float) -> int:
    rows = [{"id": document.id, "parents": None} for document in numbered(count)]
    chosen = Sides(rows, fraction)
    return sum(chosen.held_out(row["id"]) for row in rows)


def test_a_small_corpus_still_has_both_sides() -> None:
    assert sides(1, 0.02) == sides(1, 0.99) == 0
    assert sides(2, 1e-9) == 1
    assert sides(2, 1 - 1e-9) == 1
    assert sides(30, 0.0) == 0


def test_equal_documents_have_an_equal_fingerprint(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("a", "b"):
        tokenise(documents_folder(tmp_path / f"d{name}", numbered(5)), tokenizer, tmp_path / name)
    tokenise(documents_folder(tmp_path / "dc", numbered(6)), tokenizer, tmp_path / "c")
    a, b, c = (TokenFolder.open(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


def test_large_vocabularies_take_four_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    large = Tokenizer(tokenizer._source, "large")
    large.vocab_size = 65_537
    tokenise(documents_folder(tmp_path / "d", numbered(3)), large, tmp_path / "t")
    assert TokenFolder.open(tmp_path / "t").train.document(0).dtype == np.uint32


def test_damage_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenise(documents_folder(tmp_path / "d", numbered(9)), tokenizer, tmp_path / "t")
    shard = tmp_path / "t" / "train" / "tokens-00000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"train/tokens-00000.bin has \d+ bytes instead of \d+"):
        TokenFolder.open(tmp_path / "t")
    shard.write_bytes(b"\x00\x01" + whole[2:])
    TokenFolder.open(tmp_path / "t")
    with pytest.raises(DataError, match=r"train/tokens-00000.bin was altered"):
        verify_tokens(tmp_path / "t")
    with pytest.raises(DataError, match="is not a tokens folder but a documents folder"):
        TokenFolder.open(tmp_path / "d")


def test_impossible_requests_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = documents_folder(tmp_path / "d", [])
    with pytest.raises(UsageError, match="1.5"):
        tokenise(source, tokenizer, tmp_path / "t", heldout_fraction=1.5)
    with pytest.raises(DataError, match="no document to train on"):
        tokenise(source, tokenizer, tmp_path / "t")
    assert not (tmp_path / "t").exists()
