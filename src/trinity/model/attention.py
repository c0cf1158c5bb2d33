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
        q = self.q_norm(self._heads(self.q_proj(x))).transpose(1, 2)  # [B, H, T, C]
        k = self.k_norm(self._heads(self.k_proj(x))).transpose(1, 2)  # [B, J, T, C]
        v = self._heads(self.v_proj(x)).transpose(1, 2)
        if self.window is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        out = attend(self.layer, q, k, v, self.window).transpose(1, 2).flatten(-2)
        return self.o_proj(out * self.gate_proj(x).sigmoid())

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))
