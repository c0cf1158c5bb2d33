"""Bits per byte on held-out documents: a figure that does not depend on the tokenizer.

    bits per byte = sum over tokens of -log2 p(token | document so far) / UTF-8 bytes of the document

Every token of the text is predicted once, the first from the begin token; the end token is not counted. A document
longer than one row is read in rows that overlap by half, so that every token but the first row's has at least half a
row of past.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from trinity.model.loss import IGNORED, token_nats
from trinity.model.transformer import Transformer

_TOKENS_AT_ONCE = 4096


class Score(NamedTuple):
    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / 0.6931471805599453 / max(self.bytes, 1)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / max(self.tokens, 1)


@torch.no_grad()
def score_documents(model: Transformer, documents: Iterable[tuple[Sequence[int], int]], row_length: int) -> list[Score]:
    """Score (token ids with begin and end token, UTF-8 bytes of the text) documents, one Score each."""
    rows = max(1, _TOKENS_AT_ONCE // row_length)
    nats: list[float] = []
    lengths: list[tuple[int, int]] = []
    pending: list[tuple[int, list[int], list[int]]] = []  # (document, inputs, targets), rows of at most row_length

    def flush() -> None:
        if not pending:
            return
        width = max(len(inputs) for _, inputs, _ in pending)
        inputs = torch.tensor([row + [0] * (width - len(row)) for _, row, _ in pending])
        targets = torch.tensor([row + [IGNORED] * (width - len(row)) for _, _, row in pending])
        hidden = model(inputs).hidden
        counted = targets != IGNORED
        found = torch.zeros(targets.shape)
        found[counted] = token_nats(hidden[counted], model.lm_head.weight, targets[counted])
        for (document, _, _), value in zip(pending, found.double().sum(-1).tolist(), strict=True):
            nats[document] += value
        pending.clear()

    for index, (ids, size) in enumerate(documents):
        text = list(ids)[:-1]  # without the end token
        nats.append(0.0)
        lengths.append((max(len(text) - 1, 0), size))
        for inputs, targets in overlapping_rows(text, row_length):
            pending.append((index, inputs, targets))
            if len(pending) == rows:
                flush()
    flush()
    return [Score(value, tokens, size) for value, (tokens, size) in zip(nats, lengths, strict=True)]


def overlapping_rows(text: list[int], row_length: int) -> list[tuple[list[int], list[int]]]:
    """Cut [begin, t1, ..., tn] into (inputs, targets) rows: each of t1..tn is a target once, rows overlap by half."""
    result, scored, start = [], 0, 0
    while scored < len(text) - 1:
        inputs = text[start : start + row_length]
        targets = text[start + 1 : start + row_length + 1]
        inputs = inputs[: len(targets)]
        fresh = [IGNORED] * (scored - start) + targets[scored - start :]
        result.append((inputs, fresh))
        scored = start + len(targets)
        start += row_length // 2 or 1
    return result


def total(scores: Iterable[Score]) -> Score:
    scores = list(scores)
    return Score(sum(s.nats for s in scores), sum(s.tokens for s in scores), sum(s.bytes for s in scores))
