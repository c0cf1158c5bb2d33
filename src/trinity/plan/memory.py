"""Closed-form bytes: weights, training state on one device, and the KV cache. Activations are left to measurement."""

from dataclasses import dataclass

from trinity.config.model import ModelConfig
from trinity.plan.params import count_parameters


@dataclass(frozen=True, kw_only=True)
class KVBytes:
    """KV cache of one sequence: a part that grows with every token, and a part that fills once to the window."""

    per_token: int
    window: int

    def at(self, tokens: int, sliding_window: int) -> int:
        """Bytes held after `tokens` tokens."""
        return self.per_token * tokens + self.window * min(tokens, sliding_window) // sliding_window


def kv_bytes(model: ModelConfig, bytes_per_value: int = 2) -> KVBytes:
    """Keys and values of the global layers grow; those of the local layers stop at the window."""
    layer = 2 * model.num_key_value_heads * model.head_dim * bytes_per_value
    num_global = sum(model.is_global(i) for i in range(model.num_hidden_layers))
    return KVBytes(
        per_token=layer * num_global,
        window=layer * (model.num_hidden_layers - num_global) * model.sliding_window,
    )


def training_state_bytes(model: ModelConfig) -> int:
    """Float32 weights, gradients and optimiser state on one device: Muon keeps one moment, AdamW two."""
    count = count_parameters(model)
    adamw = count.embedding + count.head + count.router + count.norms
    return 4 * (2 * count.total + count.total + adamw)
