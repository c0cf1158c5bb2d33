"""AFMoE on one page: embed, blocks, norm; the head is applied by the caller to the positions it needs.

    h = sqrt(D) E[token];  every block: attention, then dense SwiGLU or mixture of experts, each in a sandwich of norms.

Sources: Trinity Large report section 2; equal in value to the published `AfmoeForCausalLM` (tests/parity).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from trinity.config.model import ModelConfig
from trinity.model.attend import Attend, Causal
from trinity.model.block import Block
from trinity.model.dispatch import Dispatch, locally
from trinity.model.experts import MixtureOfExperts
from trinity.model.layers import Linear, RMSNorm, rotary_angles
from trinity.model.router import Routing


class Output(NamedTuple):
    hidden: Tensor  # [B, T, D] after the final norm
    routings: list[Routing]  # one for each sparse layer, first to last


class Transformer(nn.Module):
    """The model. Single device; knows nothing of caches, packing or parallelism, which arrive as arguments."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, _weight=torch.empty(config.vocab_size, config.hidden_size)
        )
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        attend: Attend | None = None,
        dispatch: Dispatch = locally,
    ) -> Output:
        """tokens [B, T] int64; positions [T] or [B, T], from 0 when absent.

        attend: how a query reads the past; dispatch: how tokens reach their experts.
        """
        attend = Causal() if attend is None else attend
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        hidden = self.embed_tokens(tokens)
        if self.config.mup_enabled:
            hidden = hidden * self.config.hidden_size**0.5
        routings = []
        for block in self.layers:
            hidden, routing = block(hidden, angles, attend, dispatch)
            if routing is not None:
                routings.append(routing)
        return Output(self.norm(hidden), routings)

    def head(self, hidden: Tensor) -> Tensor:
        """[..., D] -> logits [..., V] in float32."""
        return self.lm_head(hidden).float()

    def expert_biases(self) -> list[Tensor]:
        """The selection bias of each sparse layer, first to last: float32 [E] buffers, moved by the training step."""
        return [module.expert_bias for module in self.modules() if isinstance(module, MixtureOfExperts)]
