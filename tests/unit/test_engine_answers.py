"""The engine against the slow oracle, against itself in other company, and at its limits."""

import inspect
import textwrap
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.base.errors import RequestError
from trinity.config.engine import EngineLimits
from trinity.engine.engine import Engine, end_tokens, run
from trinity.engine.request import Generation, Request, SamplingParams, gather
from trinity.engine.runner import CompiledRunner, Runner, runner_for
from trinity.model.generate import continue_greedily
from trinity.model.init import build_model
from trinity.model.transformer import Transformer
from trinity.recipes.table import recipe
from trinity.text.tokenizer import Tokenizer
from trinity.text.train_bpe import train_bpe

STEP_TOKENS = EngineLimits().step_tokens


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([inspect.getsource(textwrap)] * 2, 512)


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = replace(recipe("debug").model, sliding_window=24, max_position_embeddings=1200)
    return build_model(config, 3).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def runner(model: Transformer) -> Runner:
    return runner_for(model)


def answers(engine: Engine, requests: list[Request]) -> list[Generation]:
    return [gather(pieces, len(r.prompt)) for r, pieces in zip(requests, run(engine, requests), strict=True)]


def ask(prompt: list[int], **sampling: object) -> Request:
    return Request(prompt=tuple(prompt), sampling=SamplingParams(**sampling))  # type: ignore[arg-type]


def random_prompt(seed: int, length: int) -> list[int]:
    return torch.randint(32, 512, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("length", [1, 23, 130, STEP_TOKENS + 40])
def test_greedy_equals_the_oracle(model: Transformer, runner: Runner, tokenizer: Tokenizer, length: int) -> None:
    prompt = random_prompt(length, length)
    ends = frozenset({tokenizer.eos_id})
    (answer,) = answers(Engine(runner, tokenizer, ends), [ask(prompt, max_new_tokens=40)])
    assert answer.token_ids == continue_greedily(model, prompt, 40, set(ends))
    assert answer.text == tokenizer.decode(answer.token_ids)
    assert answer.prompt_tokens == length


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12), st.sampled_from([0.0, 0.9])), min_size=2, max_size=5))
def test_an_answer_does_not_depend_on_its_company(
    runner: Runner, tokenizer: Tokenizer, asked: list[tuple[int, int, float]]
) -> None:
    requests = [
        ask(random_prompt(place, length), max_new_tokens=new, temperature=warm, seed=place, logprobs=2)
        for place, (length, new, warm) in enumerate(asked)
    ]
    together = answers(Engine(runner, tokenizer, frozenset(), EngineLimits(max_active=3)), requests)
    alone = [answers(Engine(runner, tokenizer, frozenset()), [request])[0] for request in requests]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    if isinstance(runner, CompiledRunner):  # to the bit, log-probabilities too; the plain one agrees to rounding
        assert together == alone


def test_logprobs_of_answer_and_prompt_are_the_models(model: Transformer, runner: Runner, tokenizer: Tokenizer) -> None:
    prompt = random_prompt(5, STEP_TOKENS + 3)
    engine = Engine(runner, tokenizer, frozenset())
    (pieces,) = run(engine, [ask(prompt, max_new_tokens=4, logprobs=3, prompt_logprobs=1)])
    answer = gather(pieces, len(prompt))
    with torch.inference_mode():
        text = torch.tensor([prompt + answer.token_ids])
        logprobs = model.head(model(text).hidden)[0].log_softmax(-1)
    expected = logprobs[:-1].gather(-1, text[0, 1:, None]).flatten()
    prompt_part = [entry for piece in pieces for entry in piece.prompt_logprobs]
    assert [entry.token_id for entry in prompt_part] == prompt[1:]
    got = torch.tensor([entry.logprob for entry in prompt_part] + answer.logprobs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert [len(top) for top in answer.top_logprobs] == [3] * 4
    assert all(top[0][0] == token for top, token in zip(answer.top_logprobs, answer.token_ids, strict=True))


def test_endings(model: Transformer, runner: Runner, tokenizer: Tokenizer) -> None:
    prompt = random_prompt(8, 20)
    engine = Engine(runner, tokenizer, frozenset())
    (free,) = answers(engine, [ask(prompt, max_new_tokens=30)])
    assert (free.finish_reason, len(free.token_ids)) == ("length", 30)
    end = free.token_ids[10]
    first = free.token_ids.index(end)
    (by_token,) = answers(engine, [ask(prompt, max_new_tokens=30, stop_token_ids=(end,))])
    assert (by_token.token_ids, by_token.finish_reason) == (free.token_ids[:first], "stop")
    (by_end,) = answers(Engine(runner, tokenizer, frozenset({end})), [ask(prompt, max_new_tokens=30)])
    assert by_end.token_ids == by_token.token_ids
    stop = free.text[len(free.text) // 2 :][:5]
    (by_text,) = answers(engine, [ask(prompt, max_new_tokens=30, stop=(stop,))])
    assert (by_text.text, by_text.finish_reason) == (free.text.partition(stop)[0], "stop")
    (longer,) = answers(engine, [ask(prompt, max_new_tokens=30, stop=(free.text + "and more", "x" * 5000))])
    assert (longer.text, longer.finish_reason) == (free.text, "length"), "what was held back comes at the end"
    (nothing,) = answers(engine, [ask(prompt, max_new_tokens=0)])
    assert (nothing.text, nothing.token_ids, nothing.finish_reason) == ("", [], "length")
    assert not engine.busy
    assert engine.kv_bytes() == 0


def test_a_forced_token_and_a_forbidden_one(model: Transformer, runner: Runner, tokenizer: Tokenizer) -> None:
    engine = Engine(runner, tokenizer, frozenset())
    prompt = random_prompt(9, 5)
    (plain, forced) = answers(
        engine, [ask(prompt, max_new_tokens=3), ask(prompt, max_new_tokens=3, logit_bias={77: 100.0})]
    )
    assert forced.token_ids == [77, 77, 77]
    (other,) = answers(engine, [ask(prompt, max_new_tokens=3, logit_bias={plain.token_ids[0]: -100.0})])
    assert plain.token_ids[0] not in other.token_ids


def test_abort_frees_at_once_and_leaves_the_others_alone(runner: Runner, tokenizer: Tokenizer) -> None:
    engine = Engine(runner, tokenizer, frozenset(), EngineLimits(max_active=2))
    requests = [ask(random_prompt(i, 30), max_new_tokens=20) for i in range(4)]
    ids = [engine.submit(request) for request in requests]
    seen = [piece for _ in range(5) for piece in engine.step()]
    for request_id in (ids[0], ids[3]):  # one active, one waiting
        last = engine.abort(request_id)
        assert last is not None
        assert last.finish_reason == "abort"
    assert engine.abort(ids[0]) is None
    assert len(engine.scheduler.active) == 1
    while engine.busy:
        seen += engine.step()
    pieces = [piece for piece in seen if piece.request_id == ids[1]]
    assert gather(pieces, 30) == answers(Engine(runner, tokenizer, frozenset()), [requests[1]])[0]
    assert {piece.request_id for piece in seen if piece.finish_reason} == {ids[1], ids[2]}


def test_context_limits(model: Transformer, runner: Runner, tokenizer: Tokenizer) -> None:
    engine = Engine(runner, tokenizer, frozenset())
    with pytest.raises(RequestError, match=r"1200 tokens.*context holds 1200"):
        engine.submit(ask([40] * 1200))
    (answer,) = answers(engine, [ask([40] * 1198, max_new_tokens=50)])
    assert (len(answer.token_ids), answer.finish_reason) == (2, "length")
    for bad in (ask([]), ask([512]), ask([-1]), ask([40], logit_bias={9999: 1.0})):
        with pytest.raises(RequestError):
            engine.submit(bad)
    assert not engine.busy


def test_damaged_weights_end_the_request_not_the_engine(model: Transformer, tokenizer: Tokenizer) -> None:
    damaged = build_model(model.config, 3).eval().requires_grad_(False)
    damaged.embed_tokens.weight[100] = float("nan")
    engine = Engine(runner_for(damaged), tokenizer, frozenset())
    bad, good = run(engine, [ask([100, 101], max_new_tokens=3), ask([101, 102], max_new_tokens=3)])
    with pytest.raises(RequestError, match="not finite"):
        gather(bad, 2)
    assert len(gather(good, 2).token_ids) == 3
    assert not engine.busy


def test_end_tokens_come_from_tokenizer_and_generation_config(tokenizer: Tokenizer) -> None:
    assert end_tokens(tokenizer, {}) == {tokenizer.eos_id, tokenizer.im_end_id}
    assert end_tokens(tokenizer, {"eos_token_id": 7}) >= {7}
    assert end_tokens(tokenizer, {"eos_token_id": [7, 8]}) >= {7, 8}
