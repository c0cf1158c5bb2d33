"""One pass over documents for the probes that need no generation: what each document cost, and which experts read it.

A document is read as training evaluation reads it (train/evaluate.py): <bos>, then its tokens; the end mark is not
asked for; a document longer than the context is read in rows that overlap by half, every token predicted once. Rows
of about equal length share batches, padded on the right, where causal attention cannot see.

Shapes: D documents, L sparse layers, E experts, B rows, T positions, M predicted tokens, K chosen experts.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trinity.audit.intervals import Floats
from trinity.model.loss import IGNORED, token_nats
from trinity.model.transformer import Transformer
from trinity.train.evaluate import overlapping_rows

BATCH_TOKENS = 8192
Watch = Callable[[str, int, int], None]  # what is being done, tokens done, tokens in all


class Readings(NamedTuple):
    nats: Floats  # [D] sum of -ln p over the document's tokens
    expert_tokens: NDArray[np.int64]  # [D, L, E] predicted tokens of the document that each expert read


class Row(NamedTuple):
    document: int
    inputs: list[int]
    targets: list[int]  # IGNORED where another row predicts the token


@torch.no_grad()
def read(model: Transformer, documents: Sequence[Sequence[int]], bos_id: int, context: int, watch: Watch) -> Readings:
    """Read documents (token ids without marks), one result each; how they fall into batches changes only rounding."""
    config = model.config
    rows = [
        Row(index, *row) for index, ids in enumerate(documents) for row in overlapping_rows([bos_id, *ids], context)
    ]
    rows.sort(key=lambda row: len(row.inputs))
    todo, done = sum(len(row.inputs) for row in rows), 0
    nats = torch.zeros(len(documents), dtype=torch.float64)
    counts = torch.zeros(config.num_sparse_layers, len(documents) * config.num_experts, dtype=torch.int64)
    for batch in batches(rows):
        length = len(batch[-1].inputs)
        inputs = torch.tensor([row.inputs + [0] * (length - len(row.inputs)) for row in batch])
        targets = torch.tensor([row.targets + [IGNORED] * (length - len(row.targets)) for row in batch])
        predicted = targets != IGNORED
        owner = torch.tensor([row.document for row in batch])[:, None].expand(-1, length)[predicted]  # [M]
        output = model(inputs)
        nats.index_add_(
            0, owner, token_nats(output.hidden[predicted], model.lm_head.weight, targets[predicted]).double()
        )
        for layer, routing in enumerate(output.routings):
            chosen = routing.chosen.view(*inputs.shape, -1)[predicted]  # [M, K]
            slots = (owner[:, None] * config.num_experts + chosen).flatten()
            counts[layer] += torch.bincount(slots, minlength=counts.shape[1])
        done += sum(len(row.inputs) for row in batch)
        watch("reading held-out text", done, todo)
    shape = (config.num_sparse_layers, len(documents), config.num_experts)
    return Readings(nats.numpy(), counts.view(shape).transpose(0, 1).contiguous().numpy())


def batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Neighbours in order of length, at most BATCH_TOKENS padded tokens together (a longer row goes alone)."""
    batch: list[Row] = []
    for row in rows:
        if batch and (len(batch) + 1) * len(row.inputs) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
