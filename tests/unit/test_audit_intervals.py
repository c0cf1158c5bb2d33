"""Intervals cover what they promise to cover, are the same for the same seed, and stay in range."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity.audit.intervals import bootstrap, difference_of_shares, draw_weights, ratio_interval, wilson
from trinity.audit.routing import divergence, load_shares


def binomial(n: int, p: float) -> np.ndarray:
    """P(k of n), k = 0..n."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(n + 1)
    return np.exp(logs[n] - logs[k] - logs[n - k] + k * np.log(p) + (n - k) * np.log1p(-p))


@pytest.mark.parametrize("n", [20, 40, 100])
def test_wilson_covers_a_known_share_about_as_often_as_it_says(n):
    intervals = [wilson(k, n, 0.95) for k in range(n + 1)]
    coverage = []
    for p in np.linspace(0.02, 0.98, 49):
        inside = np.array([i.low <= p <= i.high for i in intervals])
        coverage.append(float((binomial(n, p) * inside).sum()))
    assert 0.94 < np.mean(coverage) < 0.97
    assert min(coverage) > 0.83


def test_wilson_at_the_edges():
    assert wilson(0, 40, 0.95)[:2] == (0.0, 0.0) and wilson(0, 40, 0.95).high == pytest.approx(0.0876, abs=1e-4)
    assert wilson(40, 40, 0.95).high == 1.0
    nothing = wilson(0, 0, 0.95)
    assert (nothing.low, nothing.high, nothing.n) == (0.0, 1.0, 0)


@given(st.integers(1, 200), st.data(), st.floats(0.5, 0.999))
def test_wilson_holds_the_share_inside_zero_and_one(trials, data, confidence):
    successes = data.draw(st.integers(0, trials))
    interval = wilson(successes, trials, confidence)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1


def test_the_bootstrap_covers_a_known_ratio():
    generator = np.random.default_rng(1)
    weights, truth, hits, rounds = draw_weights(40, 400, 0, "test"), 2.0, 0, 400
    for _ in range(rounds):
        sizes = generator.lognormal(5, 0.8, 40)
        bits = sizes * truth * generator.lognormal(-0.045, 0.3, 40)  # mean one
        interval = ratio_interval(bits, sizes, weights, 0.95)
        hits += interval.low <= truth <= interval.high
    assert 0.88 <= hits / rounds <= 0.97


def test_the_corrected_divergence_of_one_distribution_covers_zero_and_of_two_covers_their_own():
    generator = np.random.default_rng(2)
    first = generator.dirichlet(np.full(16, 20.0))
    second = np.roll(first, 5) * 0.3 + first * 0.7
    weights = np.hstack([draw_weights(30, 300, 0, "a"), draw_weights(30, 300, 0, "b")])
    for other, truth in ((first, 0.0), (second, float(divergence(first, second)))):
        hits, values, plain = 0, [], []
        for _ in range(100):
            # Documents differ among themselves: each has a mixture of its own around its kind's.
            counts = np.stack([
                generator.multinomial(80, generator.dirichlet(kind * 200)) for kind in [first] * 30 + [other] * 30
            ])  # fmt: skip

            def statistic(w, counts=counts):
                return divergence(load_shares(w[:, :30] @ counts[:30]), load_shares(w[:, 30:] @ counts[30:]))

            value, low, high = bootstrap(statistic, weights, 0.95, method="corrected", bounds=(0.0, 1.0))
            hits += low <= truth <= high
            values.append(value)
            plain.append(float(statistic(np.ones((1, 60)))[0]))
        assert hits >= 88
        assert abs(np.mean(values) - truth) < abs(np.mean(plain) - truth)


def test_equal_seeds_and_names_draw_equally_and_others_do_not():
    same = draw_weights(10, 5, 3, "a")
    assert (same == draw_weights(10, 5, 3, "a")).all()
    assert (same.sum(1) == 10).all()
    assert (same != draw_weights(10, 5, 3, "b")).any()
    assert (same != draw_weights(10, 5, 4, "a")).any()


def test_a_difference_of_shares_agrees_with_the_published_example():
    """Newcombe (1998), table II, contrast (a): 56/70 against 48/80 has the score interval 0.0524 to 0.3339."""
    interval = difference_of_shares(wilson(56, 70, 0.95), wilson(48, 80, 0.95))
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
