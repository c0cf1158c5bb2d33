"""Every initial value of the model, in one table (report section 2).

    matrices, embedding, head   truncated normal, sigma = 0.5 / sqrt(D), cut at three sigma
    norm before a sublayer      1
    norm after a sublayer       1 / sqrt(layers), so that depth does not grow the residual stream
    expert bias                 0

Each tensor has its own seed, named after it: its values do not depend on which others exist or in what order.
"""

import torch

from trinity.base.seeds import named_seed
from trinity.config.model import ModelConfig
from trinity.model.transformer import Transformer

_AFTER = ("post_attention_layernorm.weight", "post_mlp_layernorm.weight")


def build_model(config: ModelConfig, seed: int) -> Transformer:
    """A freshly initialised float32 model."""
    model = Transformer(config)
    sigma = 0.5 / config.hidden_size**0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(_AFTER):
                parameter.fill_(config.num_hidden_layers**-0.5)
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                generator = torch.Generator().manual_seed(named_seed(seed, "init", name))
                torch.nn.init.trunc_normal_(parameter, std=sigma, a=-3 * sigma, b=3 * sigma, generator=generator)
    return model


def build_on_meta(config: ModelConfig) -> Transformer:
    """The model's shapes without its memory."""
    with torch.device("meta"):
        return Transformer(config)
