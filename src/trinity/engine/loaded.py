"""A model in the hand: `trinity.load(path)`, then logits, generate, score, chat.

    import trinity
    m = trinity.load("path/to/model")
    print(m.generate("def fibonacci(n):").text)

A text begins as the model's tokenizer has it, here and in transformers and vLLM: with the begin mark for a model that
was trained here, whose documents began with it. Token ids are taken as they are.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trinity.base.errors import RequestError, UsageError, nearest
from trinity.ckpt.opened import OpenedModel, open_model
from trinity.config.engine import EngineLimits
from trinity.config.model import ModelConfig
from trinity.engine.engine import Engine, end_tokens, run
from trinity.engine.request import Generation, Piece, Request, SamplingParams, constraint_of, gather
from trinity.engine.runner import Runner, logits_of, runner_for
from trinity.kernels.compiled import is_loaded
from trinity.text.chat import Message, render

KINDS = ("float32", "bfloat16", "int8", "int4")
ALONE = EngineLimits(max_active=1, window_bytes=0)  # one request, nothing kept for another
FORMS = ("json_schema", "regex", "grammar", "after_think")  # keywords of constraint_of


def load(path: Path | str, dtype: str = "float32") -> "LoadedModel":
    """A Hugging Face folder or a run folder, ready to be asked. dtype: 'float32', 'bfloat16', 'int8' or 'int4'.

    That is what weights are kept in; what is computed is float32 on a CPU. Router, norms and selection bias stay in
    float32 in any. CheckpointError where the folder is not a whole model.
    """
    if dtype not in KINDS:
        raise UsageError(f"dtype '{dtype}' is not offered.", f"Choose one of {', '.join(KINDS)}.")
    few = dtype in ("int8", "int4")
    if few and not is_loaded():
        raise UsageError(f"{dtype} needs the compiled kernels.", "Install g++, or use dtype 'bfloat16'.")
    opened = open_model(path, "bfloat16" if few else dtype)
    return LoadedModel(opened, runner_for(opened.model, dtype))


class LoadedModel:
    """Opened weights and the calls that use them. Not for use by several threads at once; `serve` is."""

    def __init__(self, opened: OpenedModel, runner: Runner) -> None:
        self.name = opened.name
        self.generation = opened.generation
        self.tokenizer = opened.tokenizer
        self.runner = runner  # the weights it was made of are not kept
        self.end_ids = end_tokens(opened.tokenizer, opened.generation)

    @property
    def config(self) -> ModelConfig:
        return self.runner.config

    def engine(self, limits: EngineLimits | None = None) -> Engine:
        """A fresh engine over these weights."""
        return Engine(self.runner, self.tokenizer, self.end_ids, limits)

    def prompt(self, text_or_ids: str | Sequence[int]) -> tuple[int, ...]:
        """The tokens the model reads for a text (begin mark first, if the tokenizer adds one) or for ids (as given)."""
        if isinstance(text_or_ids, str):
            mark = (self.tokenizer.bos_id,) if self.tokenizer.begins_texts else ()
            return (*mark, *self.tokenizer.encode(text_or_ids))
        return tuple(int(token) for token in text_or_ids)

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
        return logits_of(self.runner, ids.tolist())

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
        return tuple(render(messages, self.tokenizer, add_generation_prompt=True).tokens)

    def stream(self, prompt: Sequence[int], sampling: SamplingParams) -> Iterator[Piece]:
        """The answer to a prompt of ids (see `prompt`, `chat_prompt`) in pieces; leaving early frees everything."""
        engine = self.engine(ALONE)
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
        (pieces,) = run(self.engine(ALONE), [request])
        gather(pieces, len(prompt))
        following = [entry.logprob for piece in pieces for entry in piece.prompt_logprobs]
        marked = isinstance(text_or_ids, str) and self.tokenizer.begins_texts
        return [*following] if marked else [None, *following]

    def _answer(
        self, prompt: tuple[int, ...], max_new_tokens: int, temperature: float, sampling: dict[str, Any]
    ) -> Generation:
        named = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        asked = sampling_from({"logprobs": 0} | sampling | named)
        (pieces,) = run(self.engine(ALONE), [Request(prompt=prompt, sampling=asked)])
        return gather(pieces, len(prompt))


def sampling_from(values: dict[str, Any]) -> SamplingParams:
    """SamplingParams from keyword arguments, the FORMS among them; a name that is neither is a RequestError."""
    known = [*FORMS, *(name for name in SamplingParams.__dataclass_fields__ if name != "constraint")]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise RequestError(f"There is no sampling parameter '{unknown[0]}'.", nearest(unknown[0], known))
    form = constraint_of(**{name: value for name, value in values.items() if name in FORMS})
    return SamplingParams(constraint=form, **{name: value for name, value in values.items() if name not in FORMS})
