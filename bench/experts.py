"""A model larger than the memory it is given: tokens a second, bytes read and stalls for several expert budgets.

    python bench/experts.py [mini] [--dtype int4] [--budgets 2G 4G 6G] [--tokens 64] [--folder WHERE] > out.json

RECIPE's shape with seeded random weights is packed into WHERE once (Mini in int4: 14.5 GiB) and kept there. Each budget
gets a fresh process, which reads a prompt, answers it, and tells its peak resident memory. Routing by random weights is
nearly even, the worst case for a cache: trained models choose some experts far more often. `--skew` makes some popular,
by selection biases drawn with that standard deviation. To stand on a small machine, run it in a memory cgroup; what the
system caches of the file then counts as well.
JSON goes to stdout, a table to stderr.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from trinity.base.progress import progress
from trinity.base.units import parse_bytes, show_bytes
from trinity.bench.subject import DrawnWeights
from trinity.ckpt.hf import published_config
from trinity.ckpt.model_folder import write_companions
from trinity.ckpt.opened import StoredModel
from trinity.ckpt.weights import PACKED
from trinity.config.engine import EngineLimits
from trinity.engine.loaded import load
from trinity.engine.packed import packed_bytes, write_packed
from trinity.engine.request import Request, SamplingParams
from trinity.engine.weights import KINDS, kind_named
from trinity.recipes.table import recipe
from trinity.text.train_bpe import train_bpe

PROMPT = 128


def packed_folder(options: argparse.Namespace) -> Path:
    """The model on the disk, made if it is not there."""
    folder = options.folder / f"{options.recipe}-{options.dtype}-{options.skew:g}"
    if not (folder / PACKED).exists():
        config = replace(recipe(options.recipe).model, max_position_embeddings=4096)
        tokenizer, kind = train_bpe([Path(__file__).read_text()], 512), kind_named(options.dtype)
        about = {"folder": folder, "name": folder.name, "generation": {}, "lineage": {}, "load_balance_coeff": 0.0}
        stored = StoredModel(config=config, weights=DrawnWeights(config, options.skew), tokenizer=tokenizer, **about)
        aside = folder.with_suffix(".writing")
        aside.mkdir(parents=True, exist_ok=True)
        (aside / "config.json").write_text(json.dumps(published_config(config, torch.bfloat16, 0.0)))
        write_companions(aside, config, tokenizer, chat=False)
        with progress(f"Packing {folder.name}", packed_bytes(config, kind)) as advance:
            write_packed(aside, stored, kind, advance)
        aside.rename(folder)
    return folder


def measured(folder: Path, budget: int, tokens: int, step: int) -> dict[str, float]:
    """In this process: one prompt and its answer."""
    begun = time.perf_counter()
    model = load(folder, expert_bytes=budget)
    opened = time.perf_counter() - begun
    engine = model.engine(EngineLimits(max_active=1, step_tokens=step, window_bytes=0))
    prompt = torch.randint(model.config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    sampling = SamplingParams(
        max_new_tokens=tokens + 1, temperature=1.0, seed=0
    )  # greedy answers of random weights loop
    engine.submit(Request(prompt=tuple(prompt), sampling=sampling))
    begun = time.perf_counter()
    while engine.busy and not any(sequence.answer for sequence in engine.scheduler.active.values()):
        engine.step()
    prefill, before, times, answer = time.perf_counter() - begun, model.runner.expert_reads(), [], []
    while engine.busy:
        begun = time.perf_counter()
        answer += [token for piece in engine.step() for token in piece.token_ids]
        times.append(time.perf_counter() - begun)
    after, found = (
        model.runner.expert_reads(),
        {"answer": hash(tuple(answer)), "opened_s": opened, "prefill_s": prefill},
    )
    found |= {"tokens_per_s": len(times) / sum(times), "median_ms": 1000 * statistics.median(times)}
    found["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if before is not None and after is not None:
        asked = after.hits + after.misses - before.hits - before.misses
        found |= {
            "prefill_read_bytes": before.bytes,
            "hit_rate": (after.hits - before.hits) / asked,
            "read_bytes_per_token": (after.bytes - before.bytes) / len(times),
            "stall_share": (after.stalled_seconds - before.stalled_seconds) / sum(times),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="mini")
    parser.add_argument("--dtype", default="int4", choices=KINDS)
    parser.add_argument("--budgets", nargs="+", default=["2G", "4G", "6G"], help="bytes; 0 holds all experts")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--step-tokens", type=int, default=512)
    parser.add_argument("--skew", type=float, default=0.0, help="standard deviation of the selection biases")
    parser.add_argument("--folder", type=Path, default=Path("experts-bench"))
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)  # one budget, in this process
    options = parser.parse_args()
    folder = packed_folder(options)
    if options.only is not None:
        print(json.dumps(measured(folder, options.only, options.tokens, options.step_tokens)))
        return
    rows = []
    for budget in map(parse_bytes, options.budgets):
        command = [sys.executable, *sys.argv, "--only", str(budget)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append({"budget": budget} | json.loads(done.stdout))
        print(line(rows[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"recipe": options.recipe, "dtype": options.dtype, "skew": options.skew, "rows": rows}, indent=1))


def line(row: dict[str, float]) -> str:
    rest = ""
    if not math.isnan(row.get("hit_rate", math.nan)):
        rest = (
            f", {row['hit_rate']:.0%} of experts in memory, {show_bytes(row['read_bytes_per_token'])} read a token, "
            f"{row['stall_share']:.0%} of the time waited"
        )
    budget = show_bytes(row["budget"]) if row["budget"] else "all experts"
    return (
        f"{budget:>12}: {row['tokens_per_s']:.2f} tokens/s, peak {show_bytes(row['peak_bytes'])}, opened in "
        f"{row['opened_s']:.1f} s, {PROMPT} tokens read in {row['prefill_s']:.1f} s{rest}"
    )


if __name__ == "__main__":
    main()
