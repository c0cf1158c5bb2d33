"""OptimConfig and BalanceConfig: how weights move, and how router biases move."""

from dataclasses import dataclass
from typing import Literal

from trinity.base.errors import ConfigError
from trinity.config.knob import knob


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Muon for hidden matrices, AdamW for embedding, head, router and norms; one schedule in tokens multiplies both."""

    muon_lr: float = knob("peak learning rate of Muon", 1e-3)
    muon_momentum: float = knob("momentum of Muon (Nesterov)", 0.95)
    muon_weight_decay: float = knob("decoupled weight decay of Muon, times the learning rate", 0.1)
    newton_schulz_steps: int = knob("Newton-Schulz iterations of each orthogonalisation", 5)
    newton_schulz_dtype: Literal["float32", "bfloat16"] = knob("precision of the iterations", "float32")
    adamw_lr: float = knob("peak learning rate of AdamW", 3e-4)
    adamw_beta1: float = knob("first-moment decay of AdamW", 0.9)
    adamw_beta2: float = knob("second-moment decay of AdamW", 0.95)
    adamw_eps: float = knob("denominator floor of AdamW", 1e-8)
    adamw_weight_decay: float = knob(
        "decoupled weight decay of embedding, head and router, times the learning rate", 0.0
    )
    warmup_tokens: int = knob("tokens over which the learning rate rises linearly from zero", 0)
    decay_tokens: int = knob("tokens at the end of the run over which the learning rate falls", 0)
    decay: Literal["linear", "cosine"] = knob("shape of the fall", "linear")
    final_lr_fraction: float = knob("learning rate at the end, as a fraction of the peak", 0.0)
    clip_norm: float = knob("largest global gradient norm; 0 switches clipping off", 1.0)

    def __post_init__(self) -> None:
        if min(self.muon_lr, self.adamw_lr) <= 0:
            raise ConfigError("A learning rate is not above zero.", "Set optim.muon_lr and optim.adamw_lr above 0.")
        if not 0 <= self.final_lr_fraction <= 1:
            raise ConfigError(f"optim.final_lr_fraction is {self.final_lr_fraction}.", "It lies between 0 and 1.")
        if self.newton_schulz_steps < 1:
            raise ConfigError("optim.newton_schulz_steps must be at least 1.", "5 is the usual number.")


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """How tokens are spread over experts (Trinity Large report, eqs. 23-28 for SMEBU), and the two auxiliary losses."""

    rule: Literal["smebu", "sign", "none"] = knob("which rule moves the router biases after each step", "smebu")
    smebu_lambda: float = knob("largest bias step of SMEBU", 5e-4)
    smebu_beta: float = knob("momentum of SMEBU", 0.5)
    smebu_kappa: float = knob("slope of the tanh in SMEBU", 2.0)
    sign_gamma: float = knob("bias step of the sign rule", 1e-3)
    sequence_loss: float = knob("weight of the sequence-wise balance loss", 1e-4)
    z_loss: float = knob("weight of the squared log-partition of the output head", 1e-6)
