"""Verbatim extraction of training text, by how often it occurred, beside held-out text as a control.

A passage of P + S tokens is taken from a random place of a document. The model is given the first P; the passage
counts as extracted when its greedy continuation is the true S tokens, all of them (Carlini et al. 2023, arXiv
2202.07646).

The continuation need not be generated: as long as greedy decoding has reproduced the text, its past is the text. So
it first leaves the text exactly where the likeliest next token, given the true past, is not the true one, and one
forward pass over the passage shows that place. (Tested against token-by-token generation.)

Held-out passages drawn the same way show what is merely predictable: boilerplate is completed without ever being
seen. Only the excess over this control speaks of memory.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trinity.audit.intervals import Interval, bootstrap, difference_of_shares, draw_weights, ratio_interval, wilson
from trinity.audit.measure import Measure
from trinity.audit.reading import BATCH_TOKENS, Watch
from trinity.base.seeds import named_seed
from trinity.config.audit import AuditConfig
from trinity.model.transformer import Transformer

PROBE = "memorisation"
CONTROL = "held-out"
STRATA = (("1", 1, 1), ("2-3", 2, 3), ("4-7", 4, 7), ("8+", 8, None))  # name, fewest and most copies


class Stratum(NamedTuple):
    name: str
    passages: NDArray[np.int64]  # [n, P + S]


def stratum_of(copies: int) -> str:
    """The stratum of a text that occurs `copies` times in the corpus."""
    return next(name for name, low, high in STRATA if copies >= low and (high is None or copies <= high))


def cut_passage(ids: NDArray[Any], tokens: int, seed: int, name: str) -> NDArray[Any]:
    """A stretch of `tokens` ids from a seeded place that depends on the document's name alone."""
    start = named_seed(seed, PROBE, name) % (len(ids) - tokens + 1)
    return ids[start : start + tokens]


@torch.no_grad()
def verbatim_lengths(model: Transformer, passages: NDArray[np.int64], prefix: int, watch: Watch) -> NDArray[np.int64]:
    """How many tokens of each passage's suffix greedy decoding reproduces before it first errs: [n, P + S] -> [n]."""
    rows = max(1, BATCH_TOKENS // passages.shape[1])
    device = model.lm_head.weight.device
    found = []
    for start in range(0, len(passages), rows):
        batch = torch.from_numpy(passages[start : start + rows]).to(device)
        hidden = model(batch[:, :-1]).hidden[:, prefix - 1 :]  # [n, S, D]
        right = torch.stack([model.head(h).argmax(-1) for h in hidden]) == batch[:, prefix:]
        found.append(right.long().cumprod(1).sum(1).cpu())
        watch("asking for training text", min(start + rows, len(passages)) * passages.shape[1], passages.size)
    return torch.cat(found).numpy() if found else np.zeros(0, np.int64)


def memorisation(model: Transformer, strata: Sequence[Stratum], config: AuditConfig, watch: Watch) -> list[Measure]:
    """Extracted share, mean verbatim length, and both as excess over the control, which is the stratum CONTROL."""
    strata = [stratum for stratum in strata if len(stratum.passages)]
    if not strata:
        return []
    together = verbatim_lengths(model, np.concatenate([s.passages for s in strata]), config.prefix_tokens, watch)
    lengths = dict(zip((s.name for s in strata), np.split(together, np.cumsum([len(s.passages) for s in strata])[:-1])))
    shares = {
        name: wilson(int((length == config.suffix_tokens).sum()), len(length), config.confidence)
        for name, length in lengths.items()
    }
    found = []
    for name, length in lengths.items():
        found.append(_measure("extracted verbatim", name, shares[name], "share"))
        weights = draw_weights(len(length), config.bootstrap_samples, config.seed, PROBE, name)
        mean = ratio_interval(length.astype(float), np.ones(len(length)), weights, config.confidence)
        found.append(_measure("verbatim length", name, mean, "tokens"))
        if name != CONTROL and CONTROL in lengths:
            excess = difference_of_shares(shares[name], shares[CONTROL])
            found.append(_measure("extracted beyond control", name, excess, "share"))
            longer = _difference_of_means(length, lengths[CONTROL], config, name)
            found.append(_measure("verbatim length beyond control", name, longer, "tokens"))
    return found


def _difference_of_means(
    first: NDArray[np.int64], second: NDArray[np.int64], config: AuditConfig, name: str
) -> Interval:
    """Mean of first - mean of second, both resampled."""
    split, samples = len(first), config.bootstrap_samples
    weights = np.hstack([
        draw_weights(split, samples, config.seed, PROBE, name),
        draw_weights(len(second), samples, config.seed, PROBE, CONTROL),
    ])  # fmt: skip
    value, low, high = bootstrap(
        lambda w: w[:, :split] @ first / split - w[:, split:] @ second / len(second), weights, config.confidence
    )
    return Interval(float(value), float(low), float(high), min(len(first), len(second)))


def _measure(name: str, copies: str, interval: Interval, unit: str) -> Measure:
    return Measure(probe=PROBE, name=name, of={"copies": copies}, interval=interval, unit=unit, counted="passages")
