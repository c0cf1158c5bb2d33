"""Floating-point operations of a training step: what the model needs, and what this implementation computes.

    model FLOPs      forward 2 x parameters multiplied + 4 x query width x keys seen, a token; backward twice that
    computed FLOPs   the same with the keys that are read, scores made again in backward, and recomputed blocks' forward
    Newton-Schulz    steps x (4 m^2 n + 2 m^3) for each m x n matrix, once an optimiser step

Model FLOPs are what efficiencies are quoted in; the roofline counts computed ones. Masks of documents inside a row
are not credited: rows count as one document, as is usual. Checked against torch's FlopCounterMode.
"""

from functools import lru_cache

from trinity.config.model import ModelConfig
from trinity.config.optim import OptimConfig
from trinity.plan.layout import Kernels
from trinity.plan.params import count_parameters, layer_kinds, layer_patterns


def keys_seen(length: int, window: int | None) -> float:
    """Keys that a query sees on average over a row of `length` tokens, its own included."""
    width = length if window is None else min(window, length)
    return width - width * (width - 1) / (2 * length)


def keys_read(length: int, window: int | None) -> int:
    """Keys that each query is multiplied with under masks (model/attend.py): windows by blocks of two, else all."""
    return 2 * window if window is not None and length >= 2 * window else length


def attention_flops(model: ModelConfig, length: int, read: bool = False) -> float:
    """Scores and weighted sums of all layers, forward, for one token of a row of `length` tokens."""
    count = keys_read if read else keys_seen
    keys = sum(
        kind.layers * count(length, None if kind.is_global else model.sliding_window) for kind in layer_patterns(model)
    )
    return 4 * model.num_attention_heads * model.head_dim * keys


def forward_flops(model: ModelConfig, length: int, read: bool = False) -> float:
    """One token's forward pass, output head included."""
    return 2 * count_parameters(model).multiplied + attention_flops(model, length, read)


def model_flops(model: ModelConfig, length: int) -> float:
    """Forward and backward for one token: what efficiencies are quoted in."""
    return 3 * forward_flops(model, length)


def computed_flops(model: ModelConfig, length: int, remat: str, kernels: Kernels) -> float:
    """Forward and backward for one token as computed here; remat=block repeats the forward of all but the head.

    The kernels for CPUs and GPUs read the keys that are seen and no others. Backward makes the scores again.
    """
    read = kernels == "plain"
    forward = forward_flops(model, length, read)
    again = forward - 2 * count_parameters(model).head if remat == "block" else 0
    return 3 * forward + again + attention_flops(model, length, read) / 2


@lru_cache
def newton_schulz_flops(model: ModelConfig, optim: OptimConfig) -> tuple[int, int]:
    """(dense matrices, routed experts): orthogonalising each of them once."""
    dense = routed = 0
    for layers, weights in layer_kinds(model):
        for weight in weights:
            if weight.by_muon:
                short, long = sorted(weight.shape[-2:])
                matrices = weight.values // (short * long)
                cost = layers * matrices * optim.newton_schulz_steps * (4 * short**2 * long + 2 * short**3)
                dense, routed = dense + cost * (weight.role == "matrix"), routed + cost * (weight.role == "expert")
    return dense, routed
