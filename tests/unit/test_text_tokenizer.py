"""The tokenizer: round trips, marks that are data in documents, digit groups, streaming, and bad files."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.base.errors import DataError, UsageError
from trinity.text.tokenizer import StreamDecoder, Tokenizer
from trinity.text.train_bpe import ADDED_TOKENS, pre_tokenizer, train_bpe

TEXTS = [
    'def area(width, height):\n    """The area in square metres."""\n    return width * height\n' * 3,
    "The quick brown fox jumps over the lazy dog; 1234567 times, 3.14159 and 2,000.\r\n\r\n" * 3,
    "Ein Gruß aus Köln 東京都 สวัสดี 안녕하세요 🙂🙂\n" * 3,
]
PUBLISHED = Path(__file__).parents[3] / "shared/data/trinity-tokenizer/tokenizer.json"
needs_published = pytest.mark.skipif(not PUBLISHED.exists(), reason="the published tokenizer.json is not here")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(iter(TEXTS), 420)


@pytest.fixture(scope="module")
def published() -> Tokenizer:
    return Tokenizer.load(PUBLISHED)


_tokenizer = train_bpe(iter(TEXTS), 420)
unicode_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=80)
mark = st.sampled_from([name for name, _ in ADDED_TOKENS])


@settings(deadline=None)
@given(st.lists(st.one_of(unicode_text, mark)).map("".join))
def test_any_text_comes_back_and_never_contains_a_mark(text: str) -> None:
    ids = _tokenizer.encode(text)
    assert _tokenizer.decode(ids) == text
    assert all(id >= 32 for id in ids)


@settings(deadline=None)
@given(st.lists(st.one_of(unicode_text, mark)).map("".join))
def test_marks_in_templates_are_found_as_the_library_finds_them(text: str) -> None:
    library = tokenizers.Tokenizer.from_str(_tokenizer._source)
    assert _tokenizer.encode_with_special(text) == library.encode(text, add_special_tokens=False).ids


@settings(deadline=None)
@given(st.lists(st.integers(0, 450)))
def test_streamed_pieces_join_to_the_whole(ids: list[int]) -> None:
    stream = StreamDecoder(_tokenizer)
    assert "".join([*map(stream.push, ids), stream.finish()]) == _tokenizer.decode(ids)


def test_a_stream_holds_back_half_a_character(tokenizer: Tokenizer) -> None:
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(id) for id in tokenizer.encode("𝔘ü")]
    assert "�" not in "".join(pieces)
    assert "".join(pieces) + stream.finish() == "𝔘ü"


def test_decode_equals_the_library(tokenizer: Tokenizer) -> None:
    library = tokenizers.Tokenizer.from_str(tokenizer._source)
    ids = tokenizer.encode_with_special("<|im_start|>user\nGruß <think>🙂</think><|im_end|>")
    assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True) == "user\nGruß <think>🙂</think>"
    assert [tokenizer.token_name(id) for id in ids[:2]] == ["<|im_start|>", tokenizer.decode([ids[1]])]


def test_marks_then_bytes_then_merges(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.im_start_id, tokenizer.im_end_id) == (0, 1, 2, 3)
    assert tokenizer.pad_id == 12
    assert [tokenizer.id_of(name) for name, _ in ADDED_TOKENS] == list(range(32))
    assert sorted(tokenizer.piece(id) for id in range(32, 288)) == [bytes([byte]) for byte in range(256)]
    assert tokenizer.vocab_size == 420
    assert tokenizer.piece(419) and len(tokenizer.piece(288)) == 2
    assert tokenizer.decode([420, 10**6, -1]) == ""
    with pytest.raises(DataError, match="begin_of_text"):
        tokenizer.id_of("<|begin_of_txt|>")


@pytest.mark.parametrize(
    ("digits", "groups"),
    [("1234567", ["1", "234", "567"]), ("12", ["12"]), ("123", ["123"]), ("1234", ["1", "234"]), ("a99b", ["99"])]
    + [("7" * 1021, ["7"] + ["777"] * 340)],
)
def test_digits_are_grouped_from_the_right(digits: str, groups: list[str]) -> None:
    pre = tokenizers.Tokenizer.from_str(_tokenizer._source).pre_tokenizer
    assert [word for word, _ in pre.pre_tokenize_str(digits) if word[0].isdigit()] == groups


def test_training_is_deterministic_and_files_keep_their_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = train_bpe(iter(TEXTS), 420)
    assert again.fingerprint == tokenizer.fingerprint
    file = tokenizer.save(tmp_path)
    assert file.name == "tokenizer.json"
    for place in (tmp_path, file):
        loaded = Tokenizer.load(place)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_a_small_corpus_gives_a_smaller_vocabulary_and_a_tiny_one_is_refused() -> None:
    assert 288 <= train_bpe(iter(["ab ab"]), 5000).vocab_size < 300
    assert train_bpe(iter([]), 288).decode(train_bpe(iter([]), 288).encode("é")) == "é"
    with pytest.raises(UsageError, match="288"):
        train_bpe(iter(TEXTS), 287)


def test_bad_tokenizer_files_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="not a tokenizer.json"):
        Tokenizer.load(tmp_path)
    parts = json.loads(tokenizer._source)
    parts["added_tokens"] = parts["added_tokens"][:3]
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    with pytest.raises(DataError, match="im_end"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode("ok \ud800")


@needs_published
def test_the_pre_tokenizer_and_marks_are_the_published_ones(published: Tokenizer) -> None:
    parts = json.loads(PUBLISHED.read_text())
    assert pre_tokenizer() == parts["pre_tokenizer"]
    assert [(entry["content"], entry["special"]) for entry in parts["added_tokens"]] == list(ADDED_TOKENS)
    assert json.loads(_tokenizer._source)["decoder"] == parts["decoder"]
    assert parts["post_processor"] is None and not published.begins_texts, "it leaves the begin mark to its user"
    assert published.with_begin_mark().fingerprint == published.fingerprint
    vocabulary = parts["model"]["vocab"]
    ours = json.loads(_tokenizer._source)["model"]["vocab"]
    assert sorted(vocabulary, key=vocabulary.__getitem__)[:288] == sorted(ours, key=ours.__getitem__)[:288]


@needs_published
def test_the_published_tokenizer_loads_and_round_trips(published: Tokenizer) -> None:
    assert published.vocab_size == 200_000
    library = tokenizers.Tokenizer.from_file(str(PUBLISHED))
    for text in [*TEXTS, "x = 12345678901 # <tool_call>\n"]:
        assert published.decode(published.encode(text)) == text
        assert published.encode_with_special(text) == library.encode(text, add_special_tokens=False).ids
    assert published.encode(" " * 63) == [library.token_to_id("Ġ" * 63)]
