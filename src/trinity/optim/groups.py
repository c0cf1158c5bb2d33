"""Which parameter goes to which optimiser. Every parameter is named by exactly one rule; an unknown name is refused."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trinity.config.optim import OptimConfig
from trinity.optim.muon import Across, Muon, local

_MUON = (
    "q_proj.weight",
    "k_proj.weight",
    "v_proj.weight",
    "o_proj.weight",
    "gate_proj.weight",
    "up_proj.weight",
    "down_proj.weight",
    "experts.gate_up_proj",
    "experts.down_proj",
)
_ADAMW_DECAYED = ("embed_tokens.weight", "lm_head.weight", "router.gate.weight")
_ADAMW_PLAIN = ("norm.weight", "layernorm.weight")


@dataclass(frozen=True)
class Optimisers:
    """Muon for hidden matrices; AdamW for embedding, head, router (decayed) and norms (not decayed)."""

    muon: Muon
    adamw: torch.optim.AdamW

    def set_rates(self, muon_lr: float, adamw_lr: float) -> None:
        for group in self.muon.param_groups:
            group["lr"] = muon_lr
        for group in self.adamw.param_groups:
            group["lr"] = adamw_lr

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()

    def gradients(self) -> list[Tensor]:
        """What this process holds of each gradient."""
        found = [
            parameter.grad
            for optimiser in (self.muon, self.adamw)
            for group in optimiser.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        return [local(grad) for grad in found]

    def zero_grad(self) -> None:
        self.muon.zero_grad(set_to_none=True)
        self.adamw.zero_grad(set_to_none=True)


def build_optimisers(model: nn.Module, config: OptimConfig, across: Across | None = None) -> Optimisers:
    """across: how Muon makes sharded matrices whole (parallel/muon.py); None where nothing is sharded."""
    muon, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith(_MUON):
            muon.append(parameter)
        elif name.endswith(_ADAMW_DECAYED):
            decayed.append(parameter)
        else:
            assert name.endswith(_ADAMW_PLAIN), f"no optimiser is named for parameter {name}"
            plain.append(parameter)
    return Optimisers(
        muon=Muon(
            muon,
            lr=config.muon_lr,
            momentum=config.muon_momentum,
            weight_decay=config.muon_weight_decay,
            steps=config.newton_schulz_steps,
            dtype=getattr(torch, config.newton_schulz_dtype),
            across=across,
        ),
        adamw=torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.adamw_weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=config.adamw_lr,
            betas=(config.adamw_beta1, config.adamw_beta2),
            eps=config.adamw_eps,
            fused=True,
        ),
    )
