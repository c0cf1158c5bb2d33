"""Balancing on paper-sized numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trinity.balance.health import measure
from trinity.balance.update import move_biases, sign, smebu, violation
from trinity.config.optim import BalanceConfig

counts = st.lists(st.integers(0, 10_000), min_size=2, max_size=16).map(torch.tensor)


def test_smebu_by_hand():
    """Counts 0, 4, 8: mean 4, violations 1, 0, -1; tanh(2) = 0.9640; the steps already sum to zero."""
    bias, momentum = smebu(torch.zeros(3), torch.zeros(3), torch.tensor([0, 4, 8]), rate=5e-4, beta=0.5, kappa=2.0)
    half_step = 0.5 * 5e-4 * math.tanh(2.0)
    assert momentum.tolist() == pytest.approx([half_step, 0, -half_step], abs=1e-9)
    assert bias.tolist() == pytest.approx([half_step, 0, -half_step], abs=1e-9)
    bias, momentum = smebu(bias, momentum, torch.tensor([4, 4, 4]), rate=5e-4, beta=0.5, kappa=2.0)
    assert momentum.tolist() == pytest.approx([half_step / 2, 0, -half_step / 2], abs=1e-9)
    assert bias.tolist() == pytest.approx([1.5 * half_step, 0, -1.5 * half_step], abs=1e-9)


def test_smebu_centres_before_momentum():
    """Counts 0, 0, 12: violations 1, 1, -2. The centred steps sum to zero, so the biases keep their mean."""
    bias, momentum = smebu(torch.zeros(3), torch.zeros(3), torch.tensor([0, 0, 12]), rate=1.0, beta=0.0, kappa=2.0)
    raw = [math.tanh(2), math.tanh(2), math.tanh(-4)]
    mean = sum(raw) / 3
    assert bias.tolist() == pytest.approx([r - mean for r in raw], abs=1e-6)


def test_the_sign_rule_by_hand():
    bias = sign(torch.tensor([0.0, 0.0, 0.0, 0.0]), torch.tensor([0, 5, 5, 10]), rate=0.001)
    assert bias.tolist() == pytest.approx([0.001, 0, 0, -0.001], abs=1e-9)


def test_the_range_of_violation_is_that_of_the_report():
    """256 experts, 4 chosen: an expert that gets every token violates by -63, an idle one by 1."""
    load = torch.zeros(256, dtype=torch.int64)
    load[:4] = 1000
    assert violation(load).min().item() == pytest.approx(-63)
    assert violation(load).max().item() == pytest.approx(1)


@given(counts, st.sampled_from(["smebu", "sign", "none"]))
def test_no_rule_moves_the_mean_bias_and_all_push_toward_balance(load, rule):
    start = torch.zeros(len(load))
    bias, _ = move_biases(start, torch.zeros(len(load)), load, BalanceConfig(rule=rule))
    assert abs(float(bias.mean())) < 1e-6
    if rule == "none" or load.max() == load.min():
        assert torch.equal(bias, start) or bias.abs().max() < 1e-7
    else:
        assert bias[load.argmax()] <= bias[load.argmin()]


@given(counts, st.integers(1, 1000))
def test_smebu_does_not_depend_on_the_batch_size(load, factor):
    once = smebu(torch.zeros(len(load)), torch.zeros(len(load)), load, 5e-4, 0.5, 2.0)[0]
    many = smebu(torch.zeros(len(load)), torch.zeros(len(load)), load * factor, 5e-4, 0.5, 2.0)[0]
    torch.testing.assert_close(once, many)


def test_smebu_settles_where_sign_keeps_oscillating():
    """A router whose loads follow the biases: SMEBU converges, the sign rule does not."""

    preference = torch.tensor([0.3, -0.1, 0.17])

    def final_wobble(rule: str) -> float:
        config = BalanceConfig(rule=rule, smebu_lambda=0.05, sign_gamma=0.05)
        bias, momentum, seen = torch.tensor([0.51, 0.03, -0.54]), torch.zeros(3), []
        for _ in range(300):
            load = (torch.softmax(4 * bias + preference, -1) * 9000).round().to(torch.int64)
            bias, momentum = move_biases(bias, momentum, load, config)
            seen.append(bias.clone())
        return float(torch.stack(seen[-50:]).diff(dim=0).abs().max())

    assert final_wobble("smebu") < 1e-3 < 0.02 < final_wobble("sign")


def test_health_of_known_loads():
    health = measure(torch.tensor([[10, 10, 10, 10], [40, 0, 0, 0]]), torch.tensor([[0.0] * 4, [3.0, 4.0, 0.0, 0.0]]))
    assert health.max_violation == pytest.approx([0.0, 3.0])
    assert health.load_entropy == pytest.approx(0.5)
    assert health.dead_experts == 3
    assert health.bias_norm == pytest.approx(5.0)
