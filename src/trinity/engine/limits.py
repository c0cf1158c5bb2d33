"""How much an engine takes on: requests at once, tokens a step, memory for keys and values."""

from dataclasses import dataclass, fields

import torch

from trinity.base.errors import UsageError
from trinity.base.memory import free_bytes
from trinity.config.model import ModelConfig
from trinity.engine.pages import KV_DTYPES, PAGE, KvDtype, Pools, kv_bytes_per_token, pages_for

SHARE = 0.5  # of the memory that is free, which keys and values may take where nobody says how much


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    max_active: int = 8  # requests that are answered at once
    step_tokens: int = 512  # read in one step: answers wait no longer for a long prompt than for these
    kv_bytes: int = 0  # of keys and values in global layers; 0: what all requests may need, in half of free memory
    kv_dtype: KvDtype = "float32"  # of keys and values; bfloat16 rounds them, and takes half the memory
    window_bytes: int = 256 * 2**20  # for windows of local layers in the prefix cache
    draft_tokens: int = 0  # proposed by prompt lookup for each token; 0: none

    def __post_init__(self) -> None:
        if self.kv_dtype not in KV_DTYPES:
            raise UsageError(f"kv_dtype '{self.kv_dtype}' is not offered.", f"Choose {' or '.join(KV_DTYPES)}.")
        for field in fields(self):
            if field.name == "kv_dtype":
                continue
            least = int(field.name in ("max_active", "step_tokens"))
            if getattr(self, field.name) < least:
                raise UsageError(f"{field.name} is {getattr(self, field.name)}.", f"It must be at least {least}.")


def limits_of(settings: object) -> EngineLimits:
    """Those of a configuration that has fields of these names."""
    return EngineLimits(**{field.name: getattr(settings, field.name) for field in fields(EngineLimits)})


def pools_for(config: ModelConfig, limits: EngineLimits, device: torch.device) -> Pools:
    """Room for keys and values as the limits have it. UsageError where it would not hold even one page a request."""
    each = max(1, kv_bytes_per_token(config, limits.kv_dtype))
    wanted = limits.max_active * pages_for(config.max_position_embeddings)
    free = memory_free(device)
    if limits.kv_bytes:
        pages = min(wanted, limits.kv_bytes // (each * PAGE))
        if pages * each * PAGE > free:
            raise UsageError(
                f"kv_bytes asks for {pages * each * PAGE / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free.",
                "Give less, or free memory.",
            )
    else:
        pages = min(wanted, int(SHARE * free) // (each * PAGE))
    if pages < limits.max_active:
        raise UsageError(
            f"There is room for {pages} pages of 64 tokens ({each * PAGE / 2**20:.1f} MiB each) among "
            f"{limits.max_active} requests.",
            "Raise kv_bytes, lower max_active, or free memory.",
        )
    return Pools(config, pages, limits.max_active, limits.step_tokens, device, limits.kv_dtype)


def memory_free(device: torch.device) -> int:
    """Bytes that a process may still take there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = free_bytes()
    return 2**62 if free is None else free
