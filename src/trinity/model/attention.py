"""Attention of one AFMoE layer: grouped queries, per-head QK norm, output gate; only local layers rotate."""

from torch import Tensor, nn

from trinity.config.model import ModelConfig
from trinity.model.attend import Attend
from trinity.model.layers import Linear, RMSNorm, rotate


class Attention(nn.Module):
    """o_proj(attend(q, k, v) * sigmoid(gate_proj(x))), the gate as wide as all query heads together."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.window = None if config.is_global(layer) else config.sliding_window
        query_width, key_width = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        self.q_proj = Linear(config.hidden_size, query_width)
        self.k_proj = Linear(config.hidden_size, key_width)
        self.v_proj = Linear(config.hidden_size, key_width)
        self.o_proj = Linear(query_width, config.hidden_size)
        self.gate_proj = Linear(config.hidden_size, query_width)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """x: [B, T, D] -> [B, T, D]. `angles` are the rotary cosines and sines of the positions."""
        q, k, v = self.heads(x, angles)
        return self.merged(x, attend(self.layer, q, k, v, self.window))

    def heads(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, T, D] -> queries [B, H, T, C], keys and values [B, J, T, C]."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        return (q, k, v) if self.window is None else (rotate(q, angles), rotate(k, angles), v)

    def merged(self, x: Tensor, out: Tensor) -> Tensor:
        """What the heads read, [B, H, T, C], through the gate of x: [B, T, D]."""
        return self.o_proj(out.transpose(1, 2).flatten(-2) * self.gate_proj(x).sigmoid())
