"""ServeConfig: how a model is offered to clients, and the defaults of generation."""

from dataclasses import dataclass
from typing import Literal

from trinity.config.knob import Settings, knob


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Settings):
    host: str = knob("address to listen on; anything but loopback needs API keys", "127.0.0.1")
    port: int = knob("port to listen on; 0 picks a free one", 8000, low=0, high=65535)
    max_active: int = knob("requests that generate at once; further ones wait", 8, low=1)
    max_queued: int = knob("requests that may wait; a further one is answered 429", 64, low=0)
    step_tokens: int = knob("tokens read in one step; running answers wait no longer for a long prompt", 512, low=1)
    kv_bytes: int = knob("memory for keys and values; 0: what all requests may need, in half of what is free", 0, low=0)
    kv_dtype: Literal["float32", "bfloat16"] = knob("what keys and values are kept in", "float32")
    window_bytes: int = knob("memory for local layers' windows in the prefix cache", 256 * 2**20, low=0)
    draft_tokens: int = knob("tokens drafted by prompt lookup in each step; 0: none", 0, low=0, high=64)
    max_new_tokens: int = knob("new tokens when a request names no limit", 256, low=1)
    request_seconds: float = knob("a request still generating after this long is ended", 600.0, low=0.001)

    @classmethod
    def written(cls, name: str) -> str:
        return f"--{name.replace('_', '-')}"
