"""Expert use by kind of text, from counts of the tokens that each expert read.

For a layer with E experts, a load p is the share of routed slots each expert took:

    load entropy        H(p) / ln E                    1 when every expert reads equally much
    effective experts   e^H(p)                         that many equally used experts would have this entropy
    MaxVio              E max(p) - 1                   0 when even, E/K - 1 when all tokens choose the same K
    dead experts        experts with p < 0.01 / E      on the text that was read
    divergence          Jensen-Shannon, in bits        0 when two kinds use the experts alike, 1 when they share none

Every finite sample looks less even, and two samples of one text look less alike, than the truth; so the intervals of
these figures are noise-corrected (intervals.bootstrap, 'basic'), and so is the divergence itself ('corrected'): of
two kinds that are routed alike it is near 0, not near the noise. Documents are resampled. Definitions follow OLMoE
(arXiv 2409.02060, section 5) for domain specialisation, and MaxVio follows arXiv 2408.15664.

Shapes: D documents, S resamples, L sparse layers, E experts.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trinity.audit.intervals import Floats, Interval, bootstrap, draw_weights
from trinity.audit.measure import Measure
from trinity.config.audit import AuditConfig

PROBE = "routing"
DEAD_SHARE = 0.01  # of an even share
TOP = 3  # experts named for each kind and layer


def load_shares(counts: Floats) -> Floats:
    """Counts [..., E] as shares that sum to one."""
    return counts / np.maximum(counts.sum(-1, keepdims=True), 1e-300)


def entropy(shares: Floats) -> Floats:
    """Natural entropy over the last dimension."""
    return -(shares * np.log(np.maximum(shares, 1e-300))).sum(-1)


def divergence(first: Floats, second: Floats) -> Floats:
    """Jensen-Shannon divergence in bits over the last dimension, between 0 and 1."""
    middle = entropy((first + second) / 2) - (entropy(first) + entropy(second)) / 2
    return np.clip(middle / np.log(2), 0.0, 1.0)


def routing(expert_tokens: NDArray[np.int64], kinds: Sequence[str], config: AuditConfig) -> list[Measure]:
    """Measures of expert_tokens [D, L, E]: per kind and layer, and between each two kinds. Empty for a dense model."""
    if expert_tokens.shape[1] == 0:
        return []
    counts = {kind: expert_tokens[[k == kind for k in kinds]].astype(float) for kind in sorted(set(kinds))}
    weights = {
        kind: draw_weights(len(mine), config.bootstrap_samples, config.seed, PROBE, kind)
        for kind, mine in counts.items()
    }
    counts["all"], weights["all"] = np.concatenate(list(counts.values())), np.hstack(list(weights.values()))
    found = []
    for kind, mine in counts.items():
        found += _of_kind(mine, weights[kind], kind, config)
    for first, second in combinations([kind for kind in counts if kind != "all"], 2):
        found += _between(counts, weights, first, second, config)
    return found


def _of_kind(counts: Floats, weights: Floats, kind: str, config: AuditConfig) -> list[Measure]:
    experts = counts.shape[-1]
    even = np.log(experts) if experts > 1 else 1.0
    figures: list[tuple[str, str, Callable[[Floats], Floats], tuple[float, float]]] = [
        ("load entropy", "of 1", lambda p: entropy(p) / even, (0.0, 1.0)),
        ("effective experts", "experts", lambda p: np.exp(entropy(p)), (1.0, float(experts))),
        ("MaxVio", "of an even load", lambda p: experts * p.max(-1) - 1, (0.0, experts - 1.0)),
    ]
    found = []
    for name, unit, figure, bounds in figures:
        values = bootstrap(
            lambda w, figure=figure: figure(_weighted_shares(w, counts)),
            weights, config.confidence, method="basic", bounds=bounds,
        )  # fmt: skip
        found += _per_layer(name, unit, {"kind": kind}, values, len(counts))
    dead = bootstrap(
        lambda w: (_weighted_shares(w, counts) < DEAD_SHARE / experts).sum(-1).astype(float), weights, config.confidence
    )
    return found + _per_layer("dead experts", "experts", {"kind": kind}, dead, len(counts))


def _between(
    counts: dict[str, Floats], weights: dict[str, Floats], first: str, second: str, config: AuditConfig
) -> list[Measure]:
    split = len(counts[first])

    def statistic(w: Floats) -> Floats:
        """[S, L + 1]: each layer, then their mean."""
        layers = divergence(
            _weighted_shares(w[:, :split], counts[first]), _weighted_shares(w[:, split:], counts[second])
        )
        return np.concatenate([layers, layers.mean(-1, keepdims=True)], axis=-1)

    values = bootstrap(
        statistic,
        np.hstack([weights[first], weights[second]]),
        config.confidence,
        method="corrected",
        bounds=(0.0, 1.0),
    )
    n = min(split, len(counts[second]))
    pair: dict[str, str | int] = {"kinds": f"{first} | {second}"}
    mean, low, high = (float(x[-1]) for x in values)
    return [
        *_per_layer("divergence", "bits", pair, [x[:-1] for x in values], n),
        Measure(probe=PROBE, name="divergence", of={**pair, "layer": "mean"}, unit="bits",
                interval=Interval(mean, low, high, n), counted="held-out documents"),
    ]  # fmt: skip


def _weighted_shares(weights: Floats, counts: Floats) -> Floats:
    """weights [S, D], counts [D, L, E] -> load shares [S, L, E] of the weighted documents."""
    return load_shares((weights @ counts.reshape(len(counts), counts[0].size)).reshape(len(weights), *counts.shape[1:]))


def _per_layer(name: str, unit: str, of: dict[str, str | int], values: Sequence[Floats], n: int) -> list[Measure]:
    return [
        Measure(probe=PROBE, name=name, of={**of, "layer": layer}, unit=unit, counted="held-out documents",
                interval=Interval(float(value), float(low), float(high), n))
        for layer, (value, low, high) in enumerate(zip(*values, strict=True))
    ]  # fmt: skip


def load_table(expert_tokens: NDArray[np.int64], kinds: Sequence[str], config: AuditConfig) -> list[dict[str, Any]]:
    """The load itself: for each kind and sparse layer the shares [E], their intervals, and the top experts."""
    table = []
    for kind in sorted(set(kinds)):
        counts = expert_tokens[[k == kind for k in kinds]].astype(float)
        weights = draw_weights(len(counts), config.bootstrap_samples, config.seed, PROBE, kind)
        shares, low, high = bootstrap(lambda w, c=counts: _weighted_shares(w, c), weights, config.confidence)
        for layer in range(counts.shape[1]):
            order = np.argsort(-shares[layer], kind="stable")[:TOP]
            table.append({
                "kind": kind, "layer": layer, "shares": shares[layer].tolist(), "low": low[layer].tolist(),
                "high": high[layer].tolist(), "n": len(counts),
                "top": [{"expert": int(e), "times_even": float(shares[layer, e] * shares.shape[-1])} for e in order],
            })  # fmt: skip
    return table
