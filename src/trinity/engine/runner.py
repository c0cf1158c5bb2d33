"""One step of the model over rows of several sequences, whose past lies in pages: compiled for a CPU, or plain.

The compiled runner's results do not depend on who else is in the step nor on how a prompt was cut into steps, to the
bit. The plain one runs the model's own code, a sequence at a time, on any device; it agrees with the compiled to
rounding and takes its place where there is no compiler.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trinity.base.errors import CheckpointError
from trinity.ckpt.weights import HeldWeights
from trinity.config.model import ModelConfig
from trinity.engine.pages import PAGE, KvDtype, Pools, pages_for
from trinity.engine.weights import DecoderWeights, Kind, decoder_weights
from trinity.kernels.compiled import is_loaded
from trinity.model.attend import additive, scaled_dot_product
from trinity.model.transformer import Transformer


class Rows(NamedTuple):
    """What one sequence has in a step."""

    tokens: list[int]
    position: int  # of the first
    pages: list[int]  # of global layers, from the text's beginning on, with room for these tokens
    ring: list[int]  # of local layers
    wanted: int = 1  # of how many of the last rows the logits are asked for


class ExpertReads(NamedTuple):
    """What became of experts that were asked for, where memory does not hold all of them; since the start."""

    hits: int  # were in memory
    misses: int  # had to be read from the file
    bytes: int  # read
    stalled_seconds: float  # in which some thread waited for a read


class Output(NamedTuple):
    """What a step made for the wanted rows, in order."""

    logits: Tensor  # [N, V] float32 on the CPU
    likeliest: list[int]  # the first of each row's greatest logits; -1 where one of them is not finite


class Runner(Protocol):
    config: ModelConfig
    device: torch.device
    weight_bytes: int  # always in memory
    expert_rows: Tensor  # [sparse layers, E] int64, rows that each expert was given so far

    def read(self, rows: list[Rows], pools: Pools) -> Output: ...

    def forward(self, rows: list[Rows], pools: Pools) -> Tensor:
        """The logits alone."""
        ...

    def expert_reads(self) -> ExpertReads | None:
        """None where all experts are in memory."""
        ...


class CompiledRunner:
    """kernels/decoder.cpp over weights in panels."""

    def __init__(self, weights: DecoderWeights) -> None:
        config = weights.config
        self.config = config
        self.device = torch.device("cpu")
        self.weight_bytes = weights.bytes
        self.expert_rows = torch.zeros(config.num_sparse_layers, config.num_experts, dtype=torch.int64)
        self._decoder, self._cache = weights.decoder(), weights.cache

    def forward(self, rows: list[Rows], pools: Pools) -> Tensor:
        return self.read(rows, pools).logits

    def read(self, rows: list[Rows], pools: Pools) -> Output:
        step, wanted = [], 0
        for one in rows:
            step += (len(one.tokens), one.position, one.wanted, len(one.pages), len(one.ring))
            step += one.tokens
            step += one.pages
            step += one.ring
            wanted += one.wanted
        logits = torch.empty(wanted, self.config.vocab_size)
        likeliest = self._decoder.forward(step, pools.paged.values, pools.local.values, logits, self.expert_rows)
        if self._cache is not None and (wrong := self._cache.failure()):
            raise CheckpointError(f"{wrong}.", "Restore the file, and start again.")
        return Output(logits, likeliest)

    def expert_reads(self) -> ExpertReads | None:
        if self._cache is None:
            return None
        hits, misses, read, nanoseconds = self._cache.counts()
        return ExpertReads(hits, misses, read, nanoseconds / 1e9)


class PlainRunner:
    """The model's own code, a sequence at a time."""

    def __init__(self, model: Transformer) -> None:
        self.config = model.config
        self.model = model
        self.device = model.embed_tokens.weight.device
        self.weight_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
        self.expert_rows = torch.zeros(self.config.num_sparse_layers, self.config.num_experts, dtype=torch.int64)

    def read(self, rows: list[Rows], pools: Pools) -> Output:
        logits = self.forward(rows, pools)
        return Output(logits, likeliest_of(logits))

    def forward(self, rows: list[Rows], pools: Pools) -> Tensor:
        return torch.cat([self._one(one, pools) for one in rows])

    def _one(self, one: Rows, pools: Pools) -> Tensor:
        positions = torch.arange(one.position, one.position + len(one.tokens), device=self.device)
        tokens = torch.tensor([one.tokens], device=self.device)
        hidden, routings = self.model(tokens, positions, PagedPast(self.config, one, pools))
        for seen, routing in zip(self.expert_rows, routings, strict=True):
            seen += routing.counts().cpu()
        return self.model.head(hidden[0, len(one.tokens) - one.wanted :]).cpu()

    def expert_reads(self) -> None:
        return None


class PagedPast:
    """An `Attend` over the pages of one sequence: puts new keys and values there, and reads them back in order."""

    def __init__(self, config: ModelConfig, rows: Rows, pools: Pools) -> None:
        self.config, self.rows, self.pools = config, rows, pools
        self._masks: dict[int | None, Tensor] = {}
        order = [config.is_global(layer) for layer in range(config.num_hidden_layers)]
        self._places = [order[:layer].count(kind) for layer, kind in enumerate(order)]  # among the layers of its kind

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q [1, H, T, C], k and v [1, J, T, C] -> [1, H, T, C]."""
        start, count = self.rows.position, q.shape[2]
        first = 0 if window is None else max(0, start - window + 1) // PAGE
        blocks = range(first, pages_for(start + count))
        pool = self.pools.paged if window is None else self.pools.local
        ring = self.rows.ring
        pages = [self.rows.pages[b] if window is None else ring[b % len(ring)] for b in blocks]
        held = pool.values[:, self._places[layer]]  # [pages, J, 2, 64 C], a view
        positions = torch.arange(start, start + count, device=q.device)
        page = torch.tensor(pages, device=q.device)[positions // PAGE - first]
        slot = positions % PAGE
        size, heads = self.config.head_dim, self.config.num_key_value_heads
        keys, values = held[:, :, 0].unflatten(-1, (size, PAGE)), held[:, :, 1].unflatten(-1, (PAGE, size))
        keys[page, :, :, slot] = k[0].transpose(0, 1).to(keys.dtype)
        values[page, :, slot] = v[0].transpose(0, 1).to(values.dtype)
        seen = slice(0, start + count - first * PAGE)
        keys = keys[pages].permute(1, 0, 3, 2).reshape(1, heads, -1, size)[:, :, seen].to(q.dtype)
        values = values[pages].permute(1, 0, 2, 3).reshape(1, heads, -1, size)[:, :, seen].to(q.dtype)
        if window not in self._masks:
            distance = positions[:, None] - torch.arange(first * PAGE, start + count, device=q.device)
            mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            self._masks[window] = additive(mask, q.dtype)
        return scaled_dot_product(q, keys, values, mask=self._masks[window])


def likeliest_of(logits: Tensor) -> list[int]:
    """Of each row of logits [N, V] the first of the greatest, -1 where not all are finite."""
    finite = (logits * 0 == 0).all(dim=-1)
    return torch.where(finite, logits.argmax(dim=-1), -1).tolist()


def runner_for(model: Transformer, kind: Kind | None = None) -> Runner:
    """Compiled where the model is on a CPU and the kernels are there, else plain. `kind`: None is that of the model."""
    weight = model.embed_tokens.weight
    own: Kind = "bfloat16" if weight.dtype == torch.bfloat16 else "float32"
    if weight.device.type == "cpu" and is_loaded():
        return CompiledRunner(decoder_weights(model.config, HeldWeights(model.state_dict()), kind or own))
    return PlainRunner(model)


def logits_of(runner: Runner, texts: list[list[int]], kv_dtype: KvDtype = "float32", step: int = 512) -> Tensor:
    """[B, T, V] float32 on the CPU: the next-token logits at every place of texts of one length."""
    made = []
    for tokens in texts:
        pools = Pools(runner.config, pages_for(len(tokens)), 1, step, runner.device, kv_dtype)
        pages, ring = pools.paged.take(pages_for(len(tokens))), pools.take_ring() or []
        starts = range(0, len(tokens), step)
        parts = [tokens[start : start + step] for start in starts]
        rows = [Rows(part, start, pages, ring, len(part)) for start, part in zip(starts, parts, strict=True)]
        made.append(torch.cat([torch.empty(0, runner.config.vocab_size), *(runner.forward([r], pools) for r in rows)]))
    return torch.stack(made) if made else torch.empty(0, 0, runner.config.vocab_size)
