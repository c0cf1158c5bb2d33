"""Training tokens per second beside transformers' AFMoE: the same shape, rows and optimiser on both sides, one run.

    python bench/training.py [RECIPE] [--rows 8] [--length 512] [--repeats 5] [--experts grouped_mm] [--heap-for-both]
    python bench/training.py nano --device cuda --precision bfloat16 --rows 4 --length 4096 [--forced-balance]

Each side lives in a process of its own, which tells its peak memory; they take turns, and medians are compared, since
machines are shared. Seconds of wall and of processor time are both measured: on a busy machine the second says more.
Both sides do forward, backward, clipping and the step of our Muon and AdamW. The recipe's step has many microbatches:
its time is that of one, times their number, plus that of clipping and the optimisers, each measured by itself. The
machine's matmul rate in that precision is torch's own; the share is model FLOPs (plan/flops.py) over it. Gate and up
are two matrices to both sides' Muon. In bfloat16 transformers' weights are bfloat16 themselves, which spares it casts
that we make.
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
from contextlib import ExitStack

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, for both sides alike

import torch
from transformers import AfmoeConfig, AfmoeForCausalLM

from trinity.ckpt.hf import published_config
from trinity.config.load import override
from trinity.config.run import RunConfig
from trinity.data.loader import Batch
from trinity.kernels.heap import keep_freed_memory
from trinity.optim.muon import Muon
from trinity.parallel.expert import forced_balance
from trinity.parallel.mesh import joined_world
from trinity.plan.flops import model_flops
from trinity.plan.layout import Layout
from trinity.plan.memory import rank_memory
from trinity.recipes.table import recipe
from trinity.train.state import TrainState
from trinity.train.step import accumulate, apply_update


def batch_of(config: RunConfig, rows: int, length: int) -> Batch:
    tokens = torch.randint(32, config.model.vocab_size, (rows, length + 1))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.zeros(rows, length, dtype=torch.int64))


class Ours:
    def __init__(self, config: RunConfig, options: argparse.Namespace, stack: ExitStack) -> None:
        self.config = config
        world = stack.enter_context(joined_world(config))
        self.state = TrainState.fresh(config, None, world)  # type: ignore[arg-type]
        self.dispatch = forced_balance(world) if options.forced_balance else None

    def accumulate(self, batches: list[Batch]) -> None:
        self.measured = accumulate(self.state, batches, self.config, self.dispatch)

    def update(self) -> None:
        apply_update(self.state, self.measured, self.config, (1e-4, 1e-4))

    @property
    def muon(self) -> Muon:
        return self.state.optimisers.muon


class Transformers:
    def __init__(self, config: RunConfig, options: argparse.Namespace, stack: ExitStack) -> None:
        dtype = getattr(torch, options.precision)
        values = published_config(config.model, dtype, 5e-4)
        kept = {key: value for key, value in values.items() if key not in ("architectures", "dtype")}
        self.device = torch.device(options.device)
        self.model = AfmoeForCausalLM(AfmoeConfig(**kept)).train().to(self.device, dtype)
        self.model.set_experts_implementation(options.experts)
        matrices, others = [], []
        self.halves: list[tuple[torch.Tensor, torch.Tensor]] = []  # gate and up in one parameter, and as two matrices
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            hidden = parameter.dim() >= 2 and not any(part in name for part in ("embed", "lm_head", "router"))
            if name.endswith("gate_up_proj"):
                both = torch.nn.Parameter(parameter.data.unflatten(1, (2, -1)))
                self.halves.append((parameter, both))
                parameter = both
            (matrices if hidden else others).append(parameter)
        self.muon, self.adamw = Muon(matrices, lr=1e-4), torch.optim.AdamW(others, lr=1e-4, fused=True)

    def accumulate(self, batches: list[Batch]) -> None:
        for batch in batches:
            tokens = batch.tokens.to(self.device)
            self.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def update(self) -> None:
        for whole, both in self.halves:
            both.grad, whole.grad = whole.grad.view_as(both), None
        for optimiser in (self.muon, self.adamw):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)


def serve_side(name: str, options: argparse.Namespace, stack: ExitStack) -> None:
    """The process of a side: for each line on stdin a step of one and one of three microbatches, as a line of JSON."""
    config = configured(options)
    on_gpu = options.device == "cuda"
    if not on_gpu and (name == "trinity" or options.heap_for_both):
        keep_freed_memory()  # as a training run of ours does
    side = {"trinity": Ours, "transformers": Transformers}[name](config, options, stack)
    batches = [batch_of(config, options.rows, options.length) for _ in range(3)]
    muon = side.muon.step
    spent: list[tuple[float, float]] = []
    side.muon.step = lambda: spent.append(_seconds(muon))  # type: ignore[method-assign]
    for _ in sys.stdin:
        one, update = _seconds(lambda: side.accumulate(batches[:1])), _seconds(side.update)
        three = _seconds(lambda: side.accumulate(batches))
        side.update()
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated() if on_gpu else resident
        micro = [(b - a) / 2 for a, b in zip(one, three, strict=True)]
        print(json.dumps({"one": one, "micro": micro, "update": update, "muon": spent[-2], "peak": peak}), flush=True)


def matmul_rate(options: argparse.Namespace) -> float:
    """FLOP/s of one large matrix product in the bench's precision, best of five."""
    size = 8192 if options.device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=options.device, dtype=getattr(torch, options.precision)) for _ in "ab")
    best = min(_seconds(lambda: a @ b)[0] for _ in range(5))
    return 2 * size**3 / best


def _seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds, and processor seconds over the threads: what they would be with nobody else on the machine."""
    _finish()
    started, used = time.perf_counter(), time.process_time()
    work()
    _finish()
    return time.perf_counter() - started, (time.process_time() - used) / torch.get_num_threads()


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def configured(options: argparse.Namespace) -> RunConfig:
    settings = [f"data.sequence_length={options.length}", f"train.microbatch_rows={options.rows}",
                "parallel.shard=1", "parallel.expert=1", f"parallel.device={options.device}",
                f"parallel.precision={options.precision}"]  # fmt: skip
    return override(recipe(options.recipe), [*settings, *options.set])


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
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="a setting of our side's recipe")
    parser.add_argument("--forced-balance", action="store_true", help="our experts get equally many rows each")
    parser.add_argument("--heap-for-both", action="store_true", help="transformers too keeps freed memory (glibc)")
    parser.add_argument("--side", choices=["trinity", "transformers"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        with ExitStack() as stack:
            return serve_side(options.side, options, stack)
    lines, config, rate = measured_in_turns(options), configured(options), matmul_rate(options)
    tokens = options.rows * options.length
    microbatches = max(1, config.train.batch_tokens // tokens)
    flops = tokens * model_flops(config.model, options.length)
    asked = ("recipe", "rows", "length", "repeats", "experts", "device", "precision", "forced_balance", "set")
    found: dict = {name: getattr(options, name) for name in asked} | {"microbatches_of_the_recipe": microbatches}
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
    layout = Layout(microbatch_rows=options.rows, remat=config.parallel.remat, precision=options.precision)
    memory = rank_memory(config, layout, in_host_memory=options.device == "cpu")
    found["planned_peak_bytes"] = memory.peak
    print(json.dumps(found, indent=1))
    return None


if __name__ == "__main__":
    main()
