"""What a caller asks for and gets: sampling parameters, requests, pieces of an answer as they appear, generations."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from trinity.base.errors import RequestError

FinishReason = Literal["stop", "length", "abort", "error"]
MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Constraint:
    """The form of a whole answer: a JSON schema, a regular expression, or a grammar in Lark's notation."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    after_think: bool = False  # hold it only behind the first </think>; what comes before is free


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and when to end. A value outside its range is a RequestError that names it.

    Order: logit_bias, penalties, temperature, top_k, top_p, min_p. Log-probabilities are the model's own, before that.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0  # 0: the most likely token, exactly; no randomness
    top_k: int = 0  # keep this many most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set of tokens that holds this much probability
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the likeliest
    repetition_penalty: float = 1.0  # divides (multiplies, when negative) logits of tokens in prompt or answer
    presence_penalty: float = 0.0  # subtracted once from tokens of the answer
    frequency_penalty: float = 0.0  # subtracted for each occurrence in the answer
    logit_bias: dict[int, float] = field(default_factory=dict)  # token id -> added to its logit
    seed: int | None = None  # None draws a fresh one
    stop: tuple[str, ...] = ()  # the answer ends before the first of these texts
    stop_token_ids: tuple[int, ...] = ()  # the answer ends before these tokens, beside the model's own end tokens
    constraint: Constraint | None = (
        None  # the form of the answer (engine/grammar.py); end tokens only where it is whole
    )
    logprobs: int | None = None  # None: none; n: of each chosen token and of the n likeliest beside it
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise RequestError("stop is one string.", "Give the stop strings as a list.")
        if not isinstance(self.stop, Sequence) or not all(isinstance(text, str) for text in self.stop):
            raise RequestError(f"stop is {self.stop!r}.", "Give a list of strings.")
        if not isinstance(self.stop_token_ids, Collection):
            raise RequestError(f"stop_token_ids is {self.stop_token_ids!r}.", "Give a list of token ids.")
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias is {self.logit_bias!r}.", "Give a dictionary: token id to what is added.")
        _demand("max_new_tokens", self.max_new_tokens, 0, math.inf, whole=True)
        _demand("temperature", self.temperature, 0, 100)
        _demand("top_k", self.top_k, 0, math.inf, whole=True)
        _demand("top_p", self.top_p, 0, 1, above=True)
        _demand("min_p", self.min_p, 0, 1)
        _demand("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        _demand("presence_penalty", self.presence_penalty, -2, 2)
        _demand("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None:
            _demand("seed", self.seed, -math.inf, math.inf, whole=True)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _demand(name, getattr(self, name), 0, MOST_TOP_LOGPROBS, whole=True)
        for token in (*self.stop_token_ids, *self.logit_bias):
            _demand("A token of stop_token_ids or logit_bias", token, 0, math.inf, whole=True)
        for token, bias in self.logit_bias.items():
            _demand(f"logit_bias of token {token}", bias, -100, 100)
        if any(not text for text in self.stop):
            raise RequestError("A stop string is empty.", "An empty text stands everywhere; leave it out.")

    @property
    def plain(self) -> bool:
        """Whether the next token is the likeliest by the model's own logits."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return self.temperature == 0 and not penalties and not self.logit_bias


def constraint_of(
    json_schema: dict[str, Any] | str | None = None,
    regex: str | None = None,
    grammar: str | None = None,
    after_think: bool = False,
) -> Constraint | None:
    """The constraint that keyword arguments ask for, None for none; RequestError for two at once."""
    asked = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise RequestError(f"{given[0]} and {given[1]} are both given.", "An answer has one form: leave one out.")
    if not given:
        if after_think:
            raise RequestError("after_think is given without a form.", f"Add one of {', '.join(asked)}.")
        return None
    (name,), text = given, asked[given[0]]
    if name == "json_schema" and not isinstance(text, str):
        try:
            text = json.dumps(text, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            remedy = "Give a dictionary or a text; of a pydantic class, its model_json_schema()."
            raise RequestError(f"json_schema is not JSON: {error}.", remedy) from error
    if not isinstance(text, str):
        raise RequestError(f"{name} is {type(text).__name__}.", "It must be a text.")
    return Constraint("lark" if name == "grammar" else name, text, bool(after_think))  # type: ignore[arg-type]


def _demand(name: str, value: float, low: float, high: float, above: bool = False, whole: bool = False) -> None:
    """RequestError unless low <= value <= high (low < value with `above`); NaN and infinity never pass."""
    if not isinstance(value, Integral if whole else Real) or isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}.", f"It must be a {'whole ' if whole else ''}number.")
    if not low <= value <= high or value == math.inf or (above and value == low):
        reach = f"above {low}" if above else f"at least {low}"
        reach += f" and at most {high}" if high != math.inf else ""
        raise RequestError(f"{name} is {value}.", f"It must be {reach}.")


@dataclass(frozen=True, kw_only=True)
class Request:
    prompt: tuple[int, ...]  # token ids
    sampling: SamplingParams
    client: str = ""  # whose it is: clients get equal shares of the engine
    cache_salt: str = ""  # texts share what was read of them only under one salt


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability (nats) given everything before it; `top` holds the likeliest, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one step added to one answer. Text may lag behind tokens: what could begin a stop string is held back."""

    request_id: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # one a token where asked for
    prompt_logprobs: tuple[
        TokenLogprob, ...
    ] = ()  # of the prompt's second token on; sent once, when the prompt is read
    cached_tokens: int = 0  # of the prompt, not read again because a text before began with them
    finish_reason: FinishReason | None = None  # on the last piece
    error: RequestError | None = None  # with finish_reason 'error'


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A whole answer. A stop string or end token is not part of the text; an end token is not in token_ids either."""

    text: str
    token_ids: list[int]  # the new ones
    logprobs: list[float]  # of each new token, in nats; empty unless asked for
    top_logprobs: list[tuple[tuple[int, float], ...]]  # the likeliest tokens at each place, best first
    finish_reason: FinishReason
    prompt_tokens: int


def gather(pieces: list[Piece], prompt_tokens: int) -> Generation:
    """Put the pieces of one answer together. Raises the error that ended it, if one did."""
    last = pieces[-1]
    if last.error is not None:
        raise last.error
    assert last.finish_reason is not None, "the last piece of an answer says why it ended"
    logprobs = [entry for piece in pieces for entry in piece.logprobs]
    return Generation(
        text="".join(piece.text for piece in pieces),
        token_ids=[token for piece in pieces for token in piece.token_ids],
        logprobs=[entry.logprob for entry in logprobs],
        top_logprobs=[entry.top for entry in logprobs],
        finish_reason=last.finish_reason,
        prompt_tokens=prompt_tokens,
    )
