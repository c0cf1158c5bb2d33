"""Sampling as arithmetic: what each filter keeps, penalties by hand, determinism, and refused values."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.base.errors import RequestError
from trinity.engine.request import SamplingParams
from trinity.engine.sampler import biased, choose, drawn, keep_min_p, keep_top_k, keep_top_p, logprobs_of, penalised

rows = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=40).map(lambda row: torch.tensor(row))


def kept(logits: torch.Tensor) -> set[int]:
    return set(logits.isfinite().nonzero().flatten().tolist())


@given(rows, st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_sufficient_set(logits: torch.Tensor, p: float) -> None:
    probabilities = logits.double().softmax(-1)
    keeps = kept(keep_top_p(logits, p))
    mass = float(probabilities[list(keeps)].sum())
    assert keeps
    assert mass >= p - 1e-5
    if len(keeps) > 1 and p < 1:
        assert mass - float(probabilities[list(keeps)].min()) < p + 1e-5, "one token fewer would have been enough"
    left = set(range(len(logits))) - keeps
    assert not left or max(float(logits[i]) for i in left) <= min(float(logits[i]) for i in keeps)


@given(rows, st.integers(1, 50))
def test_top_k_keeps_the_k_largest(logits: torch.Tensor, k: int) -> None:
    keeps = kept(keep_top_k(logits, k))
    assert len(keeps) == min(k, len(logits))
    assert sorted(logits[list(keeps)].tolist()) == sorted(logits.tolist())[-len(keeps) :]


@given(st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0]), min_size=2, max_size=40), st.integers(1, 50))
def test_of_equals_the_first_are_kept(row: list[float], k: int) -> None:
    logits = torch.tensor([0.25, *row])
    order = logits.argsort(descending=True, stable=True)
    assert torch.equal(keep_top_k(logits, k), logits.index_fill(0, order[k:], -math.inf))
    probabilities = logits[order].softmax(-1)
    within = order[: int((probabilities.cumsum(-1) - probabilities < 0.9).sum())]
    keeps = kept(keep_top_p(logits, 0.9))
    assert abs(len(keeps) - len(within)) <= 1  # sums are rounded
    assert keeps == kept(logits) & set(order[: len(keeps)].tolist())


def test_a_token_without_probability_is_never_drawn() -> None:
    draw = torch.Generator().manual_seed(0)
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.0, 0.5, 0.0])
    assert {drawn(probabilities, draw) for _ in range(500)} == {1, 4}


@given(rows, st.floats(0.0, 1.0))
def test_min_p_keeps_what_is_likely_enough(logits: torch.Tensor, p: float) -> None:
    probabilities = logits.softmax(-1)
    expected = {i for i in range(len(logits)) if float(probabilities[i]) >= p * float(probabilities.max())}
    assert int(logits.argmax()) in kept(keep_min_p(logits, p))
    assert abs(len(kept(keep_min_p(logits, p))) - len(expected)) <= 1  # p and the product are rounded once each


def test_penalties_by_hand() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 1.0])
    repeated = penalised(logits, SamplingParams(repetition_penalty=2.0), prompt=[0], answer=[1])
    assert repeated.tolist() == [1.0, -4.0, 1.0, 1.0]
    sampling = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    assert penalised(logits, sampling, prompt=[0, 0], answer=[2, 2, 3]).tolist() == [2.0, -2.0, 0.0, 0.25]
    assert biased(logits, {1: 10.0, 3: -1.0}).tolist() == [2.0, 8.0, 1.0, 0.0]
    assert logits.tolist() == [2.0, -2.0, 1.0, 1.0], "the logits given are left as they were"


@settings(max_examples=30)
@given(rows, st.integers(0, 2**40))
def test_draws_follow_the_seed_and_the_limits(logits: torch.Tensor, seed: int) -> None:
    def draw(sampling: SamplingParams) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [choose(logits, sampling, [], [], generator) for _ in range(5)]

    loose = SamplingParams(temperature=1.5)
    assert draw(loose) == draw(loose)
    assert draw(SamplingParams()) == [int(logits.argmax())] * 5
    assert draw(SamplingParams(temperature=2.0, top_k=1)) == [int(logits.argsort(descending=True, stable=True)[0])] * 5
    assert len(draw(SamplingParams(temperature=1e-30))) == 5


def test_frequencies_match_the_distribution() -> None:
    logits, draw = torch.tensor([0.0, 1.0, 2.0]), torch.Generator().manual_seed(0)
    counts = torch.bincount(
        torch.tensor([choose(logits, SamplingParams(temperature=0.5), [], [], draw) for _ in range(4000)]), minlength=3
    )
    expected = (logits / 0.5).softmax(-1) * 4000
    assert float(((counts - expected) ** 2 / expected).sum()) < 13.8  # chi-square, 2 degrees of freedom, p = 0.001


def test_logprobs_are_those_of_the_model() -> None:
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    entries = logprobs_of(logits, torch.tensor([1, 2, 3]), top=2)
    for place, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(float(logits[place].log_softmax(-1)[entry.token_id]))
        assert [token for token, _ in entry.top] == logits[place].topk(2).indices.tolist()


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -1.0},
        {"top_k": -1},
        {"max_new_tokens": -1},
        {"max_new_tokens": 2.5},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 3.0},
        {"logit_bias": {3: 101.0}},
        {"stop": ("",)},
        {"stop": "text"},
        {"logprobs": 21},
        {"logprobs": True},
        {"prompt_logprobs": "all"},
        {"max_new_tokens": None},
        {"max_new_tokens": True},
        {"top_k": 2.0},
        {"temperature": "hot"},
        {"temperature": None},
        {"top_p": None},
        {"seed": 0.5},
        {"stop": None},
        {"stop": [1]},
        {"stop_token_ids": 3},
        {"stop_token_ids": [-1]},
        {"logit_bias": [1]},
        {"logit_bias": {"a": 1.0}},
        {"logit_bias": {3: None}},
    ],
)
def test_values_out_of_range_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(values)).split("_")[0]) as caught:
        SamplingParams(**values)
    assert caught.value.remedy and "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers():
    asked = SamplingParams(max_new_tokens=np.int64(3), temperature=np.float32(0.5), logit_bias={np.int64(2): 1})
    assert asked.max_new_tokens == 3 and asked.temperature == 0.5


def test_what_more_than_the_likeliest_asks_for():
    assert SamplingParams(stop=("x",), seed=3, top_p=0.5).plain
    for asked in ({"temperature": 0.1}, {"logit_bias": {3: 1.0}}, {"repetition_penalty": 1.1},
                  {"presence_penalty": 0.1}, {"frequency_penalty": 0.1}):  # fmt: skip
        assert not SamplingParams(**asked).plain
