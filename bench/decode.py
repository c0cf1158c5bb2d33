"""Decoding and prefill beside transformers and llama.cpp: the same weights in every engine, one run.

    python bench/decode.py [MODEL] [--engine NAME ...] [--repeats 5] [--prefill 512 4096 32768] [--text FILE] > out.json
    python bench/decode.py nano --engine llama-q8_0 --engine llama-q4_0 --prefill 512

MODEL is a recipe, with seeded random weights, or a model folder. Each engine lives in a process of its own, which tells
its peak memory; they take turns, and medians are compared, since machines are shared. Decoding gives each of 1 and of 8
sequences one token a step, greedily, after 128 tokens of prompt; prefill reads one prompt from an empty cache up to
its last logits. transformers takes whichever of its experts' implementations was fastest in a try before. The
machine's memory bandwidth is that of a read of one large buffer; the share is bytes of weights that a token needs, by
the configuration and the bits, times tokens a second at batch 1, over it: above one where a large cache holds what
every token needs. JSON goes to stdout, a table to stderr. An engine that is not installed, or that dies, is left out,
and the output says why.

llama.cpp comes with: CXXFLAGS='-fno-dse -fno-tree-dse' pip install llama-cpp-python gguf. The flags matter on
processors with AMX: gcc 12 takes the setting up of its tiles for dead code, and prompts in 8 and 4 bits end in a
segmentation fault. (Rows as narrow as those of `debug` are wrong on AMX all the same: see --text.) Threads wait awake
(OMP_WAIT_POLICY=ACTIVE), without which llama.cpp decodes a tenth of the tokens; so an engine is stopped while it is not
its turn. Where another program holds a core, waiting awake makes llama.cpp slower by a hundred times.
"""

import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")  # for all alike

import numpy as np
import torch
from engines.adapters import (
    FAMILIES,
    TEXT_ROW,
    Skipped,
    configured,
    gguf_path,
    opened,
    prompt_of,
    seconds_of,
)

from trinity.ckpt.gguf import write_gguf
from trinity.ckpt.weights import FLOAT32_ALWAYS
from trinity.config.model import ModelConfig
from trinity.model.init import build_on_meta

BITS = {"float32": 32, "bfloat16": 16, "q8_0": 8.5, "q4_0": 4.5, "int8": 8.5, "int4": 4.5}  # a weight, scales included
ENGINES = ["trinity-float32", "trinity-bfloat16", "trinity-int8", "trinity-int4", "transformers-float32",
           "llama-float32", "llama-q8_0", "llama-q4_0"]  # fmt: skip
BATCHES = (1, 8)


def serve_side(name: str, options: argparse.Namespace) -> None:
    """The process of an engine: a line of JSON says whether it is there; then for each line on stdin, its figures."""
    torch.set_num_threads(options.threads)
    family, precision = name.split("-", 1)
    try:
        side = FAMILIES[family](precision, options)
    except Skipped as error:
        return print(json.dumps({"skipped": str(error)}), flush=True)
    side.prefill(prompt_of(side.config, 64))
    for batch in BATCHES:
        side.decode(batch)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        kind, size = json.loads(line)
        figures: dict[str, Any] = {}
        if kind == "prefill":
            figures["seconds"] = seconds_of(partial(side.prefill, prompt_of(side.config, size)))
        elif kind == "decode":
            figures["seconds"] = side.decode(size)
        else:
            np.save(Path(options.work) / f"{name}.npy", side.logits(size))
        print(json.dumps(figures | {"peak": peak_memory(), "ways": getattr(side, "ways", None)}), flush=True)
    return None


def peak_memory() -> int:
    """Bytes this process has held at most; getrusage would count what its parent held before."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])


class Worker:
    """An engine's process, asked from here."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.skipped, self.last = name, None, {}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, *sys.argv, "--side", name, "--work", options.work]
        self.process = subprocess.Popen(command, **pipes)
        self.skipped = self._answer().get("skipped", self.skipped)
        self.process.send_signal(signal.SIGSTOP)  # until its turn: waiting threads hold the cores

    def ask(self, kind: str, size: Any) -> float | None:
        """Seconds of a piece of work; None once the engine is out of the race."""
        if self.skipped:
            return None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps([kind, size]) + "\n")
        self.process.stdin.flush()
        self.last = self._answer() or self.last
        self.process.send_signal(signal.SIGSTOP)
        return None if self.skipped else self.last.get("seconds")

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self.skipped = f"its process ended with {self.process.wait()}"
        return json.loads(line or "{}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def write_files(names: list[str], options: argparse.Namespace) -> None:
    """The GGUF files that the named engines read, where both packages they take are here."""
    precisions = [name.removeprefix("llama-") for name in names if name.startswith("llama-")]
    missing = [precision for precision in precisions if not gguf_path(options, precision).exists()]
    if not all(importlib.util.find_spec(package) for package in ("llama_cpp", "gguf")):
        return
    if missing:
        config, weights, tokenizer = opened(options)
        for precision in missing:
            write_gguf(gguf_path(options, precision), config, weights, tokenizer, precision, options.model)


def weight_bytes_a_token(config: ModelConfig, precision: str) -> float:
    """Bytes of weights that one token of one sequence needs: a row of the embedding, the chosen experts, the rest."""
    read = 0.0
    for name, meta in build_on_meta(config).state_dict().items():
        share = 1 / config.vocab_size if name.startswith("embed_tokens") else 1.0
        share = config.num_experts_per_tok / config.num_experts if ".experts." in name else share
        kept = meta.dim() == 1 or name.endswith(FLOAT32_ALWAYS)
        read += share * meta.numel() * (32 if kept else BITS[precision]) / 8
    return read


def memory_bandwidth(options: argparse.Namespace) -> float:
    """Bytes a second of reading a buffer of --buffer GB once, a part on each thread, best of seven."""
    buffer = np.ones(int(options.buffer * 1e9) // 8, dtype=np.int64)
    parts = np.array_split(buffer, options.threads)
    with ThreadPoolExecutor(options.threads) as pool:
        best = min(seconds_of(lambda: list(pool.map(np.add.reduce, parts))) for _ in range(7))
    return buffer.nbytes / best


def text_figures(workers: list[Worker], options: argparse.Namespace) -> dict[str, Any]:
    """Of each llama.cpp that runs: perplexity on the text, and its logits' distance from llama.cpp's in float32."""
    config, _, tokenizer = opened(options)
    ids = tokenizer.encode(Path(options.text).read_text(errors="replace")[: 40 * options.text_tokens])
    if tokenizer.begins_texts:
        ids = [tokenizer.bos_id, *ids]
    rows = [ids[start : start + TEXT_ROW] for start in range(0, min(len(ids), options.text_tokens), TEXT_ROW)]
    engines = [worker for worker in workers if worker.name.startswith("llama-")]
    found: dict[str, dict[str, list[float]]] = {}
    for row in (row for row in rows if len(row) > 1):
        logits = {}
        for worker in engines:
            worker.ask("logits", row)
            if not worker.skipped:
                logits[worker.name] = np.load(Path(options.work) / f"{worker.name}.npy")
        exact = logits.get("llama-float32")
        for name, values in logits.items():
            nats = torch.nn.functional.cross_entropy(torch.from_numpy(values[:-1]), torch.tensor(row[1:]))
            figures = found.setdefault(name, {"nats": [], "error": [], "same": []})
            figures["nats"].append(float(nats))
            if exact is not None:
                figures["error"].append(float(np.linalg.norm(values - exact) / np.linalg.norm(exact)))
                figures["same"].append(float((values.argmax(1) == exact.argmax(1)).mean()))
    return {"tokens": sum(map(len, rows)), "vocabulary": config.vocab_size} | {
        name: {
            "perplexity": round(float(np.exp(np.mean(figures["nats"]))), 4),
            "relative_error_of_logits": round(float(np.mean(figures["error"])), 6) if figures["error"] else None,
            "same_likeliest_token": round(float(np.mean(figures["same"])), 4) if figures["same"] else None,
        }
        for name, figures in found.items()
    }


def measured_in_turns(workers: list[Worker], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Tokens a second by engine and kind of work, medians over the repeats; the engines take turns."""
    cases = [("decode", batch) for batch in BATCHES] + [("prefill", length) for length in options.prefill]
    took: dict[str, dict[str, list[float]]] = {}
    for _ in range(options.repeats):
        for kind, size in cases:
            for worker in workers:
                seconds = worker.ask(kind, size)
                if seconds is not None:
                    took.setdefault(worker.name, {}).setdefault(f"{kind} {size}", []).append(size / seconds)
    return {
        name: {case: round(statistics.median(values), 2) for case, values in of_one.items()}
        for name, of_one in took.items()
        if len(of_one) == len(cases)
    }


def show_table(speeds: dict[str, dict[str, float]]) -> None:
    """Tokens a second of each engine, and how many times that is what each of ours does."""
    cases = list(dict.fromkeys(case for of_one in speeds.values() for case in of_one))
    rows = [["tokens/s", *cases]]
    rows += [[name, *(f"{of_one[case]:.1f}" for case in cases)] for name, of_one in speeds.items()]
    for ours in (name for name in speeds if name.startswith("trinity")):
        rows.append([])
        for name in (name for name in speeds if not name.startswith("trinity")):
            ratios = (speeds[ours][case] / speeds[name][case] for case in cases)
            rows.append([f"{ours} / {name}", *(f"{ratio:.2f}" for ratio in ratios)])
    for row in rows:
        print("".join(f"{cell:<40}" if i == 0 else f"{cell:>15}" for i, cell in enumerate(row)), file=sys.stderr)


def chosen(options: argparse.Namespace) -> list[str]:
    """The engines asked for; else all whose weights take less than a third of the memory."""
    if options.engine:
        return [name for name in ENGINES if any(name.startswith(asked) for asked in options.engine)]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    weights = sum(meta.numel() for meta in build_on_meta(configured(options)).state_dict().values())
    return [name for name in ENGINES if weights * BITS[name.split("-")[1]] / 8 < memory / 3]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="lab256")
    parser.add_argument("--engine", action="append", metavar="NAME", help=f"or how one begins: {', '.join(ENGINES)}")
    parser.add_argument("--prefill", type=int, nargs="+", default=[512, 4096, 32768], metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--buffer", type=float, default=4.0, help="GB read to learn the bandwidth of memory")
    parser.add_argument("--text", help="a file whose perplexity llama.cpp tells in each precision")
    parser.add_argument("--text-tokens", type=int, default=4096)
    parser.add_argument("--work", help="folder for the GGUF files, which are kept there")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return serve_side(options.side, options)
    with tempfile.TemporaryDirectory() as scratch:
        options.work = options.work or scratch
        return compare(options)


def compare(options: argparse.Namespace) -> None:
    names, config = chosen(options), configured(options)
    bandwidth = memory_bandwidth(options)
    write_files(names, options)
    workers = []
    try:
        for name in names:
            workers.append(Worker(name, options))
        speeds = measured_in_turns(workers, options)
        text = text_figures(workers, options) if options.text else None
    finally:
        for worker in workers:
            worker.end()
    found: dict[str, Any] = {key: getattr(options, key) for key in ("model", "repeats", "threads", "prefill")}
    found |= {"memory_bandwidth_GB_s": round(bandwidth / 1e9, 2), "engines": {}}
    for worker in workers:
        needed = weight_bytes_a_token(config, worker.name.split("-")[1])
        of_one = speeds.get(worker.name, {})
        found["engines"][worker.name] = {"skipped": worker.skipped} if worker.skipped else {}
        if of_one:
            found["engines"][worker.name] |= {
                "tokens_per_second": of_one,
                "weight_bytes_per_token": round(needed),
                "share_of_bandwidth_at_batch_1": round(needed * of_one["decode 1"] / bandwidth, 3),
                "peak_bytes": worker.last["peak"],
                "experts_by": worker.last["ways"],
            }
    print(json.dumps(found | {"text": text}, indent=1))
    show_table(speeds)


if __name__ == "__main__":
    main()
