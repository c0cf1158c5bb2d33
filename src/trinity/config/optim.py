"""OptimConfig and BalanceConfig: how weights move, and how router biases move."""

from dataclasses import dataclass
from typing import Literal

from trinity.config.knob import Settings, knob


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Settings):
    """Muon for hidden matrices, AdamW for embedding, head, router and norms; one schedule in tokens multiplies both."""

    section = "optim"

    muon_lr: float = knob("peak learning rate of Muon", 1e-3, above=0)
    muon_momentum: float = knob("momentum of Muon (Nesterov)", 0.95, low=0, below=1)
    muon_weight_decay: float = knob("decoupled weight decay of Muon, times the learning rate", 0.1, low=0)
    newton_schulz_steps: int = knob("Newton-Schulz iterations of each orthogonalisation", 5, low=1, high=99)
    newton_schulz_dtype: Literal["float32", "bfloat16"] = knob("precision of the iterations", "float32")
    adamw_lr: float = knob("peak learning rate of AdamW", 3e-4, above=0)
    adamw_beta1: float = knob("first-moment decay of AdamW", 0.9, low=0, below=1)
    adamw_beta2: float = knob("second-moment decay of AdamW", 0.95, low=0, below=1)
    adamw_eps: float = knob("denominator floor of AdamW", 1e-8, above=0)
    adamw_weight_decay: float = knob(
        "decoupled weight decay of embedding, head and router, times the learning rate", 0.0, low=0
    )
    warmup_tokens: int = knob("tokens over which the learning rate rises linearly from zero", 0, low=0)
    decay_tokens: int = knob(
        "tokens at the end of train.tokens over which the learning rate falls: the anneal", 0, low=0
    )
    decay: Literal["linear", "cosine"] = knob("shape of the fall", "linear")
    final_lr_fraction: float = knob(
        "learning rate at the end of the anneal, as a fraction of the peak", 0.0, low=0, high=1
    )
    clip_norm: float = knob("largest global gradient norm; 0 switches clipping off", 1.0, low=0)


@dataclass(frozen=True, kw_only=True)
class BalanceConfig(Settings):
    """How tokens are spread over experts (Trinity Large report, eqs. 23-28 for SMEBU), and the two auxiliary losses."""

    section = "balance"

    rule: Literal["smebu", "sign", "none"] = knob("which rule moves the router biases after each step", "smebu")
    smebu_lambda: float = knob("largest bias step of SMEBU", 5e-4, low=0)
    smebu_beta: float = knob("momentum of SMEBU", 0.5, low=0, below=1)
    smebu_kappa: float = knob("slope of the tanh in SMEBU", 2.0, above=0)
    sign_gamma: float = knob("bias step of the sign rule", 1e-3, low=0)
    sequence_loss: float = knob("weight of the sequence-wise balance loss", 1e-4, low=0)
    z_loss: float = knob("weight of the squared log-partition of the output head", 1e-6, low=0)
