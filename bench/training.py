"""Training tokens per second beside transformers' AFMoE: the same shape, rows and optimiser on both sides, one run.

    python bench/training.py [RECIPE] [--rows 8] [--length 512] [--repeats 5] [--experts grouped_mm] [--heap-for-both]

Each side lives in a process of its own, which tells its peak memory; they take turns, and medians are compared, since
machines are shared. Seconds of wall and of processor time are both measured: on a busy machine the second says more.
Both sides do forward, backward, clipping and the step of our Muon and AdamW. The recipe's step has many microbatches:
its time is that of one, times their number, plus that of clipping and the optimisers, each measured by itself. The
machine's float32 matmul rate is torch's own; the share is model FLOPs (6 x active parameters + attention) over it.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, for both sides alike

import torch
from transformers import AfmoeConfig, AfmoeForCausalLM

from trinity.ckpt.hf import published_config
from trinity.config.load import override
from trinity.config.run import RunConfig
from trinity.data.loader import Batch
from trinity.kernels.heap import keep_freed_memory
from trinity.optim.muon import Muon
from trinity.plan.layout import Layout
from trinity.plan.memory import rank_memory
from trinity.plan.params import count_parameters
from trinity.recipes.table import recipe
from trinity.train.state import TrainState
from trinity.train.step import accumulate, apply_update


def batch_of(config: RunConfig, rows: int, length: int) -> Batch:
    tokens = torch.randint(32, config.model.vocab_size, (rows, length + 1))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.zeros(rows, length, dtype=torch.int64))


class Ours:
    def __init__(self, config: RunConfig, experts: str) -> None:
        self.config = config
        self.state = TrainState.fresh(config, None)  # type: ignore[arg-type]

    def accumulate(self, batches: list[Batch]) -> None:
        self.measured = accumulate(self.state, batches, self.config)

    def update(self) -> None:
        apply_update(self.state, self.measured, self.config, (1e-4, 1e-4))

    @property
    def muon(self) -> Muon:
        return self.state.optimisers.muon


class Transformers:
    def __init__(self, config: RunConfig, experts: str) -> None:
        values = published_config(config.model, torch.float32, 5e-4)
        kept = {key: value for key, value in values.items() if key not in ("architectures", "dtype")}
        self.model = AfmoeForCausalLM(AfmoeConfig(**kept)).train()
        self.model.set_experts_implementation(experts)
        matrices, others = [], []
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            hidden = parameter.dim() >= 2 and not any(part in name for part in ("embed", "lm_head", "router"))
            (matrices if hidden else others).append(parameter)
        self.muon, self.adamw = Muon(matrices, lr=1e-4), torch.optim.AdamW(others, lr=1e-4, fused=True)

    def accumulate(self, batches: list[Batch]) -> None:
        for batch in batches:
            self.model(input_ids=batch.tokens, labels=batch.tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def update(self) -> None:
        for optimiser in (self.muon, self.adamw):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)


def serve_side(name: str, options: argparse.Namespace) -> None:
    """The process of a side: for each line on stdin a step of one and one of three microbatches, as a line of JSON."""
    config = configured(options)
    if name == "trinity" or options.heap_for_both:
        keep_freed_memory()  # as a training run of ours does
    side = {"trinity": Ours, "transformers": Transformers}[name](config, options.experts)
    batches = [batch_of(config, options.rows, options.length) for _ in range(3)]
    muon = side.muon.step
    spent: list[tuple[float, float]] = []
    side.muon.step = lambda: spent.append(_seconds(muon))  # type: ignore[method-assign]
    for _ in sys.stdin:
        one, update = _seconds(lambda: side.accumulate(batches[:1])), _seconds(side.update)
        three = _seconds(lambda: side.accumulate(batches))
        side.update()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        micro = [(b - a) / 2 for a, b in zip(one, three, strict=True)]
        print(json.dumps({"one": one, "micro": micro, "update": update, "muon": spent[-2], "peak": peak}), flush=True)


def matmul_rate(size: int = 2048) -> float:
    """Float32 FLOP/s of one large matrix product, best of five."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = min(_seconds(lambda: a @ b)[0] for _ in range(5))
    return 2 * size**3 / best


def _seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds, and processor seconds over the threads: what they would be with nobody else on the machine."""
    started, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, (time.process_time() - used) / torch.get_num_threads()


def model_flops(config: RunConfig, rows: int, length: int) -> float:
    """Forward and backward of one step, attention counted by what each layer sees."""
    model = config.model
    seen = sum(
        length / 2 if model.is_global(layer) else min(model.sliding_window, length / 2)
        for layer in range(model.num_hidden_layers)
    )
    attention = 12 * model.num_attention_heads * model.head_dim * seen
    return rows * length * (6 * count_parameters(model).active + attention)


def configured(options: argparse.Namespace) -> RunConfig:
    settings = [f"data.sequence_length={options.length}", f"train.microbatch_rows={options.rows}"]
    return override(recipe(options.recipe), settings)


def measured_in_turns(options: argparse.Namespace) -> dict[str, list[dict]]:
    """The lines of both sides' processes, taken in turns; the first of each pays for allocations and is dropped."""
    lines: dict[str, list[dict]] = {"trinity": [], "transformers": []}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {name: subprocess.Popen([sys.executable, *sys.argv, "--side", name], **pipes) for name in lines}
    try:
        for _ in range(options.repeats + 1):
            for name, worker in workers.items():
                worker.stdin.write("\n")
                worker.stdin.flush()
                lines[name].append(json.loads(worker.stdout.readline()))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return {name: values[1:] for name, values in lines.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", nargs="?", default="lab256")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--experts", choices=["grouped_mm", "batched_mm", "eager"], default="grouped_mm")
    parser.add_argument("--heap-for-both", action="store_true", help="transformers too keeps freed memory (glibc)")
    parser.add_argument("--side", choices=["trinity", "transformers"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return serve_side(options.side, options)
    lines, config, rate = measured_in_turns(options), configured(options), matmul_rate()
    tokens = options.rows * options.length
    microbatches = max(1, config.train.batch_tokens // tokens)
    flops = model_flops(config, options.rows, options.length)
    found: dict = {"recipe": options.recipe, "rows": options.rows, "length": options.length}
    found |= {"repeats": options.repeats, "experts": options.experts, "microbatches_of_the_recipe": microbatches}
    found["matmul_gflops"] = round(rate / 1e9, 1)
    for clock, kind in enumerate(("wall", "processor")):
        sides = {}
        for name, values in lines.items():
            median = {
                key: statistics.median(v[key][clock] for v in values) for key in ("one", "micro", "update", "muon")
            }
            whole = microbatches * median["micro"] + (median["one"] - median["micro"]) + median["update"]
            sides[name] = {"seconds": {key: round(value, 3) for key, value in median.items()}} | {
                "tokens_per_second_forward_backward": round(tokens / median["micro"], 1),
                "tokens_per_second_step_of_one": round(tokens / (median["one"] + median["update"]), 1),
                "tokens_per_second_recipe_step": round(microbatches * tokens / whole, 1),
                "muon_share_of_recipe_step": round(median["muon"] / whole, 3),
                "share_of_matmul_rate": round(flops / median["micro"] / rate, 3),
            }
        ratios = {
            key: round(sides["trinity"][key] / sides["transformers"][key], 2)
            for key in sides["trinity"] if key.startswith("tokens")
        }  # fmt: skip
        found[kind] = sides | {"ratio": ratios}
    found["peak_bytes"] = {name: values[-1]["peak"] for name, values in lines.items()}
    memory = rank_memory(config, Layout(microbatch_rows=options.rows), in_host_memory=True)
    found["planned_peak_bytes"] = memory.peak
    print(json.dumps(found, indent=1))
    return None


if __name__ == "__main__":
    main()
