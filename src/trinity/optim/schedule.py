"""The learning rate as a function of tokens seen: warm-up, plateau, linear or cosine decay; a re-warmed second leg."""

import math

from trinity.config.optim import OptimConfig
from trinity.config.phases import ExtensionConfig
from trinity.config.run import RunConfig


def factor_at(tokens: float, run: RunConfig) -> float:
    """Factor on the peak rates after `tokens` tokens of a run: one schedule over all its phases, then the extension's.

    The anneal ends where the steps of train.tokens end, whatever their sizes are.
    """
    if run.extension.tokens and tokens > run.base_end:
        return extension_factor(tokens - run.base_end, run.horizon - run.base_end, run.extension)
    return rate_factor(tokens, run.base_end, run.optim)


def extension_factor(tokens: float, total: int, config: ExtensionConfig) -> float:
    """After `tokens` of an extension of `total`: linear from zero over its warm-up, then down over all the rest.

    Without a warm-up it begins at its highest rate, which is how an anneal to that rate is continued.
    """
    if tokens < config.warmup_tokens:
        return config.high_lr_fraction * tokens / config.warmup_tokens
    rest = max(total - config.warmup_tokens, 1)
    progress = (tokens - config.warmup_tokens) / rest
    return falling(progress, config.high_lr_fraction, config.final_lr_fraction, config.decay)


def rate_factor(tokens: float, total: int, config: OptimConfig) -> float:
    """Factor on the peak rates after `tokens` of `total` tokens, between config.final_lr_fraction and 1.

    Linear from zero over the warm-up, 1 on the plateau, then down over the last `decay_tokens`.
    """
    if tokens < config.warmup_tokens:
        return tokens / config.warmup_tokens
    into = tokens - (total - config.decay_tokens)
    if into <= 0 or config.decay_tokens == 0:
        return 1.0
    return falling(into / config.decay_tokens, 1.0, config.final_lr_fraction, config.decay)


def falling(progress: float, start: float, end: float, shape: str) -> float:
    """From `start` to `end` as progress goes 0 -> 1 (held at the end beyond it), linearly or along half a cosine."""
    progress = min(max(progress, 0.0), 1.0)
    weight = 1 - progress if shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return end + (start - end) * weight


def rewarmed_factor(progress: float, warmup_fraction: float, peak: float = 1.0) -> float:
    """A second leg (fine-tuning, context extension): from 0 to `peak` over the first part, then linearly back to 0."""
    if progress < warmup_fraction:
        return peak * progress / warmup_fraction
    return falling((progress - warmup_fraction) / max(1 - warmup_fraction, 1e-12), peak, 0.0, "linear")
