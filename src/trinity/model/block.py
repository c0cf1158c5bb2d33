"""One layer: sandwich norms around attention and around the feed-forward, dense or sparse."""

from torch import Tensor, nn

from trinity.config.model import ModelConfig
from trinity.model.attend import Attend
from trinity.model.attention import Attention
from trinity.model.dispatch import Dispatch
from trinity.model.experts import MixtureOfExperts
from trinity.model.layers import RMSNorm, SwiGLU
from trinity.model.router import Routing


class Block(nn.Module):
    """x + norm2(sublayer(norm1(x))), for attention and then for the feed-forward."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(width, eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.pre_mlp_layernorm = RMSNorm(width, eps)
        self.mlp = MixtureOfExperts(config) if config.is_sparse(layer) else SwiGLU(width, config.intermediate_size)
        self.post_mlp_layernorm = RMSNorm(width, eps)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend, dispatch: Dispatch
    ) -> tuple[Tensor, Routing | None]:
        """x: [B, T, D] -> ([B, T, D], the layer's Routing or None in a dense layer)."""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), angles, attend))
        normed, routing = self.pre_mlp_layernorm(x), None
        if isinstance(self.mlp, MixtureOfExperts):
            out, routing = self.mlp(normed, dispatch)
        else:
            out = self.mlp(normed)
        return x + self.post_mlp_layernorm(out), routing
