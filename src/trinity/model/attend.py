"""How a query reads the past, as an argument of the model's forward.

A model layer computes queries, keys and values and calls `attend(layer, q, k, v, window)`. What "the past" is belongs
to the caller: the row itself (`Causal`), the document inside a packed row (`Packed`), or pages (engine/runner.py).

Shapes: q [B, H, T, C]; k, v [B, J, T, C] with H a multiple of J; result [B, H, T, C].
A window of w keeps the keys s with t - w < s <= t: w keys, the query's own included.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from trinity.kernels.attention import StretchAttention
from trinity.kernels.compiled import fits
from trinity.kernels.varlen import Documents, attend_by_document, documents_of, takes


class Attend(Protocol):
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor: ...


class Causal:
    """Every row is one text: a position sees itself and what came before it, within the window."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        length = q.shape[2]
        if length == k.shape[2] > 1 and fits(q, k, v):
            return StretchAttention.apply(q, k, v, first_seen(q.new_zeros(len(q), length, dtype=torch.int64), window))
        if window is None or window >= length:
            return scaled_dot_product(q, k, v, causal=True)
        if length >= 2 * window:
            return windowed(q, k, v, window, document_ids=None)
        return scaled_dot_product(q, k, v, mask=visible(length, window, None, q.device))


class Packed:
    """Rows hold several documents; a position sees only its own document. document_ids: [B, T] integers.

    Padding is a document of its own (any id that no real token of the row carries). Masks are made once a batch.
    """

    def __init__(self, document_ids: Tensor) -> None:
        self.document_ids = document_ids
        self._masks: dict[int | None, Tensor] = {}
        self._starts = document_starts(document_ids)
        self._first: dict[int | None, Tensor] = {}
        self._documents: Documents | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        length = q.shape[2]
        if self._starts is not None and fits(q, k, v):
            if window not in self._first:
                self._first[window] = first_seen(self._starts, window)
            return StretchAttention.apply(q, k, v, self._first[window])
        if self._starts is not None and takes(q):
            self._documents = self._documents or documents_of(self._starts)
            return attend_by_document(q, k, v, self._documents, window)
        if window is not None and length >= 2 * window:
            return windowed(q, k, v, window, self.document_ids, self._masks)
        if window not in self._masks:
            self._masks[window] = additive(visible(length, window, self.document_ids, q.device), q.dtype)
        return scaled_dot_product(q, k, v, mask=self._masks[window])


def document_starts(document_ids: Tensor) -> Tensor | None:
    """Where the document of each position begins, [B, T] int64; None if one comes back after another within a row."""
    changes = F.pad((document_ids[:, 1:] != document_ids[:, :-1]).long(), (1, 0))
    ordered = document_ids.sort(-1).values
    if not torch.equal(changes.sum(-1), (ordered[:, 1:] != ordered[:, :-1]).sum(-1)):
        return None
    return (changes * torch.arange(document_ids.shape[1], device=document_ids.device)).cummax(-1).values


def first_seen(starts: Tensor, window: int | None) -> Tensor:
    """The first key each position sees: [B, T] int64."""
    if window is None:
        return starts
    return torch.maximum(starts, torch.arange(starts.shape[1]) - (window - 1))


def visible(length: int, window: int | None, document_ids: Tensor | None, device: torch.device) -> Tensor:
    """The plain definition of who sees whom: bool [T, T] or, with documents, [B, 1, T, T]."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    mask = distance >= 0
    if window is not None:
        mask = mask & (distance < window)
    if document_ids is not None:
        mask = mask & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    return mask


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf where not."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Softmax attention with grouped heads: query head h reads key head h // (H / J)."""
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def windowed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    document_ids: Tensor | None,
    masks: dict[int | None, Tensor] | None = None,
) -> Tensor:
    """Sliding-window attention at the cost of the window: each block of w queries reads its own and the previous block.

    Equal to `scaled_dot_product` under `visible`; costs T x 2w instead of T x T scores.
    """
    length = q.shape[2]
    blocks = -(-length // window)
    masks = {} if masks is None else masks
    if window not in masks:
        masks[window] = additive(_block_mask(length, blocks, window, document_ids, q.device), q.dtype)
    mask = masks[window]
    q, k, v = (F.pad(x, (0, 0, 0, blocks * window - length)) for x in (q, k, v))
    rows = q.shape[0]
    if mask.shape[0] != rows * blocks:
        mask = mask.repeat(rows, 1, 1, 1)
    out = scaled_dot_product(_split(q, blocks), _with_previous(k, blocks), _with_previous(v, blocks), mask=mask)
    out = out.view(rows, blocks, *out.shape[1:]).transpose(1, 2).reshape(rows, q.shape[1], blocks * window, q.shape[3])
    return out[:, :, :length]


def _split(x: Tensor, blocks: int) -> Tensor:
    """[B, heads, blocks x w, C] -> [B x blocks, heads, w, C]."""
    rows, heads, length, size = x.shape
    return x.view(rows, heads, blocks, length // blocks, size).transpose(1, 2).reshape(rows * blocks, heads, -1, size)


def _with_previous(x: Tensor, blocks: int) -> Tensor:
    """[B, heads, blocks x w, C] -> [B x blocks, heads, 2w, C]: each block preceded by the one before it."""
    rows, heads, length, size = x.shape
    x = x.view(rows, heads, blocks, length // blocks, size)
    before = torch.cat((x.new_zeros(rows, heads, 1, length // blocks, size), x[:, :, :-1]), dim=2)
    return torch.cat((before, x), dim=3).transpose(1, 2).reshape(rows * blocks, heads, -1, size)


def _block_mask(length: int, blocks: int, window: int, document_ids: Tensor | None, device: torch.device) -> Tensor:
    """Who sees whom inside the blocks: bool [B x blocks or blocks, 1, w, 2w]; padded queries see themselves."""
    start = torch.arange(blocks, device=device)[:, None] * window
    query = start + torch.arange(window, device=device)  # [blocks, w]
    key = start - window + torch.arange(2 * window, device=device)  # [blocks, 2w]
    distance = query[:, :, None] - key[:, None, :]
    mask = (distance >= 0) & (distance < window) & (key >= 0)[:, None, :]
    if document_ids is None:
        return mask[:, None]
    padded = F.pad(document_ids, (0, blocks * window - length), value=-1)
    same = padded[:, query][:, :, :, None] == padded[:, key.clamp(min=0)][:, :, None, :]
    return (mask & same).flatten(0, 1)[:, None]
