"""Bits per byte by kind of text, on documents the model was never trained on.

    bits per byte = sum over tokens of -log2 p(token | what came before in its document) / UTF-8 bytes of those tokens

<bos> is given and costs nothing; the end mark is neither predicted nor counted as bytes. Bytes, not tokens, stand
below the line, so models with different tokenizers compare. How long documents are read is said in reading.py.
"""

import math
from collections.abc import Sequence

import numpy as np

from trinity.audit.intervals import Floats, draw_weights, ratio_interval
from trinity.audit.measure import Measure
from trinity.config.audit import AuditConfig

PROBE = "bits_per_byte"


def bits_per_byte(nats: Floats, text_bytes: Floats, kinds: Sequence[str], config: AuditConfig) -> list[Measure]:
    """One measure a kind, and 'all' over every document read. nats, text_bytes: [D]."""
    bits = nats / math.log(2)
    kind_of = np.array(kinds)
    found = []
    for kind in [*sorted(set(kinds)), "all"]:
        mine = np.ones(len(kinds), bool) if kind == "all" else kind_of == kind
        weights = draw_weights(int(mine.sum()), config.bootstrap_samples, config.seed, PROBE, kind)
        interval = ratio_interval(bits[mine], text_bytes[mine], weights, config.confidence)
        found.append(
            Measure(
                probe=PROBE,
                name="bits per byte",
                of={"kind": kind},
                interval=interval,
                unit="bits/byte",
                counted="held-out documents",
            )  # fmt: skip
        )
    return found
