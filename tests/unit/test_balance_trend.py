"""What the routing's trend alarms at, on histories made for it: flat, noisy, falling, drifting, climbing, dying."""

import json

import pytest
import torch

from trinity.balance.trend import BEFORE, RouterTrend
from trinity.balance.update import smebu

EXPERTS, TOKENS = 16, 4096


def loads(shares: torch.Tensor, step: int) -> torch.Tensor:
    """Counts [L, E] of a batch drawn from shares [L, E]."""
    random = torch.Generator().manual_seed(step)
    drawn = torch.multinomial(shares, TOKENS, replacement=True, generator=random)
    return torch.stack([torch.bincount(row, minlength=EXPERTS) for row in drawn])


def even(layers: int = 2) -> torch.Tensor:
    return torch.full((layers, EXPERTS), 1 / EXPERTS, dtype=torch.float64)


def skewed(violation: float) -> torch.Tensor:
    """Two layers; the first gives its first expert (1 + violation) times an even share."""
    shares = even()
    first = (1 + violation) / EXPERTS
    shares[0] = (1 - first) / (EXPERTS - 1)
    shares[0, 0] = first
    return shares


def heard(shares_of, steps: int, factor: float = 3.0, biases=None) -> list[tuple[int, str]]:
    trend = RouterTrend(factor)
    still = [torch.zeros(EXPERTS)] * 2
    return [
        (step, sentence)
        for step in range(1, steps + 1)
        for _, sentence in trend.observe(loads(shares_of(step), step), biases(step) if biases else still)
    ]


@pytest.mark.parametrize("violation", [0.0, 0.5, 2.0, 6.0])
def test_a_level_that_stays_is_not_alarming_however_high(violation):
    assert heard(lambda _: skewed(violation), 400) == []


def test_a_start_out_of_balance_that_settles_is_not_alarming():
    assert heard(lambda step: skewed(8 * 0.985**step), 500) == []


def test_few_tokens_in_a_step_are_noise_and_not_alarming():
    trend = RouterTrend(3.0)
    for step in range(400):
        counts = loads(even(), step) * 0 + torch.stack(
            [torch.bincount(torch.randint(EXPERTS, (48,)), minlength=EXPERTS) for _ in range(2)]
        )
        assert trend.observe(counts, [torch.zeros(EXPERTS)] * 2) == []


def test_a_sudden_climb_after_a_long_flat_stretch_is_heard_soon_and_named_by_layer():
    found = heard(lambda step: skewed(0.3 if step <= 600 else min(12.0, 0.3 + 0.4 * (step - 600))), 640)
    step, sentence = found[0]
    assert 600 < step <= 620
    assert any("MaxVio of sparse layer 0 rose from" in sentence for _, sentence in found)
    assert not any("layer 1" in sentence or "more layer" in sentence for _, sentence in found)


def test_a_slow_climb_that_no_short_window_shows_is_heard():
    found = heard(lambda step: skewed(0.3 + 0.002 * step), 1500)
    assert found and all("MaxVio of sparse layer 0" in sentence for _, sentence in found)
    assert found[0][0] < 1000
    assert len(found) <= 3, "each further alarm means further decay, not the same again"


def test_experts_that_trade_places_drift_though_maxvio_is_flat():
    def trading(step: int) -> torch.Tensor:
        turns = 0 if step <= 500 else (step - 500) // 15
        busy = torch.tensor([1.6] * 8 + [0.4] * 8, dtype=torch.float64) / EXPERTS
        return torch.stack([busy.roll(turns), even()[0]])

    found = heard(trading, 700)
    assert found and all("routing of sparse layer 0 drifts" in sentence for _, sentence in found)
    assert found[0][0] > 500


def test_experts_that_get_no_more_tokens_are_counted():
    def dying(step: int) -> torch.Tensor:
        shares = even()
        dead = 0 if step <= 200 else min(4, (step - 200) // 40)
        shares[1, : 2 * dead] = 1e-9
        return shares / shares.sum(-1, keepdim=True)

    found = heard(dying, 500)
    assert "2 of 16 experts of sparse layer 1 starve, up from 0" in [sentence for _, sentence in found]
    assert 240 < found[0][0] < 320


def test_biases_that_run_away_are_told_at_every_doubling_only():
    def biases(step: int) -> list[torch.Tensor]:
        away = torch.zeros(EXPERTS)
        away[3] = step / 32
        return [torch.zeros(EXPERTS), away]

    found = heard(lambda _: even(), 1000, biases=biases)
    assert [step for step, _ in found] == [129, 259, 519]
    assert all("selection biases of sparse layer 1" in sentence for _, sentence in found)


def test_balancing_that_works_is_silent_and_one_that_pushes_the_wrong_way_is_not():
    preference = torch.linspace(-0.4, 0.4, EXPERTS)

    def run(rate: float) -> list[str]:
        trend, bias, momentum, said = RouterTrend(3.0), torch.zeros(1, EXPERTS), torch.zeros(1, EXPERTS), []
        for step in range(400):
            bias[0, 0] += 0.05 * (step == 200)  # off the point of balance, which holds even when pushed away from
            counts = (torch.softmax(4 * (preference + bias), -1) * TOKENS).round().to(torch.int64)
            bias, momentum = smebu(bias, momentum, counts, rate if step > 200 else 0.01, 0.5, 2.0)
            said += [sentence for _, sentence in trend.observe(counts, list(bias))]
        return said

    assert run(0.01) == []
    assert any("collapsing" in sentence or "drifts" in sentence for sentence in run(-0.05))


def test_zero_looks_away_and_a_model_without_experts_is_no_trouble():
    assert heard(lambda step: skewed(0.3 if step <= 200 else 12.0), 260, factor=0.0) == []
    assert RouterTrend(3.0).observe(torch.zeros(0, EXPERTS, dtype=torch.int64), []) == []


def test_a_resumed_trend_hears_what_the_unbroken_one_hears():
    def shares(step: int) -> torch.Tensor:
        return skewed(0.3 if step <= 150 else min(12.0, 0.3 + 0.4 * (step - 150)))

    still = [torch.zeros(EXPERTS)] * 2
    whole, first = RouterTrend(3.0), RouterTrend(3.0)
    expected = [whole.observe(loads(shares(step), step), still) for step in range(1, 181)]
    found = [first.observe(loads(shares(step), step), still) for step in range(1, 156)]
    second = RouterTrend(3.0)
    second.load_state(json.loads(json.dumps(first.state())))
    found += [second.observe(loads(shares(step), step), still) for step in range(156, 181)]
    assert found == expected and any(expected)
    assert second.state() == whole.state() and second.figures() == whole.figures()


def test_other_text_is_routed_otherwise_and_is_no_drift_when_it_is_announced():
    def shares(step: int) -> torch.Tensor:
        return skewed(0.1) if step <= 150 else skewed(4.0)

    def told(announced: bool) -> list[str]:
        trend, kinds = RouterTrend(3.0), []
        away = [torch.linspace(0, 5, EXPERTS)] * 2
        for step in range(1, 400):
            if announced and step == 151:
                trend.begin_anew()
            kinds += [kind for kind, _ in trend.observe(loads(shares(step), step), away)]
        return kinds

    assert set(told(announced=False)) == {"collapse", "run-away"}
    assert told(announced=True) == ["run-away"], "what was told of the biases is not told again"


def test_nothing_is_judged_before_there_is_something_to_compare_with():
    trend = RouterTrend(3.0)
    for step in range(1, BEFORE):
        assert trend.observe(loads(skewed(step / 10), step), [torch.full((EXPERTS,), 9.0)] * 2) == []
        assert trend.figures() == {}
