"""Answers held to a form: against oracles that know no parser, through a random model, at their ends and limits."""

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random
from threading import Semaphore
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.base.errors import RequestError
from trinity.ckpt.opened import StoredModel
from trinity.ckpt.weights import HeldWeights
from trinity.config.model import ModelConfig
from trinity.engine.engine import Engine, run
from trinity.engine.grammar import ConstraintError, Matcher, matcher_of
from trinity.engine.loaded import LoadedModel
from trinity.engine.pages import Pools
from trinity.engine.request import Constraint, Generation, Piece, Request, SamplingParams, constraint_of, gather
from trinity.engine.runner import Output, Rows, runner_for
from trinity.model.init import build_model
from trinity.model.transformer import Transformer
from trinity.text.train_bpe import train_bpe

ROWS = 456  # of the model; the tokenizer has fewer, so that some rows have no token
TEXT = 'é€🙂 {"a": [1, 22]} </think>{"a": "é€"} ab aba cab -12 3.5 true false null ' * 4
TOKENIZER = train_bpe([TEXT], 400)
END = TOKENIZER.eos_id
LINE = tuple(TOKENIZER.encode("ab aba"))
BYTE = {piece[0]: id for id in range(400) if len(piece := TOKENIZER.piece(id)) == 1}
BLANKS = {id: -100.0 for id in range(TOKENIZER.vocab_size) if TOKENIZER.piece(id)[:1] in (b" ", b"\n", b"\r", b"\t")}


@pytest.fixture(scope="module")
def model(tiny_config: ModelConfig) -> Transformer:
    config = replace(tiny_config, vocab_size=ROWS, max_position_embeddings=1000, num_hidden_layers=2)
    return build_model(config, 3).eval().requires_grad_(False)


def ask(constraint: Constraint | None, **sampling: Any) -> Request:
    values = {"max_new_tokens": 120, "temperature": 1.0, "seed": 1} | sampling
    return Request(prompt=LINE, sampling=SamplingParams(constraint=constraint, **values))


def answers(model: Transformer, *requests: Request, ends: frozenset[int] = frozenset({END})) -> list[Generation]:
    engine = Engine(runner_for(model), TOKENIZER, ends)
    return [gather(pieces, len(LINE)) for pieces in run(engine, list(requests))]


def matcher(constraint: Constraint, **sampling: Any) -> Matcher:
    made = matcher_of(SamplingParams(constraint=constraint, **sampling), TOKENIZER, frozenset({END}), ROWS)
    assert made is not None
    return made


def allowed(of: Matcher) -> set[int]:
    row = torch.arange(float(ROWS))
    of.mask(row)
    kept = row.isfinite().nonzero().flatten()
    assert torch.equal(row[kept], kept.float()), "what is allowed keeps its logit"
    return set(kept.tolist())


# A regular expression of bounded length, with every text it matches: (expression, texts).
Language = tuple[str, frozenset[str]]
letters = st.sampled_from(["a", "b", "é", "€", "🙂", "1", "{", '"', ">", "</"]).map(
    lambda text: (re.escape(text), frozenset({text}))
)


def _either(two: tuple[Language, Language]) -> Language:
    return f"(?:{two[0][0]}|{two[1][0]})", two[0][1] | two[1][1]


def _both(two: tuple[Language, Language]) -> Language:
    return two[0][0] + two[1][0], frozenset(a + b for a, b in product(two[0][1], two[1][1]))


def _maybe(one: Language) -> Language:
    return f"(?:{one[0]})?", one[1] | {""}


languages = st.recursive(
    letters,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(_either), st.tuples(inner, inner).map(_both), inner.map(_maybe)
    ),
    max_leaves=5,
)


def by_oracle(texts: frozenset[str], before: bytes) -> set[int]:
    """The tokens behind `before` that begin or complete some text, and the end token where one is complete."""
    pieces = ((id, TOKENIZER.piece(id)) for id in range(TOKENIZER.vocab_size))
    rests = [text.encode()[len(before) :] for text in texts if text.encode().startswith(before)]
    found = {id for id, piece in pieces if piece and any(rest.startswith(piece) for rest in rests)}
    return found | ({END} if b"" in rests else set())


@given(languages, st.integers(0, 2**32))
def test_masks_equal_an_oracle_that_knows_all_texts(language: Language, seed: int) -> None:
    expression, texts = language
    state, before, draw = matcher(Constraint("regex", expression)), b"", Random(seed)
    while True:
        expected = by_oracle(texts, before)
        found = allowed(state)
        if found != expected:  # the text that alone can follow is written as the tokenizer writes it
            assert len({text.encode()[len(before)] for text in texts if text.encode().startswith(before)}) == 1
            assert list(found) == state.forced()[:1] and found < expected
        assert state.complete == (END in expected)
        assert state.finished == (expected == {END})
        if expected <= {END}:
            break
        token = draw.choice(sorted(found - {END}))
        assert set(state.forced()[:1]) <= found
        state.accept(token)
        before += TOKENIZER.piece(token)
    assert before.decode() in texts


@given(languages, st.integers(0, 2**32))
def test_behind_thinking_the_same_masks_hold(language: Language, seed: int) -> None:
    """However </think> is cut into tokens, also where a token goes on into the answer."""
    expression, texts = language
    state, draw = matcher(Constraint("regex", expression, after_think=True)), Random(seed)
    ways = [[TOKENIZER.id_of("</think>")], TOKENIZER.encode("</think>"), [*map(BYTE.__getitem__, b"</think>")]]
    free = {id for id in range(TOKENIZER.vocab_size) if TOKENIZER.piece(id).isascii() and TOKENIZER.piece(id)}
    goes_on = {id for id in free if TOKENIZER.piece(id).partition(b"</think>")[2]}
    assert free - goes_on <= allowed(state)
    for token in [*TOKENIZER.encode("é {</thin 🙂 <think>"), *(ending := draw.choice(ways))[:-1]]:
        state.accept(token)
        assert END not in allowed(state) and not state.complete
    last = TOKENIZER.piece(ending[-1])
    beyond = {
        id: piece[len(last) :] for id in free if (piece := TOKENIZER.piece(id)).startswith(last) and piece != last
    }
    fitting = {id for id, rest in beyond.items() if any(text.encode().startswith(rest) for text in texts)}
    assert allowed(state) & beyond.keys() == fitting
    state.accept(ending[-1])
    assert allowed(state) == allowed(matcher(Constraint("regex", expression)))


@given(languages, st.integers(0, 2**32), st.integers(0, 9))
def test_what_is_taken_back_was_never_there(language: Language, seed: int, back: int) -> None:
    state, draw = matcher(Constraint("regex", language[0])), Random(seed)
    copy, seen = state.copy(), [allowed(state)]
    while choices := sorted(seen[-1] - {END}):
        state.accept(draw.choice(choices))
        seen.append(allowed(state))
    back = min(back, len(seen) - 1)
    state.rollback(back)
    assert allowed(state) == seen[-1 - back]
    assert allowed(copy) == seen[0]


scalars = st.sampled_from(
    [
        {"type": "integer", "minimum": -3, "maximum": 120},
        {"type": "string", "maxLength": 3},
        {"type": "string", "pattern": "^[ab]{1,3}é?$"},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["é€", 7, None]},
        {"const": [1, {"a": "🙂"}]},
    ]
)


def _object(parts: list[tuple[dict[str, Any], bool]]) -> dict[str, Any]:
    names = [f"{'aéb'[place]}{place}" for place in range(len(parts))]
    return {
        "type": "object",
        "properties": {name: schema for name, (schema, _) in zip(names, parts, strict=True)},
        "required": [name for name, (_, needed) in zip(names, parts, strict=True) if needed],
        "additionalProperties": False,
    }


schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(st.tuples(inner, st.booleans()), max_size=3).map(_object),
        inner.map(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 2}),
        st.lists(inner, min_size=2, max_size=2).map(lambda two: {"anyOf": two}),
    ),
    max_leaves=4,
)


def holds(schema: dict[str, Any], value: Any) -> bool:
    """Whether a value meets a schema of `schemas`: every keyword by hand."""
    if "anyOf" in schema:
        return any(holds(part, value) for part in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kinds = {"integer": int, "string": str, "boolean": bool, "null": type(None), "object": dict, "array": list}
    if type(value) is not kinds[schema["type"]]:
        return False
    if isinstance(value, dict):
        known = schema["properties"]
        inside = all(name in known and holds(known[name], part) for name, part in value.items())
        return inside and set(schema["required"]) <= set(value)
    if isinstance(value, list):
        return 1 <= len(value) <= 2 and all(holds(schema["items"], part) for part in value)
    if isinstance(value, str):
        return len(value) <= schema.get("maxLength", 9) and bool(re.search(schema.get("pattern", ""), value))
    return "minimum" not in schema or schema["minimum"] <= value <= schema["maximum"]


@settings(max_examples=10)
@given(schemas, st.integers(0, 2**32))
def test_every_answer_meets_its_schema(model: Transformer, schema: dict[str, Any], seed: int) -> None:
    form = constraint_of(schema)
    requests = [ask(form, seed=seed), ask(form, seed=seed + 1, logit_bias=BLANKS), ask(form, temperature=0)]
    for answer in answers(model, *requests):
        if answer.finish_reason == "stop":
            assert holds(schema, json.loads(answer.text)), answer.text
        assert answer.text == TOKENIZER.decode(answer.token_ids)


def test_most_answers_are_whole(model: Transformer) -> None:
    """So that the property above is not about answers that the limit of tokens cut."""
    form = constraint_of(_object([({"type": "integer", "maximum": 99, "minimum": 0}, True), ({"type": "null"}, True)]))
    whole = answers(model, *(ask(form, seed=seed, logit_bias=BLANKS) for seed in range(8)))
    assert [answer.finish_reason for answer in whole] == ["stop"] * 8


@pytest.mark.parametrize("expression", ["[é€🙂]{3}", r"(ab|1{2,3}-)+", r"[^a-z]{2,5}", "", r"[0-9]+\.[a-c1]{2}"])
@pytest.mark.parametrize("thinks", [False, True])
def test_answers_match_their_expression(model: Transformer, expression: str, thinks: bool) -> None:
    form = constraint_of(regex=expression, after_think=thinks)
    bias = {TOKENIZER.id_of("</think>"): 6.0} if thinks else {}
    requests = [ask(form, seed=seed, logit_bias=bias, max_new_tokens=300) for seed in range(4)]
    found = answers(model, *requests)
    assert found == [answers(model, request)[0] for request in requests], "alone as in company, and repeatable"
    whole = [answer.text for answer in found if answer.finish_reason == "stop"]
    assert len(whole) > 1
    assert all(re.fullmatch(expression, text.partition("</think>")[2] if thinks else text) for text in whole)


def test_an_answer_ends_where_its_form_is_whole(model: Transformer) -> None:
    wish = {END: 100.0}
    two, by_stop_id, exact, cut, free = answers(
        model,
        ask(constraint_of(regex="a{2,9}"), logit_bias=wish),
        ask(constraint_of(regex="a{2,9}"), logit_bias={77: 100.0}, stop_token_ids=(77,)),
        ask(constraint_of(regex="ab1"), max_new_tokens=3),
        ask(constraint_of(regex="b{50}"), max_new_tokens=4),
        ask(None, logit_bias=wish),
    )
    assert (two.text, two.finish_reason) == ("aa", "stop")
    assert (by_stop_id.text, by_stop_id.finish_reason) == ("aa", "stop")
    assert (exact.text, exact.finish_reason) == ("ab1", "stop")
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 4)
    assert free.text == ""
    (without_ends,) = answers(model, ask(constraint_of(regex="ab1")), ends=frozenset())
    assert (without_ends.text, without_ends.finish_reason) == ("ab1", "stop")


def test_masks_are_found_while_the_model_reads(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all answers that a step goes on with: here it does not end before they are."""
    engine = Engine(runner_for(model), TOKENIZER, frozenset({END}))
    masks, found, read = Semaphore(0), Matcher._allowed, engine.runner.read

    def counted(self: Matcher, rows: int) -> np.ndarray:
        try:
            return found(self, rows)
        finally:
            masks.release()

    def patient(rows: list[Rows], pools: Pools) -> Output:
        for one in rows:
            assert not one.wanted or masks.acquire(timeout=60), "no mask while the model reads"
        return read(rows, pools)

    asked = [ask(constraint_of(regex="[ab]{3}"), seed=seed) for seed in range(3)]
    expected = answers(model, *asked)
    for request in asked:
        engine.submit(request)
    monkeypatch.setattr(Matcher, "_allowed", counted)
    monkeypatch.setattr(engine.runner, "read", patient)
    pieces: dict[int, list[Piece]] = {}
    while engine.busy:
        for piece in engine.step():
            pieces.setdefault(piece.request_id, []).append(piece)
    assert [gather(of_one, len(LINE)) for of_one in pieces.values()] == expected


def test_logprobs_stay_the_models(model: Transformer) -> None:
    held, free = answers(model, ask(constraint_of(regex="[ab]1"), logprobs=5), ask(None, logprobs=5))
    assert held.top_logprobs[0] == free.top_logprobs[0]
    assert held.token_ids != free.token_ids


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uses 'uniqueItems'"),
        ({"json_schema": {"properties": {"a": {"not": {}}}, "x-guidance": {"lenient": True}}}, "uses 'not'"),
        ({"json_schema": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}, "'oneOf'"),
        ({"json_schema": {"type": "string", "format": "haiku"}}, "haiku"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 2}}, "allows no answer"),
        ({"json_schema": {"$ref": "#"}}, "allows no answer"),
        ({"json_schema": "{"}, "is not JSON"),
        ({"json_schema": "[" * 3000}, "nested too deeply"),
        ({"json_schema": '{"a":' * 101 + "1" + "}" * 101}, "is nested 101 deep"),
        ({"json_schema": "[]"}, "is not an object"),
        ({"json_schema": {"title": "a" * 70_000}}, "65536 are allowed"),
        ({"json_schema": {"const": "\ud800"}}, "surrogate"),
        ({"json_schema": {"const": {1}}}, "model_json_schema"),
        ({"regex": "(a"}, "expression cannot be used: unclosed group"),
        ({"regex": "(?=a)b"}, "look-ahead"),
        ({"regex": r"[^\s\S]"}, "allows no answer"),
        ({"regex": 3}, "must be a text"),
        ({"grammar": "start: B"}, 'line 1, column 8: unknown name: "B"'),
        ({"grammar": 'start: <|im_start|> "a"'}, "compiler failed"),
        ({"grammar": 'start: start "a"'}, "allows no answer"),
        ({"regex": "a", "grammar": 'start: "a"'}, "both given"),
        ({"after_think": True}, "without a form"),
    ],
)
def test_a_form_that_cannot_be_kept_is_refused_at_once(model: Transformer, asked: dict[str, Any], named: str) -> None:
    for think in [{}] if len(asked) > 1 or "after_think" in asked else [{}, {"after_think": True}]:
        with pytest.raises(RequestError, match=re.escape(named)) as caught:
            Engine(runner_for(model), TOKENIZER, frozenset({END})).check(ask(constraint_of(**asked, **think)))
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".") and caught.value.remedy


def test_a_bias_against_all_that_is_allowed_is_refused(model: Transformer) -> None:
    bias = {id: -100.0 for id in range(ROWS) if TOKENIZER.piece(id)[:1] == b"a"}
    with pytest.raises(ConstraintError, match="^logit_bias forbids every token"):
        Engine(runner_for(model), TOKENIZER, frozenset({END})).check(ask(constraint_of(regex="ab"), logit_bias=bias))


def test_a_dead_end_ends_that_answer_alone(model: Transformer) -> None:
    dead = constraint_of(grammar='start: "1" NOTHING\nNOTHING: /[^\\s\\S]/')
    vast = constraint_of({"type": "object", "properties": {f"p{place}": {"type": "null"} for place in range(600)}})
    endless = constraint_of(grammar='start: "a" start')
    requests = [ask(dead), ask(constraint_of(regex="ab1")), ask(vast), ask(endless)]
    ends = [pieces[-1] for pieces in run(Engine(runner_for(model), TOKENIZER, frozenset()), requests)]
    assert [end.finish_reason for end in ends] == ["error", "stop", "error", "error"]
    assert "no token at this place" in str(ends[0].error)
    assert all("too complex" in str(end.error) and "every rule can end" in str(end.error) for end in ends[2:])


def test_the_keywords_of_python(model: Transformer) -> None:
    about: dict[str, Any] = {"name": "little", "folder": Path(), "generation": {}, "lineage": {}}
    weights = HeldWeights(model.state_dict())
    opened = StoredModel(config=model.config, weights=weights, tokenizer=TOKENIZER, load_balance_coeff=0.0, **about)
    loaded = LoadedModel(opened, runner_for(model))
    assert loaded.generate("ab", regex="1{2}").text == "11"
    assert loaded.generate("ab", json_schema={"const": 7}).text == "7"
    messages = [{"role": "user", "content": "ab"}]
    assert loaded.chat(messages, grammar='start: "ca" "b"').text == "cab"
    thought = loaded.generate("ab", regex="1", after_think=True, logit_bias={TOKENIZER.id_of("</think>"): 100.0})
    assert thought.text == "</think>1"
    with pytest.raises(RequestError, match="Did you mean 'json_schema'"):
        loaded.generate("ab", json_shema={})
