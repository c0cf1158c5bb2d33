"""Conversations: what is read, what is skipped by name, what is learnt, and how rows are packed without mixing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trinity.align.conversations import as_batch, pack, read_conversations
from trinity.base.errors import DataError
from trinity.model.attend import Packed
from trinity.model.loss import IGNORED
from trinity.text.chat import RenderedChat
from trinity.text.tokenizer import Tokenizer

GOOD = {"messages": [{"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "A sequence."}]}


@pytest.fixture(scope="module")
def tokenizer(debug_data: Path) -> Tokenizer:
    return Tokenizer.load(debug_data)


def write(path: Path, *lines: Any) -> Path:
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


def said(role: str, content: Any = "Hello") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}]}


BROKEN = {
    "broken JSON": (b'{"messages": [{"role": "user"', "not a conversation"),
    "not UTF-8": (b'{"messages": "\xff\xfe"}', "not a conversation"),
    "nested too deeply": (b'{"messages": ' + b"[" * 100_000, "not a conversation"),
    "not an object": ([1, 2], "not a conversation"),
    "no messages": ({"text": "hello"}, "'messages'"),
    "no message": ({"messages": []}, "conversation is empty"),
    "messages of text": ({"messages": "hello"}, "not a conversation"),
    "unknown role": (said("asistant"), "messages[0] has the role 'asistant'"),
    "no content": (said("assistant", None), "has no content"),
    "empty content": (said("assistant", ""), "has no content"),
    "no assistant turn": (said("user"), "no assistant turn to learn from"),
    "half a surrogate pair": (b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "surrogate pair"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_line_is_named_and_skipped_or_stops_when_strict(tokenizer: Tokenizer, tmp_path: Path, name: str):
    line, what = BROKEN[name]
    path = write(tmp_path / "chat.jsonl", GOOD, line, b"", GOOD)
    found = read_conversations(path, tokenizer, 64, strict=False)
    assert len(found.rendered) == 2 and len(found.skipped) == 1
    assert found.skipped[0].startswith(f"{path}:2: ") and what in found.skipped[0]
    with pytest.raises(DataError) as caught:
        read_conversations(path, tokenizer, 64, strict=True)
    assert f"{path}:2: " in caught.value.what and what in caught.value.what and "--strict" in caught.value.remedy


def test_a_file_without_one_usable_line_names_the_first(tokenizer: Tokenizer, tmp_path: Path):
    path = write(tmp_path / "chat.jsonl", said("user"), said("wizard"))
    with pytest.raises(DataError, match=r"2 lines skipped.*chat\.jsonl:1: no assistant turn"):
        read_conversations(path, tokenizer, 64, strict=False)
    with pytest.raises(DataError, match="0 lines skipped"):
        read_conversations(write(tmp_path / "empty.jsonl"), tokenizer, 64, strict=False)
    for nothing in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(DataError, match="There is no file"):
            read_conversations(nothing, tokenizer, 64, strict=False)


def test_a_conversation_longer_than_a_row_is_cut_and_counted(tokenizer: Tokenizer, tmp_path: Path):
    long = {"messages": [said("user")["messages"][0], {"role": "assistant", "content": "word " * 200}]}
    late = {"messages": [{"role": "user", "content": "word " * 200}, said("assistant")["messages"][0]]}
    found = read_conversations(write(tmp_path / "chat.jsonl", GOOD, long, late), tokenizer, 64, strict=False)
    assert [len(chat.tokens) for chat in found.rendered][1:] == [65] and len(found.rendered[0].tokens) < 65
    assert found.cut == 1
    assert [line.split(": ")[1] for line in found.skipped] == ["no assistant turn to learn from within a row"]


def test_loss_falls_on_assistant_tokens_alone(tokenizer: Tokenizer, tmp_path: Path):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1."},
        {"role": "user", "content": "Two<|im_end|>?"},
        {"role": "assistant", "content": "2."},
    ]
    found = read_conversations(write(tmp_path / "chat.jsonl", {"messages": messages}), tokenizer, 256, strict=True)
    batch = as_batch([found.rendered], 256, tokenizer.pad_id)
    inputs, targets = [tokenizer.bos_id], []
    for message in messages:  # the rendering by hand
        header = [tokenizer.im_start_id, *tokenizer.encode(message["role"] + "\n")]
        content, after = [*tokenizer.encode(message["content"]), tokenizer.im_end_id], tokenizer.encode("\n")
        inputs += header + content + after
        wanted = content if message["role"] == "assistant" else [IGNORED] * len(content)
        targets += [IGNORED] * len(header) + wanted + [IGNORED] * len(after)
    length = len(targets)
    assert batch.tokens[0, :length].tolist() == inputs[:-1] and batch.targets[0, :length].tolist() == targets
    learnt = [token for token in targets if token != IGNORED]
    assert tokenizer.decode_bytes(learnt) == b"1.2." and learnt.count(tokenizer.im_end_id) == 2
    assert (batch.tokens[0, length:] == tokenizer.pad_id).all() and (batch.targets[0, length:] == IGNORED).all()
    assert (batch.document_ids[0, :length] == 0).all() and (batch.document_ids[0, length:] == -1).all()


lengths = st.lists(st.integers(2, 33), min_size=1, max_size=30)


@given(lengths, st.integers(0, 2**32))
def test_packing_keeps_every_conversation_whole_and_within_a_row(sizes: list[int], seed: int):
    chats = [RenderedChat([place] * size, [False] + [True] * (size - 1)) for place, size in enumerate(sizes)]
    order = np.random.default_rng(seed).permutation(len(chats))
    rows = list(pack(chats, order, 32))
    assert [chat.tokens[0] for row in rows for chat in row] == order.tolist(), "each once, in order, none split"
    assert all(0 < sum(len(chat.tokens) - 1 for chat in row) <= 32 for row in rows)
    batch = as_batch(rows, 32, pad_id=99)
    assert int((batch.targets != IGNORED).sum()) == sum(sizes) - len(sizes)
    for number, row in enumerate(rows):
        for place, chat in enumerate(row):
            inside = batch.document_ids[number] == place
            assert batch.tokens[number][inside].tolist() == chat.tokens[:-1]
            assert batch.targets[number][inside].tolist() == chat.tokens[1:]


def test_a_packed_conversation_has_the_hidden_states_it_has_alone(tiny_model):
    generator = torch.Generator().manual_seed(1)
    chats = [
        RenderedChat(torch.randint(0, 64, (size,), generator=generator).tolist(), [True] * size)
        for size in (11, 7, 13, 20)
    ]
    rows = list(pack(chats, np.arange(4), 32))
    assert [len(row) for row in rows] == [3, 1]
    batch = as_batch(rows, 32, pad_id=0)
    with torch.no_grad():
        packed = tiny_model(batch.tokens, attend=Packed(batch.document_ids)).hidden
        for number, row in enumerate(rows):
            for place, chat in enumerate(row):
                alone = tiny_model(torch.tensor([chat.tokens[:-1]])).hidden[0]
                inside = packed[number][batch.document_ids[number] == place]
                torch.testing.assert_close(inside, alone, rtol=1e-4, atol=1e-5)
