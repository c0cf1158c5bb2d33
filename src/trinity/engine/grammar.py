"""Answers held to a form: which tokens a JSON schema, a regular expression or a Lark grammar lets come next.

llguidance does the parsing, byte by byte, so that a token may cross any boundary of the grammar and a character may be
spread over tokens. What it knows of the vocabulary is `Tokenizer.piece`, id by id; control marks have no bytes and are
never allowed. Where an answer may end is decided here: at the end tokens of engine and request, and only where the
grammar is complete.

With `after_think` the text up to and with the first `</think>` is free, whether that is one token or several; it too
holds whole characters alone, and cannot end the answer.
"""

import json
import re
from concurrent.futures import Executor, Future
from functools import lru_cache

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from torch import Tensor

from trinity.base.errors import RequestError
from trinity.engine.request import Constraint, SamplingParams
from trinity.text.tokenizer import Tokenizer

MOST_BYTES = 65_536  # of a constraint: half a second to compile, at worst
MOST_DEPTH = 100  # of objects and lists in a JSON schema
WHITESPACE = r"[ \n\r\t]{1,64}"  # between the parts of a JSON value: a model may indent, not pad for ever
BAN = -100  # a logit_bias of this much or less forbids a token outright under a constraint
THINKING = "start: thinking @answer\nthinking[lazy]: /(?s:.*)<\\/think>/"  # lazy: the first </think> ends it
NAMES = {"json_schema": "The JSON schema", "regex": "The regular expression", "lark": "The grammar"}


class ConstraintError(RequestError):
    """A constraint that cannot be held to, from the start or from some place in the answer on."""


class Matcher:
    """One answer under its constraint. Copies are independent; all calls but `mask` and `accept` leave it as it is."""

    def __init__(self, state: LLMatcher, control: int, ends: list[int], banned: list[int]) -> None:
        self._state = state
        self._control = control  # the token that llguidance takes for the end
        self._ends = ends
        self._banned = banned
        self._prepared: Future[np.ndarray] | None = None

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return self._state.is_accepting()

    @property
    def finished(self) -> bool:
        """Whether it can only end here."""
        return self._state.is_stopped() and self.complete

    def prepare(self, pool: Executor, rows: int) -> None:
        """Have another thread find what the next `mask` needs, which must be the next call.

        It runs beside the model: llguidance computes without Python's lock.
        """
        self._prepared = pool.submit(self._allowed, rows)

    def mask(self, row: Tensor) -> None:
        """Set logits [V] to -inf, in place, where the constraint has no such token here. ConstraintError if all are."""
        prepared, self._prepared = self._prepared, None
        allowed = self._allowed(len(row)) if prepared is None else prepared.result()
        row.masked_fill_(~torch.from_numpy(allowed).to(row.device), float("-inf"))

    def _allowed(self, rows: int) -> np.ndarray:
        bits = np.frombuffer(self._state.compute_bitmask(), np.uint8)
        allowed = np.zeros(rows, np.bool_)  # rows of the model without a token stay False
        known = np.unpackbits(bits, bitorder="little")[:rows]
        allowed[: len(known)] = known
        allowed[self._control] = False
        allowed[self._ends] = self.complete
        if not allowed.any():
            raise self._stuck()
        allowed[self._banned] = False
        if not allowed.any():
            raise ConstraintError(
                "logit_bias forbids every token that the constraint allows next.", f"Give some of them more than {BAN}."
            )
        return allowed

    def accept(self, token: int) -> None:
        """Go on behind a token that `mask` allowed and that does not end the answer."""
        if not self._state.consume_token(token):
            raise self._stuck()

    def rollback(self, count: int) -> None:
        """Take back the last `count` accepted tokens."""
        done = self._state.rollback(count)
        assert done, f"cannot take back {count} tokens: {self._state.get_error()}"

    def copy(self) -> "Matcher":
        return Matcher(self._state.deep_copy(), self._control, self._ends, self._banned)

    def forced(self) -> list[int]:
        """Tokens of the text that alone can follow, as the tokenizer writes it: drafts that cost nothing to propose."""
        return self._state.compute_ff_tokens()

    def _stuck(self) -> RequestError:
        complaint = first_line(self._state.get_error())
        if complaint and not complaint.startswith("NoExtension"):
            what = f"The constraint became too complex for this answer: {complaint}."
            return ConstraintError(
                what, "See that every rule can end, and use fewer alternatives, optional properties and repetitions."
            )
        return ConstraintError(
            "The constraint allows no token at this place of the answer.",
            "Change it so that every beginning can be ended.",
        )


def matcher_of(sampling: SamplingParams, tokenizer: Tokenizer, end_ids: frozenset[int], rows: int) -> Matcher | None:
    """The matcher of an answer that begins, None without a constraint; `rows`: of the logits.

    RequestError where the constraint cannot be compiled, or no token may come first.
    """
    if sampling.constraint is None:
        return None
    ends = [id for id in {*end_ids, *sampling.stop_token_ids} if id < rows]
    banned = [id for id, bias in sampling.logit_bias.items() if bias <= BAN]
    matcher = Matcher(compiled(tokenizer, sampling.constraint).deep_copy(), tokenizer.eos_id, ends, banned)
    matcher.mask(torch.zeros(rows))
    return matcher


@lru_cache(maxsize=4)
def vocabulary_of(tokenizer: Tokenizer) -> LLTokenizer:
    """The vocabulary as llguidance takes it: a second's work with 200,000 tokens, which engines share."""

    class Pieces:
        eos_token_id, bos_token_id = tokenizer.eos_id, None
        tokens = [tokenizer.piece(id) for id in range(tokenizer.vocab_size)]

        def __call__(self, text: bytes) -> list[int]:
            return tokenizer.encode(text.decode())

    return LLTokenizer(TokenizerWrapper(Pieces()))


@lru_cache(maxsize=64)
def compiled(tokenizer: Tokenizer, constraint: Constraint) -> LLMatcher:
    """The state before the first token, to be copied. May be called from any thread. Raises ConstraintError."""
    answer = _grammar(constraint) | {"name": "answer"}
    state = _state(tokenizer, [answer], constraint)
    if not state.is_accepting() and not _any_text(state, tokenizer):
        raise ConstraintError(f"{NAMES[constraint.kind]} allows no answer at all.", "Change it so that some text fits.")
    if not constraint.after_think:
        return state
    return _state(tokenizer, [{"lark_grammar": THINKING}, answer], constraint)


def _state(tokenizer: Tokenizer, grammars: list[dict[str, object]], constraint: Constraint) -> LLMatcher:
    limits = LLParserLimits(verbose_errors=False)
    state = LLMatcher(vocabulary_of(tokenizer), json.dumps({"grammars": grammars}), log_level=0, limits=limits)
    # A warning is a keyword that would be passed over.
    for complaint in (state.get_error(), *state.get_grammar_warnings()):
        if complaint:
            raise _refusal(NAMES[constraint.kind], complaint)
    return state


def _any_text(state: LLMatcher, tokenizer: Tokenizer) -> bool:
    bits = np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8), bitorder="little")
    bits[tokenizer.eos_id] = 0
    return bool(bits.any())


def _grammar(constraint: Constraint) -> dict[str, object]:
    """A constraint as one grammar of llguidance. ConstraintError for one too large, or no JSON object."""
    name, text = NAMES[constraint.kind], constraint.text
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise ConstraintError(f"{name} holds half of a surrogate pair.", "Write the whole character.") from error
    if size > MOST_BYTES:
        raise ConstraintError(f"{name} has {size} bytes; {MOST_BYTES} are allowed.", "Shorten it.")
    if constraint.kind == "lark":
        return {"lark_grammar": text}
    if constraint.kind == "regex":
        return json.loads(LLMatcher.grammar_from_regex(text))["grammars"][0]
    try:
        schema = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else f"not JSON: {error}"
        raise ConstraintError(f"{name} is {what}.", "Give a JSON schema as text or as an object.") from error
    if not isinstance(schema, dict):
        raise ConstraintError(f"{name} is not an object.", 'Any JSON object is {"type": "object"}.')
    if (depth := _depth(schema)) > MOST_DEPTH:
        raise ConstraintError(f"{name} is nested {depth} deep; {MOST_DEPTH} are allowed.", "Name parts under $defs.")
    try:
        made = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITESPACE})
    except ValueError as error:
        raise _refusal(name, str(error)) from error
    return json.loads(made)["grammars"][0]


def _depth(value: object) -> int:
    """Levels of objects and lists, counted level by level: a hostile text may nest deeper than Python recurses."""
    depth, level = 0, [value]
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
    return depth


def _refusal(name: str, complaint: str) -> ConstraintError:
    """llguidance's complaint as a sentence that names the keyword, or what it could not read."""
    unsupported = re.search(r"Unimplemented keys: \[(.*?)\]", complaint)
    if unsupported:
        keys = unsupported[1].replace('"', "'")
        return ConstraintError(
            f"{name} uses {keys}, which cannot be enforced here.", "Leave it out and check the finished answer for it."
        )
    if "oneOf constraints" in complaint:
        return ConstraintError(
            f"{name} uses 'oneOf' with alternatives that may both hold, which cannot be enforced here.", "Write anyOf."
        )
    if "Unsatisfiable schema: " in complaint:
        return ConstraintError(f"{name} allows no answer: {first_line(complaint)}.", "Change that part.")
    return ConstraintError(f"{name} cannot be used: {first_line(complaint)}.", "Change that part of it.")


def first_line(complaint: str) -> str:
    """What llguidance found, without the picture of the text that it draws around."""
    if complaint.startswith("panic"):
        return "its compiler failed on it"
    drawn = re.search(r"^error: (.*)$", complaint, re.MULTILINE)
    line = drawn[1] if drawn else complaint.partition("\n")[0]
    line = line.removeprefix("Unsatisfiable schema: ").rpartition("(in regex): ")[2]
    return re.sub(r"^(?:at )?(\d+)\((\d+)\): ", r"line \1, column \2: ", line).strip().rstrip(".")
