"""Mixes of differently split sources: what one holds out, no other trains on, nor anything related to it."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.base.errors import DataError
from trinity.cli.main import main
from trinity.config.data import DataConfig
from trinity.data.documents import Document, writing_documents
from trinity.data.inspect import inspect_mix
from trinity.data.loader import Loader
from trinity.data.mix import Corpus, open_corpus, write_mix
from trinity.data.tokenise import tokenise
from trinity.text.tokenizer import Tokenizer
from trinity.text.train_bpe import train_bpe

ORIGINALS = [Document(f"original {number}", f"{number}.txt", "prose") for number in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(iter(["original words, 12345\n" * 9]), 300)


def child_of(document: Document) -> Document:
    return Document(f"about {document.text}", "made", "prose", parents=(document.id, *document.parents))


def token_folder(place: Path, tokenizer: Tokenizer, documents: list[Document], fraction: float) -> Path:
    with writing_documents(place / "documents", {}, {}) as (writer, _):
        for document in documents:
            writer.write(document)
    tokenise(place / "documents", tokenizer, place / "tokens", fraction)
    return place / "tokens"


def sides(corpus: Corpus) -> tuple[set[str], set[str]]:
    """Ids and roots of what is trained on, and of what is held out."""
    found = []
    for splits in ([source.train for source in corpus.sources], [source.heldout for source in corpus.sources]):
        names: set[str] = set()
        for split in splits:
            ids = [split.document_id(place) for place in range(split.num_documents)]
            assert ids == split.described("id")
            names.update(ids, *split.described("parents"))
        found.append(names)
    return found[0], found[1]


documents_of_a_source = st.lists(
    st.sampled_from([*ORIGINALS, *map(child_of, ORIGINALS), *map(child_of, map(child_of, ORIGINALS))]),
    min_size=1,
    max_size=30,
    unique_by=lambda document: document.id,
)


@settings(max_examples=12)
@given(st.lists(st.tuples(documents_of_a_source, st.sampled_from([0, 0.02, 0.3, 0.9])), min_size=2, max_size=3))
def test_no_text_and_no_ancestor_is_on_both_sides(
    tokenizer: Tokenizer, made: list[tuple[list[Document], float]]
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folders = [token_folder(Path(place, str(n)), tokenizer, *source) for n, source in enumerate(made)]
        try:
            corpus = write_mix([(folder, 1 / len(folders)) for folder in folders], Path(place, "mix"))
        except DataError as error:
            assert "has nothing left to train on" in str(error) and not Path(place, "mix").exists()
            return
        trained, held = sides(corpus)
        assert not trained & held
        for index in range(corpus.num_documents):
            split, at = corpus.locate(index)
            text = corpus.tokenizer.decode(corpus.document(index).tolist())
            assert Document(text, "", "").id == split.document_id(at) not in held
            assert len(corpus.document(index)) == corpus.length(index)
        assert {document.id for document in corpus.heldout()} <= held


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> list[Path]:
    """The same documents split at two shares."""
    return [
        token_folder(tmp_path_factory.mktemp("unequal"), tokenizer, ORIGINALS, fraction) for fraction in (0.02, 0.3)
    ]


def test_what_is_dropped_is_said_and_never_served(unequal: list[Path], tmp_path: Path, capsys) -> None:
    few, many = (open_corpus(folder) for folder in unequal)
    leaking = {document.id for document in many.heldout()} - {document.id for document in few.heldout()}
    shares = [f"{folder}=0.5" for folder in unequal]
    assert main(["data", "mix", *shares, "--out", str(tmp_path / "mix")]) == 0
    assert f"{len(leaking)} documents dropped" in capsys.readouterr().out
    sources = json.loads((tmp_path / "mix" / "mix.json").read_text())["sources"]
    assert [source["dropped"] for source in sources] == [len(leaking), 0] and leaking
    corpus = open_corpus(tmp_path / "mix")
    assert corpus.num_documents == few.num_documents + many.num_documents - len(leaking)
    assert corpus.num_tokens == sum(corpus.length(index) for index in range(corpus.num_documents))
    assert [source["dropped"] for source in inspect_mix(corpus)["sources"]] == [len(leaking), 0]
    loader = Loader(tmp_path / "mix", DataConfig(sequence_length=64, buffer_documents=8), 0)
    rows = loader.next_batch(60).tokens
    served = set(loader.tokenizer.decode(rows.flatten().tolist()).split("original "))
    held = {document.text.split()[1] for document in corpus.heldout()}
    assert not held & served and len(served & {document.text.split()[1] for document in ORIGINALS}) > 10
    plain = Corpus(tmp_path, [source for part in (few, many) for source in part.sources], [0.5, 0.5])
    assert corpus.fingerprint != plain.fingerprint, "a run that read the leaking mix is not resumed on this one"


def test_equal_splits_drop_nothing(unequal: list[Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    children = token_folder(tmp_path / "children", tokenizer, list(map(child_of, ORIGINALS)), 0.3)
    corpus = write_mix([(unequal[1], 0.5), (children, 0.5)], tmp_path / "mix")
    assert [source.num_left_out for source in corpus.sources] == [0, 0]
    assert [source.fingerprint for source in corpus.sources] == [
        open_corpus(folder).fingerprint for folder in (unequal[1], children)
    ]


def test_a_source_with_nothing_left_is_refused(unequal: list[Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    held = next(iter(open_corpus(unequal[1]).heldout()))
    # A single original is trained on, whatever its hash.
    tiny = token_folder(tmp_path / "tiny", tokenizer, [child_of(Document(held.text, "", ""))], 0.3)
    with pytest.raises(DataError, match="nothing left to train on: all 1 of its documents"):
        write_mix([(unequal[1], 0.5), (tiny, 0.5)], tmp_path / "mix")
    assert not (tmp_path / "mix").exists()


def test_a_mix_without_its_list_of_dropped_documents_is_refused(unequal: list[Path], tmp_path: Path) -> None:
    mix = write_mix([(folder, 0.5) for folder in unequal], tmp_path / "mix").path
    np.save(mix / "dropped-00000.npy", np.empty(0, np.int64))
    with pytest.raises(DataError, match="dropped-00000.npy has"):
        open_corpus(mix)
