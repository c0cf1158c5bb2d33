"""Our parameter names and the published ones: a two-way list, the only place where they differ.

The published checkpoint names are ours under a `model.` prefix (the head has none). One exception: experts, which we
hold stacked, are published one matrix each.

    layers.3.mlp.experts.gate_up_proj [E, 2, F, D]  <->  model.layers.3.mlp.experts.{e}.gate_proj.weight [F, D]
                                                         model.layers.3.mlp.experts.{e}.up_proj.weight   [F, D]
    layers.3.mlp.experts.down_proj [E, D, F]        <->  model.layers.3.mlp.experts.{e}.down_proj.weight [D, F]
"""

import re
from collections.abc import Iterator

from torch import Tensor

_EXPERT = re.compile(r"^model\.(layers\.\d+\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")


def published_tensors(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our state dict as published (name, tensor) pairs; expert tensors are views of the stacks."""
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            prefix = f"model.{name.removesuffix('.gate_up_proj')}"
            for expert, (gate, up) in enumerate(tensor):
                yield f"{prefix}.{expert}.gate_proj.weight", gate
                yield f"{prefix}.{expert}.up_proj.weight", up
        elif name.endswith("experts.down_proj"):
            prefix = f"model.{name.removesuffix('.down_proj')}"
            for expert, down in enumerate(tensor):
                yield f"{prefix}.{expert}.down_proj.weight", down
        else:
            yield (name if name.startswith("lm_head.") else f"model.{name}"), tensor


def slot_of(published: str, state: dict[str, Tensor]) -> tuple[str, Tensor] | None:
    """Where a published tensor lives in our state dict: (our name, the view to fill), or None for an unknown name."""
    match = _EXPERT.match(published)
    if match:
        stack, expert, matrix = match[1], int(match[2]), match[3]
        name = f"{stack}.down_proj" if matrix == "down_proj" else f"{stack}.gate_up_proj"
        if name not in state or expert >= state[name].shape[0]:
            return None
        slot = state[name][expert]
        return name, slot if matrix == "down_proj" else slot[("gate_proj", "up_proj").index(matrix)]
    name = published if published.startswith("lm_head.") else published.removeprefix("model.")
    return (name, state[name]) if name in state else None
