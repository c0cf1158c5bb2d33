"""The comparison: figures of all sides, measured in turns in one run."""

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from trinity.base.errors import TrinityError, UsageError
from trinity.base.progress import progress
from trinity.base.units import show_bytes
from trinity.bench.engines import seconds_of
from trinity.bench.subject import BITS, TEXT_ROW, TEXT_TOKENS, Asked, Side, random_prompt
from trinity.bench.turns import Worker
from trinity.ckpt.gguf import write_gguf
from trinity.kernels.heap import available_bytes
from trinity.plan.params import count_parameters

BUFFER = 2**29  # bytes read to learn the bandwidth of memory: more than caches hold
PASSAGE, ANSWER = 256, 128  # tokens of a text that drafts are looked up in, and of the answer
PACKAGES = {"transformers": ["transformers"], "llama": ["llama_cpp", "gguf"]}
NAMES = {"transformers": "transformers", "llama": "llama.cpp"}
REMEDIES = {
    "transformers": "Try: pip install transformers",
    "llama": "Try: CXXFLAGS='-fno-dse -fno-tree-dse' pip install llama-cpp-python gguf",
}


def compare(sides: list[Side], asked: Asked) -> dict[str, Any]:
    """Figures of all sides, as one JSON object. Who fails is left out with the reason; TrinityError where all do."""
    check(sides, asked)
    write_files(sides, asked)
    workers: list[Worker] = []
    try:
        with progress("starting engines", len(sides)) as advance:
            for side in sides:
                workers.append(Worker(side, asked))
                advance(1)
        found = in_turns(workers, asked)
        found |= {"text": text_figures(workers, asked)} if asked.text is not None else {}
    finally:
        for worker in workers:
            worker.end()
    found["left_out"] = {worker.side.name: worker.failed for worker in workers if worker.failed is not None}
    if len(found["left_out"]) == len(workers):
        raise TrinityError(next(iter(found["left_out"].values())))
    return _described(sides[0], asked) | found


def check(sides: list[Side], asked: Asked) -> None:
    """UsageError where that cannot be measured: a package that is not here, a short context, too little memory."""
    for engine in {side.engine for side in sides} - {"trinity"}:
        if missing := [module for module in PACKAGES[engine] if find_spec(module) is None]:
            raise UsageError(
                f"{NAMES[engine]} cannot be measured: no {' and no '.join(missing)} here.", REMEDIES[engine]
            )
    for subject in {side.subject.name: side.subject for side in sides}.values():
        context = subject.config.max_position_embeddings
        for option, tokens in (("prefill", max(asked.prefill) + 1), ("tokens", asked.prompt + asked.tokens + 2)):
            if tokens > context:
                what = f"--{option} asks for {tokens} tokens of context, answer included"
                raise UsageError(f"{what}; {subject.name} has {context}.", f"Lower --{option}.")
    if asked.device != "cpu" and any(side.engine == "llama" for side in sides):
        raise UsageError("llama.cpp is measured on a CPU here.", "Give --device cpu, or leave it away.")
    free, needs = available_bytes(torch.device(asked.device)), memory_needed(sides)
    if free is not None and needs > free:
        raise UsageError(
            f"{', '.join(side.name for side in sides)} of {sides[0].subject.name} need {show_bytes(needs)} of memory "
            f"at once; {show_bytes(free)} are free.",
            "Measure fewer of them in one run, or weights of fewer bits.",
        )


def memory_needed(sides: list[Side]) -> float:
    """Bytes of weights at most, while all stay in memory and one after another is loaded."""
    held = most = 0.0
    for side in sides:
        weights = count_parameters(side.subject.config).total
        whole = side.engine != "trinity" and side.subject.folder is not None  # read into a state dict in float32
        held += weights * BITS[side.precision] / 8
        most = max(most, held + 4 * weights * whole)
    return most


def write_files(sides: list[Side], asked: Asked) -> None:
    """llama.cpp's files of weights, those that are not there yet."""
    files = {side.subject.gguf(asked.work, side.precision): side for side in sides if side.engine == "llama"}
    missing = {path: side for path, side in files.items() if not path.exists()}
    if missing:
        asked.work.mkdir(parents=True, exist_ok=True)
        subject = next(iter(missing.values())).subject
        weights, tokenizer = subject.weights(), subject.tokenizer()
        for path, side in missing.items():
            write_gguf(path, subject.config, weights, tokenizer, side.precision, subject.name)


def _described(side: Side, asked: Asked) -> dict[str, Any]:
    subject, parameters = side.subject, count_parameters(side.subject.config)
    packages = ["trinity", "torch", *(name for name in ("transformers", "llama_cpp") if find_spec(name))]
    return {
        "model": subject.name,
        "weights": "random, seeded" if subject.folder is None else str(subject.folder),
        "parameters": parameters.total,
        "parameters_of_a_token": parameters.active,
        "device": asked.device,
        "threads": asked.threads,
        "threads_wait": "awake" if asked.awake else "asleep",
        "repeats": asked.repeats,
        "prompt_tokens": asked.prompt,
        "decoded_tokens": asked.tokens,
        "versions": {name: version(name.replace("_cpp", "-cpp-python")) for name in packages},
    }


def in_turns(workers: list[Worker], asked: Asked) -> dict[str, Any]:
    """The bandwidth of memory, and the figures of every side; in each repeat the sides take turns at each case."""
    jobs: list[tuple[str, tuple[Any, ...], Worker]]
    jobs = [(f"decode {size}", ("decode", size), worker) for size in asked.batches for worker in workers]
    jobs += [(f"prefill {size}", ("prefill", size), worker) for size in asked.prefill for worker in workers]
    jobs += [(f"requests {asked.requests}", ("requests",), worker) for worker in workers if asked.requests]
    for name, given in (draft_prompts(workers[0].side, asked) if asked.drafts else {}).items():
        ours = [worker for worker in workers if worker.side.engine == "trinity"]
        jobs += [(f"{name}, {n} drafts", ("answer", *given, n), one) for one in ours for n in (0, asked.drafts)]
    made: dict[str, dict[str, list[Any]]] = {worker.side.name: {} for worker in workers}
    bandwidth = 0.0
    with progress("measuring", asked.repeats * len(jobs)) as advance:
        for _ in range(asked.repeats):
            bandwidth = max(bandwidth, memory_bandwidth(asked))
            for case, request, worker in jobs:
                made[worker.side.name].setdefault(case, []).append(worker.ask(*request))
                advance(1)
    engines = {
        worker.side.name: _figures(worker, made[worker.side.name], bandwidth)
        for worker in workers
        if worker.failed is None
    }
    return {"memory_bandwidth_GB_s": round(bandwidth / 1e9, 2), "engines": engines}


def _figures(worker: Worker, made: dict[str, list[Any]], bandwidth: float) -> dict[str, Any]:
    side, needed = worker.side, worker.side.subject.weight_bytes_a_token(worker.side.precision)
    drafts = {case: values for case, values in made.items() if case.endswith("drafts")}
    speeds = {case: _spread(values) for case, values in made.items() if case not in drafts}
    share = needed * speeds["decode 1"]["median"] / bandwidth if "decode 1" in speeds else None
    return {
        "bits_a_weight": BITS[side.precision],
        "parameters": count_parameters(side.subject.config).total,
        "tokens_per_second": speeds,
        "weight_bytes_per_token": round(needed),
        "share_of_bandwidth_at_batch_1": None if share is None else round(share, 3),
        "drafts": {
            case: {key: _spread([one[key] for one in values]) for key in values[0]} for case, values in drafts.items()
        },
        **worker.told,
    }


def _spread(values: list[float]) -> dict[str, float]:
    shown = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: round(value, 4) for name, value in shown.items()}


def memory_bandwidth(asked: Asked) -> float:
    """Bytes a second of reading one large buffer once, on a CPU a part on each thread; the best of three."""
    free = available_bytes(torch.device(asked.device)) or BUFFER
    if asked.device != "cpu":
        large = torch.ones(min(16 * BUFFER, free // 4) // 4, device=asked.device)
        return large.nbytes / min(seconds_of(lambda: large.sum().item()) for _ in range(3))
    buffer = np.ones(min(BUFFER, free // 4) // 8, dtype=np.int64)
    parts = np.array_split(buffer, asked.threads)
    with ThreadPoolExecutor(asked.threads) as pool:
        return buffer.nbytes / min(seconds_of(lambda: list(pool.map(np.add.reduce, parts))) for _ in range(3))


def text_ids(side: Side, text: str, most: int) -> list[int]:
    """The first tokens of a text, as the model would read it."""
    tokenizer = side.subject.tokenizer()
    mark = [tokenizer.bos_id] if tokenizer.begins_texts else []
    return [*mark, *tokenizer.encode(text[: 40 * most])][:most]


def text_figures(workers: list[Worker], asked: Asked) -> dict[str, Any]:
    """Of every side: perplexity on the text, and its logits' distance from its engine's in float32, or from ours."""
    config = workers[0].side.subject.config
    length = min(TEXT_ROW, config.max_position_embeddings)
    ids = text_ids(workers[0].side, asked.text or "", TEXT_TOKENS)
    rows = [row for start in range(0, len(ids), length) if len(row := ids[start : start + length]) > 1]
    found: dict[str, dict[str, Any]] = {}
    with progress("reading the text", len(rows)) as advance:
        for row in rows:
            made = {worker.side.name: worker.ask("logits", row) for worker in workers}
            logits = {name: values for name, values in made.items() if values is not None}
            for name, values in logits.items():
                own = [] if name.endswith("-float32") else [f"{name.split('-')[0]}-float32"]
                beside = next((other for other in (*own, "trinity-float32") if other in logits), None)
                one = found.setdefault(name, {"beside": beside, "nats": [], "error": [], "same": []})
                one["nats"] += [float(cross_entropy(torch.from_numpy(values[:-1]), torch.tensor(row[1:])))]
                if beside is not None:
                    exact = logits[beside]
                    one["error"] += [np.linalg.norm(values - exact) / np.linalg.norm(exact)]
                    one["same"] += [(values.argmax(1) == exact.argmax(1)).mean()]
            advance(1)
    engines = {
        name: {
            "perplexity": round(float(np.exp(np.mean(one["nats"]))), 4),
            "beside": one["beside"],
            "relative_error_of_logits": round(float(np.mean(one["error"])), 8) if one["error"] else None,
            "same_likeliest_token": round(float(np.mean(one["same"])), 4) if one["same"] else None,
        }
        for name, one in found.items()
    }
    return {"tokens": sum(map(len, rows)), "vocabulary": config.vocab_size, "engines": engines}


def draft_prompts(side: Side, asked: Asked) -> dict[str, tuple[list[int], int, float]]:
    """By kind of text: a prompt, the tokens of its answer, the temperature it is drawn at.

    One is a passage and its beginning once more, which a model that learnt to copy goes on with; of the other the
    answer is drawn, so that it does not fall into a loop.
    """
    context = side.subject.config.max_position_embeddings
    passage, answer = min(PASSAGE, context // 2), min(ANSWER, context // 4)
    ids = random_prompt(side.subject.config, passage)
    if side.subject.folder is not None:
        ids = text_ids(side, asked.text or Path(argparse.__file__).read_text(), passage)
    return {"repeats": (ids + ids[: len(ids) // 4], answer, 0.0), "does not repeat": (ids, answer, 1.0)}
