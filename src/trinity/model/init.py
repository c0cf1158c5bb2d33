"""Every initial value of the model, in one table (report section 2).

    matrices, embedding, head   truncated normal, sigma = 0.5 / sqrt(D), cut at three sigma
    norm before a sublayer      1
    norm after a sublayer       1 / sqrt(layers), so that depth does not grow the residual stream
    expert bias                 0

Each matrix, and each expert's matrices, have their own seed, named after them: values depend neither on which others
exist nor on which process holds them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trinity.base.seeds import named_seed
from trinity.config.model import ModelConfig
from trinity.model.transformer import Transformer

_AFTER = ("post_attention_layernorm.weight", "post_mlp_layernorm.weight")
_EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")


def build_model(config: ModelConfig, seed: int) -> Transformer:
    """A freshly initialised float32 model."""
    model = Transformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill_initial(parameter, name, config, seed, rows=len(parameter))
    return model


def fill_initial(part: Tensor, name: str, config: ModelConfig, seed: int, rows: int, first: int = 0) -> None:
    """Give `part` its initial values in place: rows first, first + 1, ... of the `rows` rows of the parameter `name`.

    Experts are drawn one by one; of another matrix the whole is drawn, on the CPU, whatever part of it is wanted.
    """
    sigma = 0.5 / config.hidden_size**0.5
    if name.endswith(_AFTER):
        part.fill_(config.num_hidden_layers**-0.5)
    elif part.dim() == 1:
        part.fill_(1.0)
    elif name.endswith(_EXPERTS):
        for expert, matrix in enumerate(part, start=first):
            matrix.copy_(_draw(matrix.shape, sigma, named_seed(seed, "init", name, expert)))
    elif len(part):
        part.copy_(_draw((rows, *part.shape[1:]), sigma, named_seed(seed, "init", name))[first : first + len(part)])


def _draw(shape: Sequence[int], sigma: float, seed: int) -> Tensor:
    values, generator = torch.empty(*shape, device="cpu"), torch.Generator().manual_seed(seed)
    return torch.nn.init.trunc_normal_(values, std=sigma, a=-3 * sigma, b=3 * sigma, generator=generator)


def build_on_meta(config: ModelConfig) -> Transformer:
    """The model's shapes without its memory."""
    with torch.device("meta"):
        return Transformer(config)
