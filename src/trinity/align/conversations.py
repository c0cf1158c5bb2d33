"""Conversations from JSONL, as packed training rows: loss on what the assistant says, attention within a conversation.

One JSON object a line: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from trinity.base.errors import DataError, RequestError
from trinity.data.loader import Batch
from trinity.model.loss import IGNORED
from trinity.text.chat import RenderedChat, render
from trinity.text.tokenizer import Tokenizer


class Conversations(NamedTuple):
    rendered: list[RenderedChat]
    skipped: list[str]  # one sentence for each line that could not be used
    cut: int  # conversations longer than a row, cut at its end


def read_conversations(path: Path, tokenizer: Tokenizer, sequence_length: int, strict: bool) -> Conversations:
    """Render every conversation of a file. Bad lines are named and skipped, or with `strict` end in a DataError."""
    if not path.is_file():
        raise DataError(f"There is no file {path}.", 'Give a JSONL file with one {"messages": [...]} a line.')
    rendered: list[RenderedChat] = []
    skipped: list[str] = []
    cut = 0
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            chat = render(json.loads(line)["messages"], tokenizer, add_generation_prompt=False)
            if not any(chat.mask[1 : sequence_length + 1]):
                raise RequestError("no assistant turn to learn from within a row")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RequestError, DataError) as error:
            what = f"{path}:{number}: {_what(error)}"
            if strict:
                raise DataError(f"{what}.", "Mend the line, or leave out --strict to skip it.") from error
            skipped.append(what)
            continue
        cut += len(chat.tokens) > sequence_length + 1
        rendered.append(RenderedChat(chat.tokens[: sequence_length + 1], chat.mask[: sequence_length + 1]))
    if not rendered:
        first = f"; the first skipped is {skipped[0]}" if skipped else ""
        raise DataError(
            f"{path} holds no usable conversation ({len(skipped)} lines skipped{first}).",
            'Give one {"messages": [...]} with an assistant turn a line.',
        )
    return Conversations(rendered, skipped, cut)


def _what(error: Exception) -> str:
    if isinstance(error, KeyError):
        return "the key 'messages' or one inside a message is missing"
    if isinstance(error, RequestError | DataError):
        return error.what.rstrip(".")
    return f"not a conversation ({error})"


def pack(conversations: list[RenderedChat], order: np.ndarray, sequence_length: int) -> Iterator[list[RenderedChat]]:
    """Greedy packing in the given order: conversations share a row while they fit, none is split."""
    row: list[RenderedChat] = []
    used = 0
    for index in order:
        chat = conversations[index]
        length = len(chat.tokens) - 1
        if row and used + length > sequence_length:
            yield row
            row, used = [], 0
        row.append(chat)
        used += length
    if row:
        yield row


def as_batch(rows: list[list[RenderedChat]], sequence_length: int, pad_id: int) -> Batch:
    """Packed rows as tensors: targets only where the assistant speaks, every conversation a document of its own."""
    shape = (len(rows), sequence_length)
    tokens = torch.full(shape, pad_id)
    targets = torch.full(shape, IGNORED)
    documents = torch.full(shape, -1)
    for number, row in enumerate(rows):
        at = 0
        for place, chat in enumerate(row):
            inputs, wanted = torch.tensor(chat.tokens[:-1]), torch.tensor(chat.tokens[1:])
            span = slice(at, at + len(inputs))
            tokens[number, span] = inputs
            targets[number, span] = torch.where(torch.tensor(chat.mask[1:]), wanted, IGNORED)
            documents[number, span] = place
            at += len(inputs)
    return Batch(tokens, targets, documents)
