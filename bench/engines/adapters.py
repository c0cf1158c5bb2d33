"""The engines that bench/decode.py and bench/context.py compare, and the weights they share. One class each:

prefill(tokens)         reads one prompt from an empty cache, up to its last logits
decode(batch) -> float  seconds of a step that gives each of `batch` sequences its next token, greedily
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trinity.base.seeds import named_seed
from trinity.ckpt.hf import published_config, read_published_config
from trinity.ckpt.opened import open_model
from trinity.ckpt.weights import HeldWeights
from trinity.config.engine import EngineLimits
from trinity.config.model import ModelConfig
from trinity.engine.engine import Engine
from trinity.engine.request import Request, SamplingParams
from trinity.engine.runner import CompiledRunner, Runner
from trinity.engine.weights import decoder_weights, kind_named
from trinity.model.init import build_on_meta, fill_initial
from trinity.recipes.table import recipe
from trinity.text.tokenizer import Tokenizer
from trinity.text.train_bpe import train_bpe

PROMPT, STEPS = 128, 32  # tokens before, and steps of, each decoding
DRAWN = 2**24 - 3  # random values, a prime number of them: rows of matrices begin at ever other places
TRIED = 512  # tokens of the prompt by which transformers' ways are compared
TEXT_ROW = 512  # tokens of a stretch of text whose loss is taken


class Skipped(Exception):
    """Why an engine has no figures."""


class Weights(Mapping[str, Tensor]):
    """Seeded random weights of a recipe's model, each made when it is asked for: Nano whole would not fit.

    They have the initial distribution of model/init.py, but matrices are cut from one drawing, from a place of their
    own on: six billion values drawn one by one take longer than the bench.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.metas = config, build_on_meta(config).state_dict()
        self.drawn = torch.empty(DRAWN, 1)
        fill_initial(self.drawn, "drawn", config, seed=0, rows=DRAWN)

    def __getitem__(self, name: str) -> Tensor:
        shape = self.metas[name].shape
        if len(shape) > 1:
            start = named_seed(0, name) % DRAWN
            times = -(-shape.numel() // DRAWN)
            return self.drawn.flatten().roll(-start).repeat(times)[: shape.numel()].view(shape).clone()
        values = torch.zeros(shape)
        if not name.endswith("expert_bias"):
            fill_initial(values, name, self.config, seed=0, rows=len(values))
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self.metas)

    def __len__(self) -> int:
        return len(self.metas)


def configured(options: argparse.Namespace) -> ModelConfig:
    """The model's shape, with a context long enough for every prompt that is read."""
    folder = Path(options.model)
    config = read_published_config(folder) if folder.is_dir() else recipe(options.model).model
    return replace(config, max_position_embeddings=2 * max(*options.prefill, TEXT_ROW))


def opened(options: argparse.Namespace) -> tuple[ModelConfig, Mapping[str, Tensor], Tokenizer]:
    """Configuration, float32 weights by our names, and tokenizer."""
    config = configured(options)
    if Path(options.model).is_dir():
        found = open_model(options.model)
        return config, found.model.state_dict(), found.tokenizer
    return config, Weights(config), train_bpe([Path(__file__).read_text()], 512)


def runner_of(config: ModelConfig, weights: Mapping[str, Tensor], precision: str) -> Runner:
    """Our engine's, its weights packed as the engine would have them."""
    return CompiledRunner(decoder_weights(config, HeldWeights(weights), kind_named(precision)))


class Trinity:
    """The adapter of our engine: all that bench/decode.py knows of it."""

    def __init__(self, precision: str, options: argparse.Namespace) -> None:
        self.config, weights, self.tokenizer = opened(options)
        self.runner = runner_of(self.config, weights, precision)

    def prefill(self, tokens: list[int]) -> None:
        engine = self._engine([tokens], answer=1)
        while engine.busy:
            _step(engine)

    def decode(self, batch: int) -> float:
        engine = self._engine([prompt_of(self.config, PROMPT, row) for row in range(batch)], answer=STEPS + 2)
        while any(not sequence.answer for sequence in engine.scheduler.active.values()) or engine.scheduler.waiting:
            _step(engine)
        return statistics.median(seconds_of(lambda: _step(engine)) for _ in range(STEPS))

    def _engine(self, prompts: list[list[int]], answer: int) -> Engine:
        engine = Engine(self.runner, self.tokenizer, frozenset(), EngineLimits(max_active=len(prompts)))
        for prompt in prompts:
            engine.submit(Request(prompt=tuple(prompt), sampling=SamplingParams(max_new_tokens=answer)))
        return engine


def _step(engine: Engine) -> None:
    for piece in engine.step():
        if piece.error is not None:
            raise piece.error


class Transformers:
    """AfmoeForCausalLM over its own cache. Experts by the fastest of its ways, found anew for each kind of work."""

    WAYS = ("grouped_mm", "batched_mm", "eager")

    def __init__(self, precision: str, options: argparse.Namespace) -> None:
        try:
            from transformers import AfmoeConfig, AfmoeForCausalLM, DynamicCache
        except ImportError as error:
            raise Skipped(f"transformers is not installed ({error})") from error
        config, weights, _ = opened(options)
        values = published_config(config, torch.float32, 5e-4)
        kept = {key: value for key, value in values.items() if key not in ("architectures", "dtype")}
        self.config, self.new_cache = config, lambda: DynamicCache(config=self.model.config)
        with torch.device("meta"):
            self.model = AfmoeForCausalLM(AfmoeConfig(**kept))
        self.model = self.model.to_empty(device="cpu").eval().requires_grad_(False)
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(self.model.config)  # its buffers are no weights
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(weights[name.removeprefix("model.")].reshape(tensor.shape))
        self.ways: dict[str, str] = {}

    def prefill(self, tokens: list[int]) -> None:
        tried = torch.tensor([prompt_of(self.config, TRIED)])  # what is fast with few tokens need not be with many
        self._fastest("prefill", lambda: self.read(tried, self.new_cache()))
        self.read(torch.tensor([tokens]), self.new_cache())

    def decode(self, batch: int) -> float:
        cache = self.new_cache()
        prompts = torch.tensor([prompt_of(self.config, PROMPT, row) for row in range(batch)])
        newest = self.read(prompts, cache)

        def step() -> None:
            nonlocal newest
            newest = self.read(newest, cache)

        self._fastest(f"decode {batch}", step)
        return statistics.median(seconds_of(step) for _ in range(STEPS))

    @torch.inference_mode()
    def read(self, tokens: Tensor, cache: Any) -> Tensor:
        logits = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits.argmax(-1)

    def _fastest(self, kind: str, work: Callable[[], object]) -> None:
        """Take the way of experts that does `work` fastest, tried when a kind of work comes first."""
        if kind not in self.ways:
            took = {}
            for way in self.WAYS:
                self.model.set_experts_implementation(way)
                took[way] = min(seconds_of(work) for _ in range(3))
            self.ways[kind] = min(took, key=lambda way: took[way])
        self.model.set_experts_implementation(self.ways[kind])


class Llama:
    """llama.cpp through the bindings of llama-cpp-python, with its defaults, but for the cache of local layers, which
    it would keep whole."""

    def __init__(self, precision: str, options: argparse.Namespace) -> None:
        self.llama = _llama_cpp()
        self.threads, self.config = options.threads, configured(options)
        self.longest = max(*options.prefill, TEXT_ROW)
        path = gguf_path(options, precision)
        if not path.exists():
            raise Skipped("gguf is not installed, which writes llama.cpp's file")
        defaults = self.llama.llama_model_default_params()
        self.model = self.llama.llama_model_load_from_file(str(path).encode(), defaults)
        assert self.model, f"llama.cpp could not read {path}"
        self.contexts: dict[int, Any] = {}

    def prefill(self, tokens: list[int]) -> None:
        self._read(self._empty_context(1), [(token, place, 0) for place, token in enumerate(tokens)], [len(tokens) - 1])

    def decode(self, batch: int) -> float:
        context = self._empty_context(batch)
        newest = np.zeros(batch, dtype=np.int64)
        for row in range(batch):
            prompt = prompt_of(self.config, PROMPT, row)
            logits = self._read(context, [(token, place, row) for place, token in enumerate(prompt)], [PROMPT - 1])
            newest[row] = logits[0].argmax()
        took = []
        for place in range(PROMPT, PROMPT + STEPS):
            started = time.perf_counter()
            rows = [(int(token), place, row) for row, token in enumerate(newest)]
            newest = self._read(context, rows, list(range(batch))).argmax(1)
            took.append(time.perf_counter() - started)
        return statistics.median(took)

    def logits(self, tokens: list[int]) -> np.ndarray:
        places = list(range(len(tokens)))
        return self._read(self._empty_context(1), [(token, place, 0) for place, token in enumerate(tokens)], places)

    def _empty_context(self, sequences: int) -> Any:
        if sequences not in self.contexts:
            values = self.llama.llama_context_default_params()
            values.n_seq_max, values.swa_full = sequences, False
            values.n_ctx = self.longest + 256 if sequences == 1 else sequences * (PROMPT + STEPS + 256)
            values.n_batch = values.n_ctx
            values.n_threads = values.n_threads_batch = self.threads
            self.contexts[sequences] = self.llama.llama_init_from_model(self.model, values)
        context = self.contexts[sequences]
        self.llama.llama_memory_clear(self.llama.llama_get_memory(context), True)
        return context

    def _read(self, context: Any, rows: list[tuple[int, int, int]], wanted: list[int]) -> np.ndarray:
        """Feed (token, position, sequence) rows; the logits [len(wanted), V] of those that are wanted."""
        batch = self.llama.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
            batch.logits[i] = False
        for i in wanted:
            batch.logits[i] = True
        failed = self.llama.llama_decode(context, batch)
        self.llama.llama_batch_free(batch)
        assert not failed, f"llama_decode returned {failed}"
        shape = (len(wanted), self.config.vocab_size)
        return np.array(np.ctypeslib.as_array(self.llama.llama_get_logits(context), shape))


def _llama_cpp() -> Any:
    try:
        import llama_cpp
    except ImportError as error:
        raise Skipped(f"llama-cpp-python is not installed ({error})") from error
    _llama_cpp.silent = llama_cpp.llama_log_callback(lambda *_: None)  # kept: the library holds no reference of its own
    llama_cpp.llama_log_set(_llama_cpp.silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def gguf_path(options: argparse.Namespace, precision: str) -> Path:
    return Path(options.work) / f"{Path(options.model).name}-{precision}.gguf"


def prompt_of(config: ModelConfig, length: int, row: int = 0) -> list[int]:
    return np.random.default_rng(row).integers(32, config.vocab_size, length).tolist()


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


FAMILIES: dict[str, Callable[[str, argparse.Namespace], Trinity | Transformers | Llama]] = {
    "trinity": Trinity,
    "transformers": Transformers,
    "llama": Llama,
}
