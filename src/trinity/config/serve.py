"""ServeConfig: how a model is offered to clients, and the defaults of generation."""

from dataclasses import dataclass

from trinity.config.engine import EngineLimits
from trinity.config.knob import knob


@dataclass(frozen=True, kw_only=True)
class ServeConfig(EngineLimits):
    host: str = knob("address to listen on; anything but loopback needs API keys", "127.0.0.1")
    port: int = knob("port to listen on; 0 picks a free one", 8000, low=0, high=65535)
    max_queued: int = knob("requests that may wait; a further one is answered 429", 64, low=0)
    max_new_tokens: int = knob("new tokens when a request names no limit", 256, low=1)
    request_seconds: float = knob("a request still generating after this long is ended", 600.0, low=0.001)

    @classmethod
    def written(cls, name: str) -> str:
        return f"--{name.replace('_', '-')}"
