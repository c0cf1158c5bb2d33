"""Bits per byte on held-out documents: a figure that does not depend on the tokenizer.

    bits per byte = sum over tokens of -log2 p(token | document so far) / UTF-8 bytes of the document

Every token of the text is predicted once, the first from the begin token; the end token is not counted. A document
longer than one row is read in rows that overlap by half, so that every token but the first row's has at least half a
row of past.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.model.loss import IGNORED, token_nats
from trinity.model.transformer import Transformer
from trinity.parallel.expert import dispatch_over
from trinity.parallel.mesh import World

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


class RowPart(NamedTuple):
    """Some tokens of a document and what each predicts; IGNORED where another row counts the token."""

    document: int
    inputs: list[int]
    targets: list[int]


@torch.no_grad()
def score_documents(
    model: Transformer, documents: Iterable[tuple[Sequence[int], int]], row_length: int, world: World | None = None
) -> list[Score]:
    """Score (token ids with begin and end token, UTF-8 bytes of the text) documents, one Score each.

    Several processes take the batches of rows in turn; all get all scores.
    """
    world = world or World.alone(model.embed_tokens.weight.device)
    rows: list[RowPart] = []
    lengths: list[tuple[int, int]] = []
    for index, (ids, size) in enumerate(documents):
        text = list(ids)[:-1]  # without the end token
        lengths.append((max(len(text) - 1, 0), size))
        rows += [RowPart(index, *row) for row in overlapping_rows(text, row_length)]
    at_once = max(1, _TOKENS_AT_ONCE // row_length)
    batches = [rows[start : start + at_once] for start in range(0, len(rows), at_once)]
    # A sharded model runs on all processes together: who has no batch left reads a token and counts nothing.
    batches += [[RowPart(0, [0], [IGNORED])]] * (-len(batches) % world.size)
    nats = torch.zeros(len(lengths), dtype=torch.float64, device=world.device)
    for batch in batches[world.rank :: world.size]:
        found = _row_nats(model, batch, world)
        nats.index_add_(0, torch.tensor([row.document for row in batch], device=world.device), found)
    return [Score(value, *length) for value, length in zip(world.sum(nats).tolist(), lengths, strict=True)]


def _row_nats(model: Transformer, batch: list[RowPart], world: World) -> Tensor:
    """Nats of the targets of each row: [B] float64."""
    width = max(len(row.inputs) for row in batch)
    inputs = torch.tensor([row.inputs + [0] * (width - len(row.inputs)) for row in batch], device=world.device)
    targets = torch.tensor([row.targets + [IGNORED] * (width - len(row.targets)) for row in batch], device=world.device)
    hidden = model(inputs, dispatch=dispatch_over(world)).hidden
    counted = targets != IGNORED
    found = torch.zeros(targets.shape, device=world.device)
    found[counted] = token_nats(hidden[counted], model.lm_head.weight, targets[counted])
    return found.double().sum(-1)


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
