"""What a long context costs: reading, and going on behind, 4k, 8k, ... tokens; by layers that see all and that do not.

    python bench/context.py [MODEL] [--lengths 4096 ... 131072] [--dtype float32] [--kv-dtype float32] [--repeats 1]
    python bench/context.py lab256 --beside --plot context.png > context.json

MODEL is a recipe, with seeded random weights, or a model folder. The engine reads one random text, on and on: behind
each length it writes a few tokens, then goes on from there by its prefix cache. So the time to read a length is the
sum of its steps. The same model with local layers alone tells layers that see a window from those that see all: what
the whole takes beyond it is the global layers' part. Keys and values are what the engine holds, beside the planner's
formula and what the process grew by. Beyond what was measured, up to 512k, stand the planner's bytes, and times by a
line through the steps: seconds = a + b x tokens before.

--beside reads the same lengths, up to 32k, with transformers in float32, in a process of its own. JSON goes to stdout;
a table, progress and time left to stderr. Machines are shared: of repeats the fastest counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from trinity.base.units import show_bytes, show_seconds
from trinity.bench.engines import TRIED, Transformers
from trinity.bench.subject import Asked, DrawnWeights, Side, Subject, random_prompt
from trinity.ckpt.opened import find_model
from trinity.config.engine import EngineLimits
from trinity.config.model import ModelConfig
from trinity.engine.engine import Engine
from trinity.engine.pages import PAGE
from trinity.engine.request import Piece, Request, SamplingParams
from trinity.engine.runner import CompiledRunner
from trinity.engine.weights import decoder_weights
from trinity.plan.flops import keys_seen
from trinity.plan.inference import cache_bytes, read_bytes, weight_bytes
from trinity.recipes.table import recipe

PLANNED_TO, BESIDE_TO = 512 * 1024, 32 * 1024
RATIO = (4096, 32768)  # lengths whose times are compared


@dataclass
class Readings:
    """Of one text: seconds of each step, by the tokens before it; and what came behind each length."""

    steps: list[tuple[int, float]] = field(default_factory=list)
    decode: dict[int, float] = field(default_factory=dict)  # seconds a token
    held: dict[int, int] = field(default_factory=dict)  # bytes of keys and values
    grown: dict[int, int] = field(default_factory=dict)  # bytes that the process has more than before

    def seconds(self, length: int) -> float:
        return sum(took for before, took in self.steps if before < length)


def line_through(points: list[tuple[int, float]]) -> tuple[float, float]:
    """a, b of seconds = a + b x tokens before."""
    before, took = np.array(points, dtype=float).T
    slope, start = np.polyfit(before, took, 1) if len(points) > 1 else (0.0, took[0])
    return float(start), float(slope)


def seconds_by(line: tuple[float, float], begin: int, end: int, step: int) -> float:
    """Of reading from one length to another by a line through steps."""
    return sum(line[0] + line[1] * before for before in range(begin, end, step))


class Progress:
    """Lines on stderr: what is read, and how long it will take by the line through the steps so far."""

    def __init__(self, name: str, longest: int, step: int) -> None:
        self.name, self.longest, self.step, self.told = name, longest, step, time.monotonic()

    def tell(self, steps: list[tuple[int, float]]) -> None:
        if time.monotonic() - self.told < 2 or len(steps) < 3:
            return
        self.told, done = time.monotonic(), steps[-1][0] + self.step
        left = max(0.0, seconds_by(line_through(steps), done, self.longest, self.step))
        print(f"{self.name}: {done:,} of {self.longest:,} tokens, {show_seconds(left)} left", file=sys.stderr)


def subject_of(options: argparse.Namespace) -> Subject:
    """The model, its context raised for the longest text."""
    folder = Path(options.model) if Path(options.model).is_dir() else None
    config = find_model(folder).config if folder else recipe(options.model).model
    config = replace(config, max_position_embeddings=2 * max(options.lengths))
    return Subject(name=options.model, config=config, folder=folder)


class Reader:
    """An engine over one runner that reads a text, and what it tells."""

    def __init__(self, name: str, local_only: bool, options: argparse.Namespace) -> None:
        subject = subject_of(options)
        config, self.tokenizer = subject.config, subject.tokenizer()
        every = config.num_hidden_layers + 1 if local_only else config.global_attn_every_n_layers
        self.config = replace(config, global_attn_every_n_layers=every)
        weights = find_model(subject.folder).weights if subject.folder else DrawnWeights(config)
        self.runner = CompiledRunner(decoder_weights(self.config, weights, options.dtype))
        self.name, self.options = name, options

    def best(self) -> Readings:
        self._read([TRIED])  # what is done once is not measured
        repeats = [self._read(self.options.lengths) for _ in range(self.options.repeats)]
        best = min(repeats, key=lambda found: found.seconds(self.options.lengths[-1]))
        best.decode = {length: min(found.decode[length] for found in repeats) for length in best.decode}
        return best

    def _read(self, lengths: list[int]) -> Readings:
        step = self.options.step_tokens
        limits = EngineLimits(max_active=1, step_tokens=step, kv_dtype=self.options.kv_dtype)
        engine = Engine(self.runner, self.tokenizer, frozenset(), limits)
        text, found, done = random_prompt(self.config, lengths[-1]), Readings(), 0
        progress, resident = Progress(self.name, lengths[-1], step), resident_bytes()
        for length in lengths:
            sampling = SamplingParams(max_new_tokens=self.options.written + 1)
            engine.submit(Request(prompt=tuple(text[:length]), sampling=sampling))
            known, pieces = done, []
            while not pieces:
                took, pieces = timed_step(engine)
                found.steps.append((done, took))
                done = min(done + step, length)
                progress.tell(found.steps)
            assert done == length and pieces[0].cached_tokens == known, "the text was not read on from where it was"
            found.held[length], found.grown[length] = engine.kv_bytes(), resident_bytes() - resident
            took = []
            while engine.busy:
                took.append(timed_step(engine)[0])
            found.decode[length] = statistics.median(took)
        return found


def timed_step(engine: Engine) -> tuple[float, list[Piece]]:
    started = time.perf_counter()
    pieces = engine.step()
    took = time.perf_counter() - started
    for piece in pieces:
        if piece.error is not None:
            raise piece.error
    return took, pieces


def resident_bytes() -> int:
    """Of this process, now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the JSON but transformers'."""
    whole = Reader("all layers", False, options)
    config, readings = whole.config, whole.best()
    del whole  # its weights make room for the same once more
    local = Reader("local layers alone", True, options).best()
    step, lengths = options.step_tokens, options.lengths
    rows = [length_row(config, readings, local, length, options) for length in lengths]
    found: dict[str, Any] = {"lengths": rows, "ratios": ratios(readings, local)}
    lines = {"step": line_through(readings.steps), "local_step": line_through(local.steps)}
    lines["written"] = line_through([*readings.decode.items()])
    found["lines"] = {name: {"a_seconds": a, "b_seconds_per_token": b} for name, (a, b) in lines.items()}
    read = readings.seconds(lengths[-1])
    found["planned"] = []
    # Of short texts a line may fall, which says nothing of longer ones.
    rises = lines["step"][1] > 0 and lines["written"][1] > 0
    for length in doublings(lengths[-1], PLANNED_TO) if rises else []:
        seconds = read + seconds_by(lines["step"], lengths[-1], length, step)
        written = lines["written"][0] + lines["written"][1] * length
        times = {"tokens": length, "read_seconds": round(seconds, 3), "written_ms": round(1000 * written, 3)}
        found["planned"].append(times | planned_bytes(config, length, options))
    return found


def doublings(beyond: int, most: int) -> list[int]:
    """4k, 8k, ... `most`, those beyond a length."""
    return [4096 << n for n in range(32) if beyond < 4096 << n <= most]


def planned_bytes(config: ModelConfig, length: int, options: argparse.Namespace) -> dict[str, int]:
    return {
        "kv_bytes_planned": cache_bytes(config, length, options.kv_dtype, options.step_tokens),
        "weights_bytes_planned": weight_bytes(config, options.dtype),
        "bytes_read_a_token_planned": read_bytes(config, length, options.dtype, options.kv_dtype),
    }


def length_row(
    config: ModelConfig, whole: Readings, local: Readings, length: int, options: argparse.Namespace
) -> dict[str, Any]:
    """What one length came to."""
    planned = planned_bytes(config, length, options)
    seconds, of_local = whole.seconds(length), local.seconds(length)
    globals_ = sum(config.is_global(layer) for layer in range(config.num_hidden_layers))
    width = config.num_attention_heads * config.head_dim
    operations = 4 * width * globals_ * length * keys_seen(length, None)
    return {
        "tokens": length,
        "read_seconds": round(seconds, 3),
        "read_seconds_local_layers_alone": round(of_local, 3),
        "us_a_token": round(1e6 * seconds / length, 1),
        "us_a_token_local_layers_alone": round(1e6 * of_local / length, 1),
        "global_attention_GFLOP_s": round(operations / 1e9 / (seconds - of_local), 1) if seconds > of_local else None,
        "written_ms": round(1000 * whole.decode[length], 3),
        "written_ms_local_layers_alone": round(1000 * local.decode[length], 3),
        "written_GB_s": round(planned["bytes_read_a_token_planned"] / 1e9 / whole.decode[length], 2),
        "kv_bytes": whole.held[length],
        "kv_bytes_over_planned": round(whole.held[length] / planned["kv_bytes_planned"], 4),
        "process_grew_bytes": whole.grown[length],
    } | planned


def ratios(whole: Readings, local: Readings) -> dict[str, float] | None:
    """Time of the longer text over that of the shorter one; tokens are 8 times as many."""
    if any(length not in whole.held for length in RATIO):
        return None
    short, long = RATIO
    name = f"{long // 1024}k_over_{short // 1024}k"
    return {
        f"read_{name}": round(whole.seconds(long) / whole.seconds(short), 2),
        f"read_{name}_local_layers_alone": round(local.seconds(long) / local.seconds(short), 2),
        f"written_{name}": round(whole.decode[long] / whole.decode[short], 2),
    }


def serve_side(options: argparse.Namespace) -> None:
    """The process of transformers: a line of JSON for each length."""
    asked = Asked(batches=(1,), prefill=tuple(options.lengths), requests=0, prompt=128, tokens=options.written,
                  repeats=1, device="cpu", threads=options.threads, awake=False, text=None, drafts=0,
                  work=Path())  # fmt: skip
    side = Transformers(Side(engine="transformers", precision="float32", subject=subject_of(options)), asked)
    side.prefill(random_prompt(side.config, TRIED))  # finds the fastest way of experts for each kind of work
    side.decode(1)
    for length in options.lengths:
        cache, newest = side.new_cache(), torch.tensor([random_prompt(side.config, length)])
        took = []
        for kind in ["prefill", *["decode 1"] * options.written]:
            side.model.set_experts_implementation(side.ways[kind])
            started = time.perf_counter()
            newest = side.read(newest, cache)
            took.append(time.perf_counter() - started)
        row = {"tokens": length, "read_seconds": round(took[0], 3)}
        print(json.dumps(row | {"written_ms": round(1000 * statistics.median(took[1:]), 3)}), flush=True)


def beside(options: argparse.Namespace) -> dict[str, Any]:
    """transformers' figures, as far as its process came."""
    lengths = [length for length in options.lengths if length <= BESIDE_TO]
    process = subprocess.Popen([sys.executable, *sys.argv, "--side"], stdout=subprocess.PIPE, text=True)
    rows: list[dict[str, Any]] = []
    assert process.stdout is not None
    for line in process.stdout:
        rows.append(json.loads(line))
        print(f"transformers: {rows[-1]}, {len(lengths) - len(rows)} lengths left", file=sys.stderr)
    code = process.wait()
    return {"lengths": rows, "ended": None if code == 0 else f"its process ended with {code}"}


def draw(found: dict[str, Any], path: str) -> None:
    """Time to read, time of a token behind it, and bytes of keys and values, over the length of the text."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    rows, planned = found["lengths"], [found["lengths"][-1], *found["planned"]]
    shown = (
        ("read_seconds", "seconds to read"),
        ("written_ms", "ms a token behind it"),
        ("kv_bytes", "keys and values, MiB"),
    )
    for panel, (name, title) in zip(axes, shown, strict=True):
        scale = 2**20 if name == "kv_bytes" else 1
        panel.plot([row["tokens"] for row in rows], [row[name] / scale for row in rows], "o-", label="all layers")
        beyond = [row.get(name, row["kv_bytes_planned"]) / scale for row in planned]
        panel.plot([row["tokens"] for row in planned], beyond, ":", color="C0", label="planned")
        alone = f"{name}_local_layers_alone"
        if alone in rows[0]:
            panel.plot([row["tokens"] for row in rows], [row[alone] for row in rows], "o-", label="local layers alone")
        others = (found["beside"] or {}).get("lengths", [])
        if others and name in others[0]:
            panel.plot([row["tokens"] for row in others], [row[name] for row in others], "o-", label="transformers")
        panel.set(title=title, xlabel="tokens", xscale="log", yscale="log")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    figure.savefig(path)


def show_table(found: dict[str, Any]) -> None:
    header = ["tokens", "read", "local alone", "us/token", "local alone", "ms written", "GB/s", "KV", "over planned"]
    rows = [header]
    for row in found["lengths"]:
        rows.append([
            f"{row['tokens']:,}", show_seconds(row["read_seconds"]),
            show_seconds(row["read_seconds_local_layers_alone"]), f"{row['us_a_token']:.0f}",
            f"{row['us_a_token_local_layers_alone']:.0f}", f"{row['written_ms']:.2f}", f"{row['written_GB_s']:.1f}",
            show_bytes(row["kv_bytes"]), f"{row['kv_bytes_over_planned']:.3f}",
        ])  # fmt: skip
    for row in found["planned"]:
        rows.append([
            f"{row['tokens']:,}*", show_seconds(row["read_seconds"]), "", "", "", f"{row['written_ms']:.2f}", "",
            show_bytes(row["kv_bytes_planned"]), "",
        ])  # fmt: skip
    for row in rows:
        print("".join(f"{cell:>14}" for cell in row), file=sys.stderr)
    print(f"* planned; {found['ratios'] or 'no ratio without 4,096 and 32,768 tokens'}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="lab256")
    parser.add_argument("--lengths", type=int, nargs="+", default=doublings(0, 128 * 1024), metavar="TOKENS")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "int8", "int4"))
    parser.add_argument("--kv-dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--step-tokens", type=int, default=EngineLimits().step_tokens)
    parser.add_argument("--written", type=int, default=16, metavar="TOKENS", help="behind each length")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--beside", action="store_true", help=f"transformers too, to {BESIDE_TO:,} tokens")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves: .png, .svg")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.lengths = sorted(options.lengths)
    if odd := [length for length in options.lengths if length % PAGE or length < 1]:
        parser.error(f"--lengths: {odd[0]} is no multiple of {PAGE}, where the prefix cache can go on")
    torch.set_num_threads(options.threads)
    if options.side:
        options.lengths = [length for length in options.lengths if length <= BESIDE_TO]
        return serve_side(options)
    asked = ("model", "dtype", "kv_dtype", "step_tokens", "repeats", "threads")
    found = {name: getattr(options, name) for name in asked} | measured(options)
    found["beside"] = beside(options) if options.beside else None
    print(json.dumps(found, indent=1))
    show_table(found)
    if options.plot:
        draw(found, options.plot)
    return None


if __name__ == "__main__":
    main()
