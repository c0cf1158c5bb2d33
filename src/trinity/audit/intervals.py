"""Intervals: how far a number may move if other documents had been drawn.

A document, not a token, is what was sampled: tokens of one document resemble each other, so every interval here
resamples whole documents. Shares of successes use Wilson's score interval instead, which stays sensible at 0 of n and
n of n.

Sources: Efron and Tibshirani (1993) ch. 13 (percentile) and ch. 10 (bias); Davison and Hinkley (1997) eq. 5.6
(basic); Wilson (1927); Newcombe (1998) method 10 for a difference of shares.
"""

from collections.abc import Callable
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trinity.base.seeds import named_seed

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    value: float
    low: float
    high: float
    n: int  # documents (or trials) behind the number


def draw_weights(documents: int, samples: int, seed: int, *names: str | int) -> Floats:
    """How often each document occurs in each resample: [S, D], every row sums to D.

    Equal seeds and names give equal draws; groups of documents that are compared need different names.
    """
    generator = np.random.default_rng(named_seed(seed, "bootstrap", *names))
    weights = np.zeros((samples, documents))
    for row in weights:
        row += np.bincount(generator.integers(0, documents, documents), minlength=documents)
    return weights


def bootstrap(
    statistic: Callable[[Floats], Floats],
    weights: Floats,
    confidence: float,
    *,
    method: Literal["percentile", "basic", "corrected"] = "percentile",
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[Floats, Floats, Floats]:
    """(value, low, high) of a statistic of weighted documents, each of the statistic's own shape.

    `statistic` maps weights [S, D] to values [S, ...]. 'percentile' gives the plain value between the resamples'
    quantiles. The others are for statistics that sampling noise pushes one way (entropy, maximum, divergence), where
    the resamples show how much noise adds: 'basic' mirrors their quantiles around the value, and 'corrected' also
    takes their mean excess off the value. All are clipped to `bounds`, and low <= value <= high.
    """
    plain = statistic(np.ones((1, weights.shape[1])))[0]
    resampled = statistic(weights)
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
    if method != "percentile":
        low, high = 2 * plain - high, 2 * plain - low
    value = 2 * plain - resampled.mean(0) if method == "corrected" else plain
    value, low, high = (np.clip(x, *bounds) for x in (value, low, high))
    return value, np.minimum(low, value), np.maximum(high, value)


def ratio_interval(parts: Floats, wholes: Floats, weights: Floats, confidence: float) -> Interval:
    """sum(parts) / sum(wholes) over documents ([D] each), such as bits per byte, or a mean with wholes of 1."""
    value, low, high = bootstrap(lambda w: (w @ parts) / np.maximum(w @ wholes, 1e-300), weights, confidence)
    return Interval(float(value), float(low), float(high), len(parts))


def wilson(successes: int, trials: int, confidence: float) -> Interval:
    """Wilson's score interval of a share. Without a trial anything from 0 to 1 is possible."""
    if trials == 0:
        return Interval(float("nan"), 0.0, 1.0, 0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    reach = z * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5 / (1 + z * z / trials)
    low = 0.0 if successes == 0 else middle - reach
    high = 1.0 if successes == trials else middle + reach
    return Interval(share, max(0.0, low), min(1.0, high), trials)


def difference_of_shares(first: Interval, second: Interval) -> Interval:
    """first - second for two independent shares with Wilson intervals (Newcombe's method 10); n is the smaller."""
    value = first.value - second.value
    low = value - ((first.value - first.low) ** 2 + (second.high - second.value) ** 2) ** 0.5
    high = value + ((first.high - first.value) ** 2 + (second.value - second.low) ** 2) ** 0.5
    return Interval(value, max(-1.0, low), min(1.0, high), min(first.n, second.n))
