"""Closed-form parameter counts of a ModelConfig, to the unit, without allocating anything.

Checked against the published totals of Trinity Nano, Mini and Large and against the model built on the meta device.
"""

from dataclasses import dataclass

from trinity.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters in all and per token, split by where they sit.

    The selection bias is stored, so it counts in the total; it weighs nothing, so it is not active.
    """

    embedding: int
    head: int
    attention: int
    dense: int
    routed_experts: int
    shared_experts: int
    router: int
    selection_bias: int
    norms: int
    active_experts: int

    @property
    def total(self) -> int:
        return (
            self.embedding
            + self.head
            + self.attention
            + self.dense
            + self.routed_experts
            + self.shared_experts
            + self.router
            + self.selection_bias
            + self.norms
        )

    @property
    def active_without_embedding(self) -> int:
        """Parameters one token passes through, without the embedding and the output head."""
        return self.attention + self.dense + self.active_experts + self.shared_experts + self.router + self.norms

    @property
    def active(self) -> int:
        """Parameters one token passes through, output head included, embedding (a look-up) not."""
        return self.active_without_embedding + self.head


def count_parameters(model: ModelConfig) -> ParameterCount:
    width, head = model.hidden_size, model.head_dim
    query_width, key_width = model.num_attention_heads * head, model.num_key_value_heads * head
    attention = width * (3 * query_width + 2 * key_width)  # q, gate, o; k, v
    expert = 3 * width * model.moe_intermediate_size
    sparse, layers = model.num_sparse_layers, model.num_hidden_layers
    return ParameterCount(
        embedding=model.vocab_size * width,
        head=model.vocab_size * width,
        attention=layers * attention,
        dense=model.num_dense_layers * 3 * width * model.intermediate_size,
        routed_experts=sparse * model.num_experts * expert,
        shared_experts=sparse * model.num_shared_experts * expert,
        router=sparse * model.num_experts * width,
        selection_bias=sparse * model.num_experts,
        norms=layers * (4 * width + 2 * head) + width,
        active_experts=sparse * model.num_experts_per_tok * expert,
    )
