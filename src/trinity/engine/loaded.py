"""A model in the hand: `trinity.load(path)`, then logits, generate, score, chat.

    import trinity
    m = trinity.load("path/to/model")
    print(m.generate("def fibonacci(n):").text)

A text begins as the model's tokenizer has it, here and in transformers and vLLM: with the begin mark for a model that
was trained here, whose documents began with it. Token ids are taken as they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from trinity.base.errors import RequestError, UsageError, nearest
from trinity.base.progress import progress
from trinity.base.units import parse_bytes, show_bytes
from trinity.ckpt.hf import FolderWeights
from trinity.ckpt.opened import StoredModel, find_model, read_model
from trinity.ckpt.weights import PackedWeights, keep_precision
from trinity.config.engine import EngineLimits, KvChoice
from trinity.config.model import ModelConfig
from trinity.engine import narrow
from trinity.engine.device import DeviceRunner, device_named
from trinity.engine.engine import Engine, end_tokens, run
from trinity.engine.packed import kind_of, packed_bytes, read_packed
from trinity.engine.request import Generation, Piece, Request, SamplingParams, constraint_of, gather
from trinity.engine.runner import CompiledRunner, Runner, logits_of, runner_for
from trinity.engine.weights import NARROW, Dtype, Kind, decoder_weights, dtype_named
from trinity.kernels.compiled import is_loaded
from trinity.kernels.heap import available_bytes
from trinity.model.init import build_on_meta
from trinity.plan.inference import record_bytes
from trinity.text.chat import Message, render

ALONE = EngineLimits(max_active=1, window_bytes=0)  # one request, nothing kept for another
FORMS = ("json_schema", "regex", "grammar", "after_think")  # keywords of constraint_of


def load(
    path: Path | str,
    dtype: str | None = None,
    device: str = "auto",
    kv_dtype: KvChoice = "auto",
    expert_bytes: int | str = 0,
) -> "LoadedModel":
    """A Hugging Face folder, a run folder or a packed folder, ready to be asked.

    dtype: 'float32', 'bfloat16', 'int8', 'int4' or, on a GPU of compute capability 9, 'float8'. That is what weights
    are kept in; what is computed is float32 on a CPU, on a GPU of the weights' own kind, bfloat16 beside 8 and 4 bits.
    Router, norms and selection bias stay in float32 in any. None is 'bfloat16' on a GPU, and on a CPU for weights
    that are stored in it, else 'float32'; a packed folder has a dtype of its own.

    device: 'cpu', 'cuda', or 'auto': a GPU where there is one. A packed folder is for a CPU.

    kv_dtype: what keys and values are kept in, 'float32' or 'bfloat16'; 'auto' is float32 beside weights of float32,
    else bfloat16. Limits given to `engine` have their own.

    expert_bytes: of a packed folder, keep no more bytes of experts in memory, and read the others from the disk when a
    token chooses them, a number or such as '4G'; 0 keeps all. Answers are the same to the bit.

    CheckpointError where the folder is not a whole model, UsageError where it does not fit into memory.
    """
    kind = None if dtype is None else dtype_named(dtype)
    alone = replace(ALONE, kv_dtype=kv_dtype)
    device_named(device)
    return loaded(find_model(path), kind, device, alone, parse_bytes(expert_bytes))


def loaded(
    stored: StoredModel, kind: Dtype | None, device: str, alone: EngineLimits = ALONE, expert_bytes: int = 0
) -> "LoadedModel":
    """`load` of a model that was found."""
    return LoadedModel(stored, _runner(stored, kind, device, expert_bytes), alone)


def _runner(stored: StoredModel, dtype: Dtype | None, device: str, expert_bytes: int) -> Runner:
    packed = stored.weights.file if isinstance(stored.weights, PackedWeights) else None
    where = device_named("cpu" if device == "auto" and packed is not None else device)
    kind = kind_of(packed) if packed is not None else dtype or _default(stored, where)
    if dtype not in (None, kind):
        raise UsageError(f"{stored.folder} is packed in {kind}, not in {dtype}.", f"Leave --dtype {dtype} away.")
    if expert_bytes and packed is None:
        raise UsageError(
            f"{stored.folder} is not packed, so its experts cannot stay on the disk.",
            f"Write a packed folder first: trinity export {stored.folder} OUT --format packed --dtype int4.",
        )
    if packed is not None and where.type != "cpu":
        raise UsageError("A packed folder is for CPUs alone.", "Use --device cpu, or the model it is of.")
    if kind == "float8":
        narrow.check_float8(where)
        return _narrow_on(where, stored, kind)
    if kind in NARROW and where.type != "cpu":
        return _narrow_on(where, stored, cast(narrow.NarrowKind, kind))
    if (packed is not None or kind in NARROW) and not is_loaded():
        what, other = ("A packed folder", "the model it is of") if packed is not None else (kind, "the model")
        raise UsageError(f"{what} needs the compiled kernels.", f"Install g++, or use {other} in bfloat16.")
    if where.type != "cpu" or not is_loaded():
        for place in {torch.device("cpu"), where}:  # what goes to a GPU is read into memory first
            _check_memory(kind, _plain_bytes(stored.config, kind), place)
        return runner_for(read_model(stored, kind).model.to(where))
    if packed is not None:
        _check_budget(stored.config, kind, expert_bytes)
        return CompiledRunner(read_packed(packed, stored.config, expert_bytes))
    whole = packed_bytes(stored.config, kind)
    _check_memory(kind, whole, where)
    with progress(f"Packing {stored.name} in {kind}", whole) as advance:
        return CompiledRunner(decoder_weights(stored.config, stored.weights, kind, advance))


def _default(stored: StoredModel, where: torch.device) -> Dtype:
    """On a CPU nothing is rounded; its own products of bfloat16, where kernels are not compiled, are slow."""
    kept = isinstance(stored.weights, FolderWeights) and stored.weights.in_bfloat16
    return "bfloat16" if where.type != "cpu" or (kept and is_loaded()) else "float32"


def _narrow_on(where: torch.device, stored: StoredModel, kind: narrow.NarrowKind) -> Runner:
    """The model's own code with weights of fewer bits, which go to a GPU one by one."""
    whole = narrow.narrow_bytes(stored.config, kind)
    _check_memory(kind, whole + narrow.widest_bytes(narrow.narrow_on_meta(stored.config, kind)), where)
    narrow.check_kernels(where)
    with progress(f"Rounding {stored.name} to {kind}", whole) as advance:
        return DeviceRunner(narrow.narrow_model(stored.config, stored.weights, kind, where, advance))


def _plain_bytes(config: ModelConfig, kind: Kind) -> int:
    """Of the model's own weights."""
    dtype = getattr(torch, kind)
    state = build_on_meta(config).state_dict()
    return sum(keep_precision(name, meta, dtype).nbytes for name, meta in state.items())


def _check_budget(config: ModelConfig, kind: Kind, expert_bytes: int) -> None:
    """UsageError where a packed folder would not fit with this budget, or the budget holds no two experts."""
    record = record_bytes(config, kind)
    experts = config.num_sparse_layers * config.num_experts * record
    if expert_bytes < 0 or 0 < expert_bytes < min(2 * record, experts):
        raise UsageError(
            f"expert_bytes is {show_bytes(expert_bytes)}; an expert of this model has {show_bytes(record)}.",
            f"Give two of them room at least; one token's layer has {show_bytes(config.num_experts_per_tok * record)}.",
        )
    always = packed_bytes(config, kind) - experts
    _check_memory(
        kind, always + min(experts, expert_bytes or experts), torch.device("cpu"),
        f", or leave experts on the disk with --expert-bytes: {show_bytes(always + 2 * record)} are needed at least",
    )  # fmt: skip


def _check_memory(kind: Dtype, needed: int, where: torch.device, otherwise: str = "") -> None:
    """UsageError where weights would not fit: better now than when the system ends the process."""
    free = available_bytes(where)
    if free is not None and needed > free:
        there = f"{show_bytes(free)} are free on the {where.type}"
        raise UsageError(
            f"{kind} takes {show_bytes(needed)} for weights and a step; {there}.",
            f"Free memory{'' if kind == 'int4' else ', choose fewer bits'}{otherwise}.",
        )


class LoadedModel:
    """Opened weights and the calls that use them. Not for use by several threads at once; `serve` is."""

    def __init__(self, stored: StoredModel, runner: Runner, alone: EngineLimits = ALONE) -> None:
        self.name = stored.name
        self.generation = stored.generation
        self.tokenizer = stored.tokenizer
        self.runner = runner
        self.alone = alone
        self.end_ids = end_tokens(stored.tokenizer, stored.generation)

    @property
    def config(self) -> ModelConfig:
        return self.runner.config

    def engine(self, limits: EngineLimits | None = None) -> Engine:
        """A fresh engine over these weights."""
        own = EngineLimits(kv_dtype=self.alone.kv_dtype)
        return Engine(self.runner, self.tokenizer, self.end_ids, limits or own)

    def prompt(self, text_or_ids: str | Sequence[int]) -> tuple[int, ...]:
        """The tokens the model reads for a text (begin mark first, if the tokenizer adds one) or for ids (as given)."""
        if isinstance(text_or_ids, str):
            mark = (self.tokenizer.bos_id,) if self.tokenizer.begins_texts else ()
            return (*mark, *self.tokenizer.encode(text_or_ids))
        try:
            return tuple(int(token) for token in text_or_ids)
        except (TypeError, ValueError) as error:
            raise RequestError(
                "That is neither a text nor token ids.", "Give a string or a list of numbers."
            ) from error

    @torch.inference_mode()
    def logits(self, ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """[batch, time] int64 -> [batch, time, vocab] float32: the next-token logits at every place."""
        if not isinstance(ids, Tensor):
            try:
                ids = torch.tensor(ids)
            except (TypeError, ValueError) as error:
                raise RequestError(
                    "ids are not rows of token ids of one length.", "Give [batch, time] int64."
                ) from error
        if ids.dim() != 2 or ids.dtype != torch.int64:
            raise RequestError(f"ids has shape {list(ids.shape)} and type {ids.dtype}.", "Give [batch, time] int64.")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise RequestError(
                f"ids reach from {int(ids.min())} to {int(ids.max())}.",
                f"Token ids lie between 0 and {self.config.vocab_size - 1}.",
            )
        texts, length = ids.shape
        context = self.config.max_position_embeddings
        if length > context:
            raise RequestError(
                f"Texts of {length} tokens are longer than the model's context of {context}.", "Shorten them."
            )
        needed, free = 4 * texts * length * self.config.vocab_size, available_bytes(torch.device("cpu"))
        if free is not None and needed > free:
            raise RequestError(
                f"Logits of {texts} texts of {length} tokens take {show_bytes(needed)}; {show_bytes(free)} are free.",
                "Ask for fewer at once, or for log-probabilities (score).",
            )
        return logits_of(self.runner, ids.tolist(), self.alone.kv_dtype)

    def generate(
        self, text_or_ids: str | Sequence[int], max_new_tokens: int = 64, temperature: float = 0.0, **sampling: Any
    ) -> Generation:
        """Continue a text. `sampling` takes the fields of SamplingParams; log-probabilities are given in any case.

        One of `json_schema` (a dictionary or text), `regex` and `grammar` (Lark) holds the answer to that form, with
        `after_think` only behind its first `</think>`.
        """
        return self._answer(self.prompt(text_or_ids), max_new_tokens, temperature, sampling)

    def chat(
        self, messages: Sequence[Message], max_new_tokens: int = 256, temperature: float = 0.0, **sampling: Any
    ) -> Generation:
        """The assistant's next turn. messages: [{"role": "user", "content": "..."}, ...]."""
        return self._answer(self.chat_prompt(messages), max_new_tokens, temperature, sampling)

    def chat_prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        if isinstance(messages, str) or not all(isinstance(message, Mapping) for message in messages):
            raise RequestError("messages are not a list of turns.", 'Give [{"role": "user", "content": "..."}].')
        return tuple(render(messages, self.tokenizer, add_generation_prompt=True).tokens)

    def stream(self, prompt: Sequence[int], sampling: SamplingParams) -> Iterator[Piece]:
        """The answer to a prompt of ids (see `prompt`, `chat_prompt`) in pieces; leaving early frees everything."""
        engine = self.engine(self.alone)
        engine.submit(Request(prompt=tuple(prompt), sampling=sampling))
        while engine.busy:
            for piece in engine.step():
                if piece.error is not None:
                    raise piece.error
                yield piece

    def score(self, text_or_ids: str | Sequence[int]) -> list[float | None]:
        """The log-probability (nats) of each token given all before it; one entry a token.

        Of a text that the begin mark precedes every token has one (the mark itself has no entry). The first of given
        ids, or of a text without the mark, has nothing before it: its entry is None.
        """
        prompt = self.prompt(text_or_ids)
        request = Request(prompt=prompt, sampling=SamplingParams(max_new_tokens=0, prompt_logprobs=0))
        (pieces,) = run(self.engine(self.alone), [request])
        gather(pieces, len(prompt))
        following = [entry.logprob for piece in pieces for entry in piece.prompt_logprobs]
        marked = isinstance(text_or_ids, str) and self.tokenizer.begins_texts
        return [*following] if marked else [None, *following]

    def _answer(
        self, prompt: tuple[int, ...], max_new_tokens: int, temperature: float, sampling: dict[str, Any]
    ) -> Generation:
        named = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        asked = sampling_from({"logprobs": 0} | sampling | named)
        (pieces,) = run(self.engine(self.alone), [Request(prompt=prompt, sampling=asked)])
        return gather(pieces, len(prompt))


def sampling_from(values: dict[str, Any]) -> SamplingParams:
    """SamplingParams from keyword arguments, the FORMS among them; a name that is neither is a RequestError."""
    known = [*FORMS, *(name for name in SamplingParams.__dataclass_fields__ if name != "constraint")]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise RequestError(f"There is no sampling parameter '{unknown[0]}'.", nearest(unknown[0], known))
    form = constraint_of(**{name: value for name, value in values.items() if name in FORMS})
    return SamplingParams(constraint=form, **{name: value for name, value in values.items() if name not in FORMS})
