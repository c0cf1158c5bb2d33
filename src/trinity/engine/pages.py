"""The past of all sequences: keys and values in pages of 64 tokens, some for global layers and some for local ones.

A global layer keeps every token: a sequence has a page for each 64 tokens of its text, and sequences that begin alike
may share pages that are full. A local layer keeps what its window can reach: a sequence has a ring of pages, round
and round, as many as hold the window and one step's tokens. So memory grows with the text in global layers alone:

    bytes = 2 x key heads x head size x bytes of a value x (global layers x tokens + local layers x ring tokens)

Values are float32, or bfloat16: then keys and values are rounded once, where they are put into their page.

A page holds one stretch of 64 tokens in all layers of its kind: [layers, key heads, 2, 64 x C], keys [C, 64] then
values [64, C], as kernels/paged_attention.h reads them; where it attends on AMX a page holds tiles instead, in the same
room: of whole numbers for float32 (kernels/digits.h), of bfloat16 as it is (kernels/narrow_attention.h). A page is read
by the runner that wrote it.
"""

import torch
from torch import Tensor

from trinity.config.engine import KvDtype
from trinity.config.model import ModelConfig

PAGE = 64  # tokens; kernels/pages.h knows the same number
KV_DTYPES: dict[KvDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


class Pool:
    """Pages of one kind of layer: how many sequences use each, and whether the prefix cache holds it.

    A page that is neither used nor held is free; one that is held alone is idle.
    """

    def __init__(self, pages: int, layers: int, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        shape = (pages, layers, config.num_key_value_heads, 2, PAGE * config.head_dim)
        self.values = torch.empty(shape, device=device, dtype=dtype)  # the system gives memory on first touch
        self.uses = [0] * pages
        self.held = [False] * pages
        self.idle = 0
        self.free = list(range(pages - 1, -1, -1))

    @property
    def page_bytes(self) -> int:
        return self.values[0].nbytes if len(self.values) else 0

    @property
    def in_use(self) -> int:
        return len(self.uses) - len(self.free)

    def take(self, count: int) -> list[int]:
        """`count` free pages, which there must be."""
        taken = [self.free.pop() for _ in range(count)]
        for page in taken:
            self.uses[page] = 1
        return taken

    def share(self, pages: list[int]) -> None:
        """One more user of pages in use."""
        for page in pages:
            assert self.uses[page] or self.held[page], f"page {page} is free"
            self.idle -= self.uses[page] == 0
            self.uses[page] += 1

    def release(self, pages: list[int]) -> None:
        """One user less."""
        for page in pages:
            assert self.uses[page] > 0, f"page {page} is free already"
            self.uses[page] -= 1
            if self.uses[page] == 0:
                self._left(page)

    def hold(self, page: int) -> None:
        """Keep a page in use for texts to come."""
        self.held[page] = True

    def forget(self, page: int) -> None:
        """Keep an idle page no longer."""
        self.held[page] = False
        self.idle -= 1
        self._left(page)

    def _left(self, page: int) -> None:
        if self.held[page]:
            self.idle += 1
        else:
            self.free.append(page)


class Pools:
    """The pages of global layers and the rings of local ones."""

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        rings: int,
        step_tokens: int,
        device: torch.device | None = None,
        kv_dtype: KvDtype = "float32",
    ) -> None:
        where, dtype = torch.device("cpu") if device is None else device, KV_DTYPES[kv_dtype]
        self.window = config.sliding_window
        self.ring_pages = ring_pages(config, step_tokens)
        globals_ = _global_layers(config)
        self.paged = Pool(pages, globals_, config, where, dtype)
        self.local = Pool(rings * self.ring_pages, config.num_hidden_layers - globals_, config, where, dtype)

    @property
    def tokens(self) -> int:
        """Of one text, if it had all pages to itself."""
        return len(self.paged.uses) * PAGE

    def take_ring(self) -> list[int] | None:
        return self.local.take(self.ring_pages) if len(self.local.free) >= self.ring_pages else None

    def bytes_in_use(self) -> int:
        return sum(pool.in_use * pool.page_bytes for pool in (self.paged, self.local))

    def reaches(self, tokens: int, read: int) -> bool:
        """Whether a ring still holds the window before token `tokens` when `read` tokens have been read."""
        return max(0, tokens - self.window) // PAGE > (read - 1) // PAGE - self.ring_pages

    def window_of(self, ring: list[int], tokens: int) -> Tensor:
        """A copy of what local layers can still see after `tokens` tokens, a multiple of 64: [pages, ...]."""
        return self.local.values[self._window_pages(ring, tokens)]  # indexing copies

    def put_window(self, ring: list[int], tokens: int, window: Tensor) -> None:
        """The other way round, into another ring."""
        self.local.values[self._window_pages(ring, tokens)] = window

    def _window_pages(self, ring: list[int], tokens: int) -> list[int]:
        first = max(0, tokens - self.window) // PAGE
        return [ring[block % self.ring_pages] for block in range(first, tokens // PAGE)]


def ring_pages(config: ModelConfig, step_tokens: int) -> int:
    """A step's tokens go in before any of them is read, and window and step may begin anywhere in a page."""
    return pages_for(config.sliding_window + step_tokens) + 1


def ring_bytes(config: ModelConfig, step_tokens: int, kv_dtype: KvDtype) -> int:
    """Of one sequence, in all local layers."""
    locals_ = config.num_hidden_layers - _global_layers(config)
    return ring_pages(config, step_tokens) * PAGE * locals_ * _layer_bytes(config, kv_dtype)


def kv_bytes_per_token(config: ModelConfig, kv_dtype: KvDtype = "float32") -> int:
    """Of one token in all global layers."""
    return _global_layers(config) * _layer_bytes(config, kv_dtype)


def _global_layers(config: ModelConfig) -> int:
    return sum(config.is_global(layer) for layer in range(config.num_hidden_layers))


def _layer_bytes(config: ModelConfig, kv_dtype: KvDtype) -> int:
    """Of one token in one layer."""
    return config.num_key_value_heads * config.head_dim * 2 * KV_DTYPES[kv_dtype].itemsize
