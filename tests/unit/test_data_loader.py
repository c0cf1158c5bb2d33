"""The loader: targets are the document's next tokens, rows know their documents, a kill changes nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.base.errors import DataError, UsageError
from trinity.config.data import DataConfig
from trinity.data.documents import Document, writing_documents
from trinity.data.loader import Loader
from trinity.data.mix import open_corpus, parse_shares, write_mix
from trinity.data.tokenise import tokenise
from trinity.model.loss import IGNORED
from trinity.text.tokenizer import Tokenizer
from trinity.text.train_bpe import train_bpe

ROW = 48


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(iter(["words and more words, 12345\n" * 9]), 300)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Callable[[str, int], Path]:
    """A token folder of `count` documents whose texts begin with `name`."""

    def folder(name: str, count: int, own: Tokenizer = tokenizer) -> Path:
        place = tmp_path_factory.mktemp("data")
        with writing_documents(place / "d", {}, {}) as (writer, _):
            for number in range(count):
                writer.write(Document(f"{name} {number} " + "and words " * (number * 7 % 23), f"{number}", name))
        tokenise(place / "d", own, place / "t", 0.1)
        return place / "t"

    return folder


@pytest.fixture(scope="module")
def folder(make: Callable[[str, int], Path]) -> Path:
    return make("prose", 40)


def config(rows_mask: bool = True) -> DataConfig:
    return DataConfig(sequence_length=ROW, buffer_documents=6, intra_document_mask=rows_mask)


def test_targets_are_the_next_token_of_the_same_document(folder: Path, tokenizer: Tokenizer) -> None:
    loader = Loader(folder, config(), 0)
    whole = {tuple(loader.corpus.document(index).tolist()) for index in range(loader.corpus.num_documents)}
    batch = loader.next_batch(50)
    assert batch.tokens.shape == batch.targets.shape == batch.document_ids.shape == (50, ROW)
    assert batch.tokens.dtype == batch.targets.dtype == batch.document_ids.dtype == torch.int64
    ended = continued = 0
    for tokens, targets, numbers in zip(*(part.tolist() for part in batch), strict=True):
        assert numbers[0] == 0 and set(numbers) == set(range(numbers[-1] + 1)) and numbers == sorted(numbers)
        for number in set(numbers):
            places = [place for place in range(ROW) if numbers[place] == number]
            piece = [tokens[place] for place in places]
            goals = [targets[place] for place in places]
            assert goals[:-1] == piece[1:]
            if piece[-1] == tokenizer.eos_id:
                assert goals[-1] == IGNORED
                ended += 1
            else:  # the row ended first: the target was peeked beyond it
                extended = (*piece, goals[-1])
                assert any(extended == ids[at : at + len(extended)] for ids in whole for at in range(len(ids)))
                continued += 1
    assert ended > 10 and continued > 10


def test_rows_are_one_document_to_attention_when_the_mask_is_off(folder: Path) -> None:
    masked, open_rows = Loader(folder, config(), 0).next_batch(4), Loader(folder, config(False), 0).next_batch(4)
    assert not open_rows.document_ids.any() and masked.document_ids.any()
    assert torch.equal(masked.tokens, open_rows.tokens) and torch.equal(masked.targets, open_rows.targets)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 60), st.integers(1, 5), st.integers(0, 3))
def test_a_kill_at_any_point_changes_nothing(shared_folder: Path, before: int, rows: int, seed: int) -> None:
    unbroken = Loader(shared_folder, config(), seed)
    for _ in range(before):
        unbroken.next_batch(1)
    saved = json.dumps(unbroken.state())
    resumed = Loader(shared_folder, config(), seed)
    resumed.load_state(json.loads(saved))
    for _ in range(5):
        for ours, theirs in zip(unbroken.next_batch(rows), resumed.next_batch(rows), strict=True):
            assert torch.equal(ours, theirs)


@pytest.fixture(scope="module")
def shared_folder(make: Callable[[str, int], Path]) -> Path:
    return write_mix([(make("code", 30), 0.6), (make("mail", 12), 0.4)], make("x", 1).parent / "mix").path


def test_the_stream_depends_on_the_seed_and_not_on_the_batch_size(folder: Path) -> None:
    by_one = Loader(folder, config(), 1)
    rows = torch.cat([by_one.next_batch(1).tokens for _ in range(6)])
    assert torch.equal(rows, Loader(folder, config(), 1).next_batch(6).tokens)
    assert not torch.equal(rows, Loader(folder, config(), 2).next_batch(6).tokens)


def test_a_small_corpus_is_not_held_live_in_many_copies(make: Callable[[str, int], Path]) -> None:
    loader = Loader(make("few", 6), DataConfig(sequence_length=ROW, buffer_documents=256), 0)
    for _ in range(40):
        loader.next_batch(1)
        assert len(loader.live_documents()) <= 2 * loader.corpus.num_documents


def test_a_state_of_other_data_is_refused(folder: Path, shared_folder: Path) -> None:
    state = Loader(folder, config(), 0).state()
    with pytest.raises(DataError, match="holds other data"):
        Loader(shared_folder, config(), 0).load_state(state)


def test_a_mix_reads_its_shares_and_holds_out_what_its_sources_do(make: Callable[[str, int], Path]) -> None:
    a, b = make("aaa", 40), make("bbb", 10)
    corpus = write_mix(parse_shares([f"{a}=3", f"{b}=1"]), a.parent / "mix")
    assert corpus.weights == (0.75, 0.25)
    assert corpus.kinds == ["aaa", "bbb"]
    assert corpus.num_documents == open_corpus(a).num_documents + open_corpus(b).num_documents
    order = corpus.order(0)
    for _ in range(400):
        order.draw()
    assert order.tokens_drawn[0] / sum(order.tokens_drawn) == pytest.approx(0.75, abs=0.02)
    held = {document.id for part in (a, b) for document in open_corpus(part).heldout()}
    assert [document.id for document in corpus.heldout()] == sorted(held)
    trained = set()
    for index in range(corpus.num_documents):
        split, place = corpus.locate(index)
        trained.add(split.document_id(place))
        assert split.kind(place) == ("aaa" if index < open_corpus(a).num_documents else "bbb")
    assert not trained & held
    assert corpus.fingerprint == open_corpus(a.parent / "mix").fingerprint != open_corpus(a).fingerprint


def test_impossible_mixes_are_refused(make: Callable, tmp_path: Path, folder: Path) -> None:
    other = make("other", 5, train_bpe(iter(["quite another text\n" * 9]), 300))
    with pytest.raises(DataError, match="different tokenizers"):
        write_mix([(folder, 0.5), (other, 0.5)], tmp_path / "mix")
    for bad in (["x"], ["x=0"], ["x=-1"], ["x=nan"], ["=1"], ["x=1", "./x=2"]):
        with pytest.raises(UsageError):
            parse_shares(bad)
    with pytest.raises(DataError, match="is not a folder"):
        write_mix([(tmp_path / "nowhere", 1.0)], tmp_path / "mix")
    assert not (tmp_path / "mix").exists()


def test_a_mix_notices_that_a_source_has_changed(make: Callable[[str, int], Path], tokenizer: Tokenizer) -> None:
    source = make("before", 5)
    mix = write_mix([(source, 1.0)], source.parent / "mix").path
    with writing_documents(source.parent / "d", {}, {}) as (writer, _):
        writer.write(Document("quite another text", "z", "prose"))
    tokenise(source.parent / "d", tokenizer, source)
    with pytest.raises(DataError, match="has changed since the mix was made"):
        Loader(mix, config(), 0)
