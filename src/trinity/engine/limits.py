"""Room for keys and values, as much as limits and memory have it."""

import torch

from trinity.base.errors import UsageError
from trinity.config.engine import EngineLimits
from trinity.config.model import ModelConfig
from trinity.engine.pages import PAGE, Pools, kv_bytes_per_token, pages_for
from trinity.kernels.heap import available_bytes

SHARE = 0.5  # of the memory that is free, which keys and values may take where nobody says how much


def pools_for(config: ModelConfig, limits: EngineLimits, device: torch.device) -> Pools:
    """Room for keys and values as the limits have it. UsageError where it would not hold even one page a request."""
    each = max(1, kv_bytes_per_token(config, limits.kv_dtype))
    wanted = limits.max_active * pages_for(config.max_position_embeddings)
    free = available_bytes(device)
    if limits.kv_bytes:
        pages = min(wanted, limits.kv_bytes // (each * PAGE))
        if free is not None and pages * each * PAGE > free:
            raise UsageError(
                f"kv_bytes asks for {pages * each * PAGE / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free.",
                "Give less, or free memory.",
            )
    else:
        pages = wanted if free is None else min(wanted, int(SHARE * free) // (each * PAGE))
    if pages < limits.max_active:
        raise UsageError(
            f"There is room for {pages} pages of 64 tokens ({each * PAGE / 2**20:.1f} MiB each) among "
            f"{limits.max_active} requests.",
            "Raise kv_bytes, lower max_active, or free memory.",
        )
    return Pools(config, pages, limits.max_active, limits.step_tokens, device, limits.kv_dtype)
