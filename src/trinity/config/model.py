"""ModelConfig: the AFMoE architecture under the field names of the published config.json."""

from dataclasses import dataclass

from trinity.base.errors import ConfigError
from trinity.config.knob import Settings, knob

LOCAL, GLOBAL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """Shape of one model. Derived figures are properties; `trinity.plan.params` counts parameters from it alone."""

    section = "model"

    vocab_size: int = knob("rows of the embedding and of the output head", low=1)
    hidden_size: int = knob("width of the residual stream", low=1)
    intermediate_size: int = knob("hidden width of the dense feed-forward layers", low=1)
    moe_intermediate_size: int = knob("hidden width of one routed expert, and per shared expert", low=1)
    num_hidden_layers: int = knob("layers in all, dense ones included", low=1)
    num_dense_layers: int = knob("leading layers with a dense feed-forward instead of experts", low=0)
    num_attention_heads: int = knob("query heads", low=1)
    num_key_value_heads: int = knob("key and value heads, each shared by a group of query heads", low=1)
    head_dim: int = knob("size of one head", low=2)
    num_experts: int = knob("routed experts in each sparse layer", low=1)
    num_experts_per_tok: int = knob("routed experts chosen for each token", low=1)
    num_shared_experts: int = knob("experts every token passes through, unweighted", 1, low=0)
    route_scale: float = knob("factor on the normalised weights of the chosen experts", 1.0, above=0)
    sliding_window: int = knob("keys a local layer sees, the token itself included", low=1)
    global_attn_every_n_layers: int = knob("one layer in this many sees the whole context, without positions", 4, low=1)
    max_position_embeddings: int = knob("longest context in tokens that the model is meant for", low=1)
    rope_theta: float = knob("base of the rotary frequencies on local layers", 10000.0, above=0)
    rms_norm_eps: float = knob("added to the mean square in every RMSNorm", 1e-5, above=0)
    mup_enabled: bool = knob("scale embeddings by the square root of the hidden size", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.num_attention_heads} query heads cannot be shared evenly by {self.num_key_value_heads} "
                "key/value heads.",
                "Choose model.num_attention_heads as a multiple of model.num_key_value_heads.",
            )
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim is {self.head_dim}.", "Rotary embedding needs an even head size.")
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"{self.num_experts_per_tok} experts cannot be chosen from {self.num_experts}.",
                "Lower model.num_experts_per_tok or raise model.num_experts.",
            )
        if self.num_dense_layers > self.num_hidden_layers:
            raise ConfigError(
                f"{self.num_dense_layers} dense layers do not fit {self.num_hidden_layers} layers.",
                "Lower model.num_dense_layers.",
            )

    def is_global(self, layer: int) -> bool:
        """Whether a layer sees the whole context: the last of every `global_attn_every_n_layers`."""
        return (layer + 1) % self.global_attn_every_n_layers == 0

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer routes tokens to experts."""
        return layer >= self.num_dense_layers

    @property
    def layer_types(self) -> list[str]:
        """The published per-layer list: 'sliding_attention' or 'full_attention'."""
        return [GLOBAL if self.is_global(layer) else LOCAL for layer in range(self.num_hidden_layers)]

    @property
    def num_sparse_layers(self) -> int:
        return self.num_hidden_layers - self.num_dense_layers
