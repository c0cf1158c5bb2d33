"""Training tokens per second beside transformers' AFMoE: the same shape, rows and optimiser on both sides, one run.

    python bench/training.py [RECIPE] [--rows 8] [--length 512] [--repeats 5]

Repeats are interleaved and medians compared, since machines are shared. Both sides do forward, backward, clipping and
the step of our Muon and AdamW; theirs runs its fastest experts mode on a CPU (grouped_mm). The machine's own float32
matmul rate is measured beside them; the share printed is model FLOPs (6 x active parameters + attention) over it.
"""

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, for both sides alike

import torch
from transformers import AfmoeConfig, AfmoeForCausalLM

from trinity.ckpt.hf import published_config
from trinity.config.load import override
from trinity.config.run import RunConfig
from trinity.data.loader import Batch
from trinity.optim.muon import Muon
from trinity.plan.params import count_parameters
from trinity.recipes.table import recipe
from trinity.train.state import TrainState
from trinity.train.step import accumulate, apply_update


def batch_of(config: RunConfig, rows: int, length: int) -> Batch:
    tokens = torch.randint(32, config.model.vocab_size, (rows, length + 1))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.zeros(rows, length, dtype=torch.int64))


class Ours:
    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.state = TrainState.fresh(config, None)  # type: ignore[arg-type]

    def step(self, batch: Batch) -> None:
        measured = accumulate(self.state, [batch], self.config)
        apply_update(self.state, measured, self.config, (1e-4, 1e-4))


class Transformers:
    def __init__(self, config: RunConfig) -> None:
        values = published_config(config.model, torch.float32, 5e-4)
        kept = {key: value for key, value in values.items() if key not in ("architectures", "dtype")}
        self.model = AfmoeForCausalLM(AfmoeConfig(**kept)).train()
        self.model.set_experts_implementation("grouped_mm")
        matrices, others = [], []
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            hidden = parameter.dim() >= 2 and not any(part in name for part in ("embed", "lm_head", "router"))
            (matrices if hidden else others).append(parameter)
        self.muon, self.adamw = Muon(matrices, lr=1e-4), torch.optim.AdamW(others, lr=1e-4, fused=True)

    def step(self, batch: Batch) -> None:
        self.model(input_ids=batch.tokens, labels=batch.tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in (self.muon, self.adamw):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)


def matmul_rate(size: int = 2048) -> float:
    """Float32 FLOP/s of one large matrix product, best of five."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = min(_seconds(lambda: a @ b) for _ in range(5))
    return 2 * size**3 / best


def _seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def model_flops(config: RunConfig, rows: int, length: int) -> float:
    """Forward and backward of one step, attention counted by what each layer sees."""
    model = config.model
    seen = sum(
        length / 2 if model.is_global(layer) else min(model.sliding_window, length / 2)
        for layer in range(model.num_hidden_layers)
    )
    attention = 12 * model.num_attention_heads * model.head_dim * seen
    return rows * length * (6 * count_parameters(model).active + attention)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    settings = [f"data.sequence_length={options.length}", f"train.microbatch_rows={options.rows}",
                f"train.batch_tokens={options.rows * options.length}"]  # fmt: skip
    config = override(recipe(options.recipe), settings)
    sides = {"trinity": Ours(config), "transformers": Transformers(config)}
    batch = batch_of(config, options.rows, options.length)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(options.repeats + 1):
        for name, side in sides.items():
            spent = _seconds(lambda: side.step(batch))  # noqa: B023
            if repeat:  # the first pays for allocations
                seconds[name].append(spent)
    rate = matmul_rate()
    tokens = options.rows * options.length
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    flops = model_flops(config, options.rows, options.length)
    print(json.dumps({
        "recipe": options.recipe, "rows": options.rows, "length": options.length, "repeats": options.repeats,
        "tokens_per_second": {name: round(tokens / value, 1) for name, value in medians.items()},
        "ratio": round(medians["transformers"] / medians["trinity"], 2),
        "matmul_gflops": round(rate / 1e9, 1),
        "share_of_matmul_rate": {name: round(flops / value / rate, 3) for name, value in medians.items()},
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
