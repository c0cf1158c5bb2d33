"""One step of the model over rows of several sequences, whose past lies in pages: compiled for a CPU, or plain.

The compiled runner's results do not depend on who else is in the step nor on how a prompt was cut into steps, to the
bit. The plain one (device.py) runs the model's own code on any device; it agrees with the compiled to rounding and
takes its place on a GPU and where there is no compiler.
"""

from typing import Protocol

import torch
from torch import Tensor

from trinity.config.model import ModelConfig
from trinity.engine.device import DeviceRunner
from trinity.engine.pages import Pools, pages_for
from trinity.engine.step import Rows
from trinity.engine.weights import DecoderWeights, Kind, decoder_weights
from trinity.kernels.compiled import is_loaded
from trinity.model.transformer import Transformer


class Runner(Protocol):
    config: ModelConfig
    device: torch.device
    weight_bytes: int
    expert_rows: Tensor  # [sparse layers, E] int64, rows that each expert was given so far

    def forward(self, rows: list[Rows], pools: Pools) -> Tensor:
        """Logits of the wanted rows, in order: [N, V] float32 on this device."""
        ...


class CompiledRunner:
    """kernels/decoder.cpp over weights in panels."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights) -> None:
        self.config = config
        self.device = torch.device("cpu")
        self.weight_bytes = weights.bytes
        self.expert_rows = torch.zeros(config.num_sparse_layers, config.num_experts, dtype=torch.int64)
        self._decoder = torch.classes.trinity.Decoder(weights.shape, weights.constants, weights.tensors)

    def forward(self, rows: list[Rows], pools: Pools) -> Tensor:
        tokens, positions, starts, wanted = [], [], [0], []
        for one in rows:
            tokens += one.tokens
            positions += range(one.position, one.position + len(one.tokens))
            starts.append(len(tokens))
            wanted += range(len(tokens) - one.wanted, len(tokens))
        widest = max(len(one.pages) for one in rows)
        tables = torch.tensor([one.pages + [0] * (widest - len(one.pages)) for one in rows])
        logits = torch.empty(len(wanted), self.config.vocab_size)
        self._decoder.forward(
            torch.tensor(tokens), torch.tensor(positions), torch.tensor(starts), tables,
            torch.tensor([one.ring for one in rows]), pools.paged.values, pools.local.values,
            torch.tensor(wanted, dtype=torch.int64), logits, self.expert_rows,
        )  # fmt: skip
        return logits


def runner_for(model: Transformer, kind: Kind | None = None) -> Runner:
    """Compiled where the model is on a CPU and the kernels are there, else plain. `kind`: None is that of the model."""
    weight = model.embed_tokens.weight
    own: Kind = "bfloat16" if weight.dtype == torch.bfloat16 else "float32"
    if weight.device.type == "cpu" and is_loaded():
        return CompiledRunner(model.config, decoder_weights(model, kind or own))
    return DeviceRunner(model)


def logits_of(runner: Runner, texts: list[list[int]], step: int = 512) -> Tensor:
    """[B, T, V] float32 on the CPU: the next-token logits at every place of texts of one length."""
    made = []
    for tokens in texts:
        pools = Pools(runner.config, pages_for(len(tokens)), 1, step, runner.device)
        pages, ring = pools.paged.take(pages_for(len(tokens))), pools.take_ring() or []
        starts = range(0, len(tokens), step)
        parts = [tokens[start : start + step] for start in starts]
        rows = [Rows(part, start, pages, ring, len(part)) for start, part in zip(starts, parts, strict=True)]
        parts = [runner.forward([one], pools).cpu() for one in rows]
        made.append(torch.cat([torch.empty(0, runner.config.vocab_size), *parts]))
    return torch.stack(made) if made else torch.empty(0, 0, runner.config.vocab_size)
