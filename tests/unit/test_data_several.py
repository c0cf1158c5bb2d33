"""Several processes and several corpora: one stream, whoever reads it; a change of data loses and repeats nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trinity.base.errors import DataError
from trinity.config.data import DataConfig
from trinity.data.documents import Document, writing_documents
from trinity.data.loader import Batch, Loader
from trinity.data.mix import open_corpus, write_mix
from trinity.data.tokenise import tokenise
from trinity.text.tokenizer import Tokenizer
from trinity.text.train_bpe import train_bpe

CONFIG = DataConfig(sequence_length=32, buffer_documents=5)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(iter(["words and more words, 12345\n" * 9]), 300)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Callable[..., Path]:
    def folder(name: str, count: int, own: Tokenizer = tokenizer, heldout: float = 0.1) -> Path:
        place = tmp_path_factory.mktemp(name)
        with writing_documents(place / "d", {}, {}) as (writer, _):
            for number in range(count):
                writer.write(Document(f"{name} {number} " + "and words " * (number * 7 % 23), f"{number}", name))
        tokenise(place / "d", own, place / "t", heldout)
        return place / "t"

    return folder


@pytest.fixture(scope="module")
def phases(make: Callable[..., Path]) -> list[Path]:
    """Three corpora: web and code, code and books, books alone."""
    web, code, books = make("web", 30), make("code", 20), make("books", 12)
    later = write_mix([(code, 0.5), (books, 0.5)], web.parent / "later").path
    return [write_mix([(web, 0.8), (code, 0.2)], web.parent / "first").path, later, books]


def named(*later: Path) -> dict[str, Path]:
    return {f"phases.{number}.mix": path for number, path in enumerate(later)}


def loader_of(phases: list[Path], seed: int = 0) -> Loader:
    return Loader(phases[0], CONFIG, seed, named(*phases[1:]))


def rows_of(batches: list[Batch]) -> torch.Tensor:
    """[rows, 3, T]: tokens, targets and document numbers of every row."""
    return torch.cat([torch.stack(list(batch), dim=1) for batch in batches])


@given(
    st.sampled_from([1, 2, 3, 4, 6]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.integers(0, 3),
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([16, 32, 48])), min_size=1, max_size=4),
)
def test_processes_together_read_the_stream_of_one(phases, places, rows, microbatches, seed, walk) -> None:
    """For any number of processes, any microbatch and any turns: their blocks, in order, are the rows of one process.

    All states are equal, and one that is saved goes on identically at another number of processes.
    """
    alone, all_ranks = loader_of(phases, seed), [loader_of(phases, seed) for _ in range(places)]
    for number, length in walk:
        for loader in (alone, *all_ranks):
            loader.turn_to(number, length)
        for _ in range(microbatches):
            blocks = [loader.next_batch(rows, rank, places) for rank, loader in enumerate(all_ranks)]
            assert torch.equal(rows_of(blocks), rows_of([alone.next_batch(rows) for _ in range(places)]))
        assert all(loader.state() == alone.state() for loader in all_ranks)
    resumed = loader_of(phases, seed)
    resumed.load_state(json.loads(json.dumps(all_ranks[-1].state())))
    assert torch.equal(rows_of([alone.next_batch(4)]), rows_of([resumed.next_batch(1) for _ in range(4)]))


def test_a_turn_changes_what_is_drawn_and_finishes_what_was_begun(phases) -> None:
    loader = loader_of(phases)
    loader.next_batch(20)
    begun = [document for document, _ in loader.live_documents()]
    loader.turn_to(2, 32)
    assert [document for document, _ in loader.live_documents()] == begun
    loader.next_batch(200)
    kinds = {loader.corpus.locate(document)[0].kind(0) for document, _ in loader.live_documents()}
    assert kinds == {"books"}


def test_no_phase_trains_on_what_another_holds_out(make) -> None:
    """The same documents, split once at a small share and once at a large one, as two phases of one run."""
    few, many = make("same", 60, heldout=0.02), make("same", 60, heldout=0.4)
    held = {document.id for folder in (few, many) for document in open_corpus(folder).heldout()}
    leaking = {id for id in held if id not in {document.id for document in open_corpus(few).heldout()}}
    assert leaking
    loader = Loader(few, CONFIG, 0, named(many))
    trained = {
        split.document_id(place)
        for index in range(loader.corpus.num_documents)
        for split, place in [loader.corpus.locate(index)]
    }
    assert trained and not trained & held


def test_one_corpus_is_read_as_if_there_were_no_phases(phases) -> None:
    alone, twice = Loader(phases[0], CONFIG, 3), Loader(phases[0], CONFIG, 3, named(phases[0]))
    assert torch.equal(alone.next_batch(50).tokens, twice.next_batch(50).tokens)


def test_later_data_is_checked_at_the_start(phases, make, tmp_path) -> None:
    with pytest.raises(DataError, match="is not a folder.*A later phase of this run reads it.*--set phases.1.mix=$"):
        Loader(phases[0], CONFIG, 0, named(phases[1], tmp_path / "nowhere"))
    other = make("other", 5, train_bpe(iter(["quite another text\n" * 9]), 300))
    with pytest.raises(DataError, match="different tokenizers"):
        Loader(phases[0], CONFIG, 0, named(other))
    state = loader_of(phases).state()
    with pytest.raises(DataError, match="holds other data"):
        Loader(phases[0], CONFIG, 0, named(*phases[2:])).load_state(state)
