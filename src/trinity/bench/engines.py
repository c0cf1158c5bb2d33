"""The engines, each in a process of its own: one class each, with the same methods.

prefill(tokens)           reads one prompt from an empty cache, up to its last logits
decode(batch) -> seconds  of a step that gives each of `batch` sequences its next token, greedily
requests(them) -> seconds of answering all of them
logits(tokens) -> [T, V]  at every place of a text

The only file of the package that imports transformers and llama_cpp.
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trinity.bench.subject import Asked, Requests, Side, random_prompt
from trinity.ckpt.hf import published_config
from trinity.config.engine import EngineLimits
from trinity.engine.engine import Engine
from trinity.engine.pages import PAGE, kv_bytes_per_token, pages_for
from trinity.engine.request import Request, SamplingParams

TRIED = 512  # tokens of the prompt by which transformers' ways are compared


class Trinity:
    """Our engine, as `trinity.load` gives it."""

    def __init__(self, side: Side, asked: Asked) -> None:
        self.asked, self.config = asked, side.subject.config
        self.model = side.subject.loaded(side.precision, asked.device)
        self.model.end_ids = frozenset()  # an answer goes on for as long as it is timed
        self.serving: Engine | None = None

    def prefill(self, tokens: list[int]) -> None:
        engine = self._engine([tokens], SamplingParams(max_new_tokens=1))
        while engine.busy:
            _step(engine)

    def decode(self, batch: int) -> float:
        prompts = [random_prompt(self.config, self.asked.prompt, row) for row in range(batch)]
        engine = self._engine(prompts, SamplingParams(max_new_tokens=self.asked.tokens + 2))
        while any(not sequence.answer for sequence in engine.scheduler.active.values()) or engine.scheduler.waiting:
            _step(engine)
        return statistics.median(seconds_of(partial(_step, engine)) for _ in range(self.asked.tokens))

    def requests(self, requests: Requests) -> float:
        if self.serving is None:
            self.serving = self._empty_engine(len(requests), self.asked.prompt + self.asked.tokens)
        engine, started = self.serving, time.perf_counter()
        for prompt, tokens in requests:
            engine.submit(Request(prompt=tuple(prompt), sampling=SamplingParams(max_new_tokens=tokens)))
        while engine.busy:
            _step(engine)
        return time.perf_counter() - started

    def logits(self, tokens: list[int]) -> np.ndarray:
        return self.model.logits([tokens])[0].numpy()

    def answer(self, prompt: list[int], tokens: int, temperature: float, drafts: int) -> dict[str, float]:
        """One answer with `drafts` tokens proposed at once: its speed, and what became of the drafts."""
        sampling = SamplingParams(max_new_tokens=tokens, temperature=temperature, seed=0)
        engine, answer = self._engine([prompt], sampling, drafts), []
        rows, seconds, experts = self.model.runner.expert_rows, 0.0, 0
        while not answer:
            answer += _step(engine)
        timed = -len(answer)
        while engine.busy:
            before, started = rows.clone(), time.perf_counter()
            answer += _step(engine)
            seconds += time.perf_counter() - started
            experts += int((rows != before).sum())
        timed += len(answer)
        return {
            "tokens_per_second": timed / seconds,
            "drafted_per_token": engine.drafted / timed,
            "share_taken": engine.drafts_taken / max(1, engine.drafted),
            "experts_per_token_and_layer": experts / timed / max(1, self.config.num_sparse_layers),
            "share_of_distinct_tokens": len(set(answer)) / len(answer),
        }

    def _engine(self, prompts: list[list[int]], sampling: SamplingParams, drafts: int = 0) -> Engine:
        engine = self._empty_engine(len(prompts), len(prompts[0]) + sampling.max_new_tokens + drafts, drafts)
        for prompt in prompts:
            engine.submit(Request(prompt=tuple(prompt), sampling=sampling))
        return engine

    def _empty_engine(self, sequences: int, longest: int, drafts: int = 0) -> Engine:
        room = sequences * (1 + pages_for(longest)) * PAGE * max(1, kv_bytes_per_token(self.config))
        return self.model.engine(EngineLimits(max_active=sequences, kv_bytes=room, draft_tokens=drafts))


def _step(engine: Engine) -> list[int]:
    """The tokens that a step gave."""
    pieces = engine.step()
    for piece in pieces:
        if piece.error is not None:
            raise piece.error
    return [token for piece in pieces for token in piece.token_ids]


class Transformers:
    """AfmoeForCausalLM over its own cache, requests by its continuous batching. Experts by the fastest of its ways,
    found anew for each kind of work."""

    WAYS = ("grouped_mm", "batched_mm", "eager")

    def __init__(self, side: Side, asked: Asked) -> None:
        from transformers import AfmoeConfig, AfmoeForCausalLM, DynamicCache

        config, weights = side.subject.config, side.subject.weights()
        self.asked, dtype = asked, getattr(torch, side.precision)
        values = published_config(config, dtype, 5e-4)
        kept = {key: value for key, value in values.items() if key not in ("architectures", "dtype")}
        self.config, self.new_cache = config, lambda: DynamicCache(config=self.model.config)
        with torch.device("meta"):
            self.model = AfmoeForCausalLM(AfmoeConfig(**kept))
        self.model = self.model.to(dtype).to_empty(device=asked.device).eval().requires_grad_(False)
        rotary = type(self.model.model.rotary_emb)(self.model.config)  # its buffers are no weights
        self.model.model.rotary_emb = rotary.to(asked.device)
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(weights[name.removeprefix("model.")].reshape(tensor.shape))
        self.ways: dict[str, str] = {}

    def prefill(self, tokens: list[int]) -> None:
        self._fastest_of_prompts()
        self.read(torch.tensor([tokens]), self.new_cache())

    def requests(self, requests: Requests) -> float:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self._fastest_of_prompts()
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        room = ContinuousBatchingConfig(max_batch_tokens=EngineLimits().step_tokens)
        if self.asked.device == "cpu":  # on a GPU it finds out itself what there is
            room.num_blocks = 2 * len(requests) * -(-(self.asked.prompt + self.asked.tokens) // room.page_size)
        begun = self.model.continuous_batching_context_manager(
            greedy, timeout=5, continuous_batching_config=room, persistent_manager=True
        )
        with begun as batching:
            started = time.perf_counter()
            for prompt, tokens in requests:
                batching.add_request(prompt, max_new_tokens=tokens)
            waiting = len(requests)
            while waiting:
                result = batching.get_result(timeout=1)
                assert batching.is_running(), "its batching has ended"
                waiting -= result is not None and result.is_finished()
            return time.perf_counter() - started

    def decode(self, batch: int) -> float:
        cache = self.new_cache()
        prompts = torch.tensor([random_prompt(self.config, self.asked.prompt, row) for row in range(batch)])
        newest = self.read(prompts, cache)

        def step() -> None:
            nonlocal newest
            newest = self.read(newest, cache)

        self._fastest(f"decode {batch}", step)
        return statistics.median(seconds_of(step) for _ in range(self.asked.tokens))

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> np.ndarray:
        ids = torch.tensor([tokens], device=self.asked.device)
        return self.model(input_ids=ids, use_cache=False).logits[0].float().cpu().numpy()

    @torch.inference_mode()
    def read(self, tokens: Tensor, cache: Any) -> Tensor:
        tokens = tokens.to(self.asked.device)
        logits = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits.argmax(-1).cpu()  # where a sentence's end would be looked for

    def _fastest_of_prompts(self) -> None:
        """What is fast with few tokens need not be with many."""
        tried = torch.tensor([random_prompt(self.config, min(TRIED, self.config.max_position_embeddings // 2))])
        self._fastest("prefill", lambda: self.read(tried, self.new_cache()))

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

    def __init__(self, side: Side, asked: Asked) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self.llama = llama_cpp
        self.silent = llama_cpp.llama_log_callback(lambda *_: None)  # the library holds no reference of its own
        llama_cpp.llama_log_set(self.silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.asked, self.config = asked, side.subject.config
        path = side.subject.gguf(asked.work, side.precision)
        defaults = self.llama.llama_model_default_params()
        self.model = self.llama.llama_model_load_from_file(str(path).encode(), defaults)
        assert self.model, f"llama.cpp could not read {path}"
        self.contexts: dict[int, Any] = {}

    def prefill(self, tokens: list[int]) -> None:
        self.read(self._empty_context(1), [(token, place, 0) for place, token in enumerate(tokens)], [len(tokens) - 1])

    def decode(self, batch: int) -> float:
        context = self._empty_context(batch)
        newest, prompted = np.zeros(batch, dtype=np.int64), self.asked.prompt
        for row in range(batch):
            prompt = random_prompt(self.config, self.asked.prompt, row)
            logits = self.read(context, [(token, place, row) for place, token in enumerate(prompt)], [prompted - 1])
            newest[row] = logits[0].argmax()
        took = []
        for place in range(prompted, prompted + self.asked.tokens):
            started = time.perf_counter()
            rows = [(int(token), place, row) for row, token in enumerate(newest)]
            newest = self.read(context, rows, list(range(batch))).argmax(1)
            took.append(time.perf_counter() - started)
        return statistics.median(took)

    def requests(self, requests: Requests) -> float:
        """The bindings have no scheduler: all prompts at once, then a token for each that is not answered yet."""
        context, going, written = self._empty_context(len(requests)), list(range(len(requests))), 1
        started = time.perf_counter()
        rows = [(token, place, row) for row, (prompt, _) in enumerate(requests) for place, token in enumerate(prompt)]
        ends = [end - 1 for end in accumulate(len(prompt) for prompt, _ in requests)]
        newest = self.read(context, rows, ends).argmax(1)
        while going := [row for row in going if requests[row][1] > written]:
            rows = [(int(newest[row]), len(requests[row][0]) + written - 1, row) for row in going]
            newest[going] = self.read(context, rows, list(range(len(rows)))).argmax(1)
            written += 1
        return time.perf_counter() - started

    def logits(self, tokens: list[int]) -> np.ndarray:
        places = list(range(len(tokens)))
        return self.read(self._empty_context(1), [(token, place, 0) for place, token in enumerate(tokens)], places)

    def _empty_context(self, sequences: int) -> Any:
        if sequences not in self.contexts:
            values = self.llama.llama_context_default_params()
            values.n_seq_max, values.swa_full = sequences, False
            each = self.asked.longest if sequences == 1 else self.asked.prompt + self.asked.tokens
            values.n_ctx = sequences * (each + 256)
            values.n_batch = values.n_ctx
            values.n_threads = values.n_threads_batch = self.asked.threads
            self.contexts[sequences] = self.llama.llama_init_from_model(self.model, values)
        context = self.contexts[sequences]
        self.llama.llama_memory_clear(self.llama.llama_get_memory(context), True)
        return context

    def read(self, context: Any, rows: list[tuple[int, int, int]], wanted: list[int]) -> np.ndarray:
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


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


ENGINES: dict[str, Callable[[Side, Asked], Trinity | Transformers | Llama]] = {
    "trinity": Trinity,
    "transformers": Transformers,
    "llama": Llama,
}
