"""The past of one sequence as an `Attend`: global layers keep every key, local ones what their window can still reach.

A layer's keys and values live in one contiguous buffer that doubles when it is full (amortised constant cost a token).
A local buffer stops at window + chunk entries: when it is full, the last `window - 1` move to its front. So memory
grows with the text in the global layers alone. Equal to `Causal` on the whole text, for any split into chunks.

Shapes: q [1, H, T, C]; k, v [1, J, T, C]; T at most `chunk`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from trinity.config.model import ModelConfig
from trinity.model.attend import additive, scaled_dot_product

FIRST_ENTRIES = 64


class LayerPast:
    """Keys and values of one layer: the newest `length` entries that any later query of it can see, in order."""

    def __init__(self, window: int | None, chunk: int) -> None:
        self.window = window
        self.chunk = chunk
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take in T new entries; returns views [1, J, S, C] of what the T queries can see, the new ones last."""
        new = k.shape[2]
        assert new <= self.chunk, f"{new} entries at once; the cache was made for chunks of {self.chunk}"
        keys, values = self._with_room_for(k, v)
        keys[:, :, self.length : self.length + new] = k
        values[:, :, self.length : self.length + new] = v
        self.length += new
        start = 0 if self.window is None else max(0, self.length - (self.window - 1) - new)
        return keys[:, :, start : self.length], values[:, :, start : self.length]

    def _with_room_for(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers, grown or with what left the window dropped, so that T more entries fit."""
        capacity = 0 if self.keys is None else self.keys.shape[2]
        needed = self.length + k.shape[2]
        if self.keys is not None and self.values is not None and needed <= capacity:
            return self.keys, self.values
        kept, size = self.length, max(needed, 2 * capacity, FIRST_ENTRIES)
        if self.window is not None:
            limit = self.window + self.chunk
            if needed > limit:
                kept = min(kept, self.window - 1)
            size = min(size, limit)
        self.keys = _moved(self.keys, k, self.length - kept, kept, size)
        self.values = _moved(self.values, v, self.length - kept, kept, size)
        self.length = kept
        return self.keys, self.values

    def bytes_held(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values) if x is not None)

    def bytes_used(self) -> int:
        """Bytes of the entries that a later query can still see."""
        if self.keys is None or self.values is None:
            return 0
        seen = self.length if self.window is None else min(self.length, self.window)
        return seen * sum(x[:, :, :1].numel() * x.element_size() for x in (self.keys, self.values))


def _moved(old: Tensor | None, like: Tensor, start: int, count: int, capacity: int) -> Tensor:
    """A buffer of `capacity` entries whose first `count` are the old ones from `start` on."""
    if old is not None and old.shape[2] == capacity:
        old[:, :, :count] = old[:, :, start : start + count].clone()  # source and target overlap
        return old
    fresh = like.new_empty(like.shape[0], like.shape[1], capacity, like.shape[3])
    if old is not None and count:
        fresh[:, :, :count] = old[:, :, start : start + count]
    return fresh


class KVCache:
    """An `Attend` that remembers. One sequence; feed it the text in chunks of at most `chunk` tokens, in order."""

    def __init__(self, config: ModelConfig, chunk: int) -> None:
        self.layers = [
            LayerPast(None if config.is_global(layer) else config.sliding_window, chunk)
            for layer in range(config.num_hidden_layers)
        ]
        self.tokens = 0  # of the text, read so far; also the position of the next one
        self._masks: dict[int | None, Tensor] = {}  # of the last chunk, by window

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """[1, H, T, C]: each query reads the past of its layer and the chunk up to itself, within the window."""
        if layer == 0:
            self.tokens += q.shape[2]
            self._masks.clear()
        keys, values = self.layers[layer].append(k, v)
        if q.shape[2] == 1:
            return _read_by_one(q, keys, values)
        if window not in self._masks:
            self._masks[window] = additive(_chunk_mask(q.shape[2], keys.shape[2], window, q.device), q.dtype)
        return scaled_dot_product(q, keys, values, mask=self._masks[window])

    def bytes_held(self) -> int:
        """Bytes of all buffers, the room for entries to come included."""
        return sum(layer.bytes_held() for layer in self.layers)

    def bytes_used(self) -> int:
        """Bytes of the entries that later queries can see: `plan.memory.kv_bytes` at this many tokens."""
        return sum(layer.bytes_used() for layer in self.layers)


def _read_by_one(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query a head: the query heads that share a key head become rows of one product, and no key is copied."""
    grouped = q.view(1, keys.shape[1], -1, q.shape[3])
    return F.scaled_dot_product_attention(grouped, keys, values).view(q.shape)


def _chunk_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Who sees whom when the last `queries` of `keys` entries ask: bool [T, S]."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)
