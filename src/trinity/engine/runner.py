"""One step of the model over rows of several sequences, whose past lies in pages: compiled for a CPU, or plain.

The compiled runner's results do not depend on who else is in the step nor on how a prompt was cut into steps, to the
bit. The plain one (device.py) runs the model's own code on any device; it agrees with the compiled to rounding and
takes its place on a GPU and where there is no compiler.
"""

from typing import Protocol

import torch
from torch import Tensor

from trinity.base.errors import CheckpointError
from trinity.ckpt.weights import HeldWeights
from trinity.config.engine import KvChoice, KvDtype
from trinity.config.model import ModelConfig
from trinity.engine.device import DeviceRunner
from trinity.engine.pages import Pools, pages_for
from trinity.engine.step import ExpertReads, Output, Rows
from trinity.engine.weights import DecoderWeights, Kind, decoder_weights
from trinity.kernels.compiled import is_loaded
from trinity.model.transformer import Transformer
from trinity.plan.inference import values_of


class Runner(Protocol):
    config: ModelConfig
    device: torch.device
    kv_dtype: KvDtype  # of keys and values, where nobody says
    weight_bytes: int  # always in memory
    step_bytes: int  # that a step needs beside them for weights alone
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
        self.kv_dtype: KvDtype = values_of(weights.kind)
        self.weight_bytes, self.step_bytes = weights.bytes, 0
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
            raise CheckpointError(f"{wrong}.", "Restore the file, and ask again.")
        return Output(logits, likeliest)

    def expert_reads(self) -> ExpertReads | None:
        if self._cache is None:
            return None
        hits, misses, read, nanoseconds = self._cache.counts()
        return ExpertReads(hits, misses, read, nanoseconds / 1e9)


def runner_for(model: Transformer) -> Runner:
    """Compiled where the model is on a CPU and the kernels are there, else plain."""
    weight = model.embed_tokens.weight
    kind: Kind = "bfloat16" if weight.dtype == torch.bfloat16 else "float32"
    if weight.device.type == "cpu" and is_loaded():
        return CompiledRunner(decoder_weights(model.config, HeldWeights(model.state_dict()), kind))
    return DeviceRunner(model)


def kv_dtype_of(runner: Runner, choice: KvChoice) -> KvDtype:
    return runner.kv_dtype if choice == "auto" else choice


def logits_of(runner: Runner, texts: list[list[int]], kv_dtype: KvChoice = "auto", step: int = 512) -> Tensor:
    """[B, T, V] float32 on the CPU: the next-token logits at every place of texts of one length."""
    length = len(texts[0]) if texts else 0
    made = torch.empty(len(texts), length, runner.config.vocab_size)
    for tokens, out in zip(texts, made, strict=True):
        pools = Pools(runner.config, pages_for(len(tokens)), 1, step, runner.device, kv_dtype_of(runner, kv_dtype))
        pages, ring = pools.paged.take(pages_for(len(tokens))), pools.take_ring() or []
        for start in range(0, length, step):
            part = tokens[start : start + step]
            out[start : start + step] = runner.forward([Rows(part, start, pages, ring, len(part))], pools)
    return made
