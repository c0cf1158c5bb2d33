"""Attention over pages by torch's own operators: all rows of a step at once, on any device.

New keys and values go to their pages first. Rows of few tokens then gather the pages that each may see and mask what
it may not; nothing here depends on a number in a tensor, so a graph can repeat it. A text of more tokens is read for
itself: on a GPU in half precision by torch's variable-length kernel, else under a mask.
"""

import torch
from torch import Tensor

from trinity.config.model import ModelConfig
from trinity.engine.pages import PAGE, Pools
from trinity.engine.step import Rows, Step
from trinity.kernels.varlen import attend_to_past, takes
from trinity.model.attend import additive, scaled_dot_product

GATHERED = 2048  # pages at a time: 1 GiB of float32 in a layer of Mini


class Past:
    """An `Attend` for one pass of the model over the rows of a step."""

    def __init__(self, config: ModelConfig, step: Step, pools: Pools) -> None:
        self.config, self.step, self.pools = config, step, pools
        order = [config.is_global(layer) for layer in range(config.num_hidden_layers)]
        self._places = [order[:layer].count(kind) for layer, kind in enumerate(order)]  # among the layers of its kind
        _, self.positions, self.sequences, _ = step.rows.unbind(1)
        self.slots = self.positions % PAGE
        self._written: dict[int | None, Tensor] = {}
        self._seen: dict[int | None, tuple[Tensor, Tensor]] = {}
        self._texts: dict[tuple[int, int | None], tuple[Tensor, Tensor | None]] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q [1, H, M, C], k and v [1, J, M, C] -> [1, H, M, C]."""
        pool = self.pools.paged if window is None else self.pools.local
        held = pool.values[:, self._places[layer]]  # [pages, J, 2, 64 C], a view
        keys, values = self._split(held)
        pages = self._pages_written(window)
        keys[pages, :, :, self.slots] = k[0].transpose(0, 1).to(held.dtype)
        values[pages, :, self.slots] = v[0].transpose(0, 1).to(held.dtype)
        made = [self._few(q[0, :, : self.step.few].transpose(0, 1), held, window)] if self.step.few else []
        start = self.step.few
        for number, text in enumerate(self.step.texts):
            mine = slice(start, start := start + len(text.tokens))
            made.append(self._text(number, q[:, :, mine], held, window)[0].transpose(0, 1))
        return torch.cat(made).transpose(0, 1)[None]

    def _split(self, held: Tensor) -> tuple[Tensor, Tensor]:
        """Of pages [..., J, 2, 64 C] the keys [..., J, C, 64] and the values [..., J, 64, C], views."""
        size = self.config.head_dim
        return held[..., 0, :].unflatten(-1, (size, PAGE)), held[..., 1, :].unflatten(-1, (PAGE, size))

    def _pages_written(self, window: int | None) -> Tensor:
        """[M]: the page of each row."""
        if window not in self._written:
            block = self.positions // PAGE
            table = self.step.pages if window is None else self.step.rings
            self._written[window] = table[self.sequences, block if window is None else block % table.shape[1]]
        return self._written[window]

    def _few(self, q: Tensor, held: Tensor, window: int | None) -> Tensor:
        """q [M, H, C] -> [M, H, C]. Scores and sums are float32 where pages are."""
        if window not in self._seen:
            self._seen[window] = self._visible(window)
        pages, seen = self._seen[window]
        at_once = max(1, GATHERED // pages.shape[1])
        parts = zip(q.split(at_once), pages.split(at_once), seen.split(at_once), strict=True)
        return torch.cat([self._gathered(asked, there, visible, held) for asked, there, visible in parts])

    def _visible(self, window: int | None) -> tuple[Tensor, Tensor]:
        """For the rows of few tokens: pages [M, B] that hold all they may see, and what of it that is, [M, B, 64]."""
        position = self.positions[: self.step.few, None]
        sequences = self.sequences[: self.step.few]
        if window is None:
            blocks = torch.arange(self.step.width, device=position.device)[None]
            pages = self.step.pages[:, : self.step.width].index_select(0, sequences)
        else:
            # A window of w tokens that ends anywhere in a page begins at most (w + 62) // 64 pages before.
            count = min(self.step.width, (window + PAGE - 2) // PAGE + 1)
            blocks = position // PAGE - torch.arange(count - 1, -1, -1, device=position.device)
            ring = self.step.rings.index_select(0, sequences)
            pages = ring.gather(1, blocks.clamp(min=0) % ring.shape[1])
        key = blocks[..., None] * PAGE + torch.arange(PAGE, device=position.device)
        seen = (key >= 0) & (key <= position[..., None])
        return pages, seen if window is None else seen & (key > position[..., None] - window)

    def _gathered(self, q: Tensor, pages: Tensor, seen: Tensor, held: Tensor) -> Tensor:
        """q [m, H, C], pages [m, B], seen [m, B, 64] -> [m, H, C]."""
        keys, values = self._split(held[pages])  # [m, B, J, C, 64] and [m, B, J, 64, C]
        heads = keys.shape[2]
        asked = q.unflatten(1, (heads, -1))[:, None].to(held.dtype)  # [m, 1, J, H / J, C]
        scores = (asked @ keys).float() * self.config.head_dim**-0.5  # [m, B, J, H / J, 64]
        scores = scores.masked_fill(~seen[:, :, None, None], float("-inf"))
        parts = scores.permute(0, 2, 3, 1, 4)  # a query's scores side by side
        weights = parts.flatten(3).softmax(-1).view(parts.shape).permute(0, 3, 1, 2, 4)
        # What nobody wrote may be nan, and nan times a weight of 0 is nan.
        values = values.masked_fill(~seen[:, :, None, :, None], 0)
        return (weights.to(held.dtype) @ values).float().sum(1).flatten(1, 2).to(q.dtype)

    def _text(self, number: int, q: Tensor, held: Tensor, window: int | None) -> Tensor:
        """Text `number` of the step: q [1, H, T, C] -> [1, H, T, C]."""
        text = self.step.texts[number]
        start, end = text.position, text.position + len(text.tokens)
        first = 0 if window is None else max(0, start - window + 1) // PAGE
        if (number, window) not in self._texts:
            pages = torch.tensor(_pages_of(text, first, window), device=q.device)
            self._texts[number, window] = pages, None if takes(q) else _mask(start, end, first * PAGE, window, q)
        pages, mask = self._texts[number, window]
        keys, values = self._split(held[pages])
        seen = slice(0, end - first * PAGE)
        keys = keys.permute(1, 0, 3, 2).flatten(1, 2)[None, :, seen].to(q.dtype)
        values = values.permute(1, 0, 2, 3).flatten(1, 2)[None, :, seen].to(q.dtype)
        if mask is None:
            return attend_to_past(q, keys, values, window)
        return scaled_dot_product(q, keys, values, mask=mask)


def _pages_of(text: Rows, first: int, window: int | None) -> list[int]:
    """Those of blocks `first` and up."""
    if window is None:
        return text.pages[first : text.blocks]
    return [text.ring[block % len(text.ring)] for block in range(first, text.blocks)]


def _mask(start: int, end: int, first: int, window: int | None, q: Tensor) -> Tensor:
    """Queries at start .. end over keys at first .. end."""
    distance = torch.arange(start, end, device=q.device)[:, None] - torch.arange(first, end, device=q.device)
    return additive((distance >= 0) if window is None else (distance >= 0) & (distance < window), q.dtype)
