"""Slow, obvious generation: the whole text is read again for every token. The oracle the engine is tested against."""

import torch

from trinity.model.dispatch import Dispatch, locally
from trinity.model.transformer import Transformer


@torch.no_grad()
def continue_greedily(
    model: Transformer,
    tokens: list[int],
    new_tokens: int,
    stop: set[int] | None = None,
    dispatch: Dispatch = locally,
) -> list[int]:
    """The `new_tokens` most likely next tokens, one after another; ends early at a token of `stop` (not returned)."""
    device = model.embed_tokens.weight.device
    text = list(tokens)
    for _ in range(new_tokens):
        hidden = model(torch.tensor([text], device=device), dispatch=dispatch).hidden[0, -1]
        token = int(model.head(hidden).argmax())
        if stop and token in stop:
            break
        text.append(token)
    return text[len(tokens) :]
