"""EngineLimits: how much an engine takes on: requests at once, tokens a step, memory for keys and values."""

from dataclasses import dataclass
from typing import Literal

from trinity.config.knob import Settings, knob

KvDtype = Literal["float32", "bfloat16"]
KvChoice = Literal["auto", "float32", "bfloat16"]  # auto: float32 beside weights of float32, else bfloat16


@dataclass(frozen=True, kw_only=True)
class EngineLimits(Settings):
    max_active: int = knob("requests that generate at once; further ones wait", 8, low=1)
    step_tokens: int = knob("tokens read in one step; running answers wait no longer for a long prompt", 512, low=1)
    kv_bytes: int = knob("memory for keys and values; 0: what all requests may need, in half of what is free", 0, low=0)
    kv_dtype: KvChoice = knob(
        "what keys and values are kept in; auto: float32 beside such weights, else bfloat16", "auto"
    )
    window_bytes: int = knob("memory for local layers' windows in the prefix cache", 256 * 2**20, low=0)
    draft_tokens: int = knob("tokens drafted by prompt lookup in each step; 0: none", 0, low=0, high=64)
