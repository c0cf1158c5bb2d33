"""Closed-form parameter counts of a ModelConfig, to the unit, without allocating anything.

Checked against the published totals of Trinity Nano, Mini and Large and against the model built on the meta device.
`layer_weights` and `outer_weights` list the tensors one by one, for the figures that depend on their shapes: what a
process holds, sends and orthogonalises.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal, NamedTuple

from trinity.config.model import ModelConfig

Role = Literal["matrix", "expert", "router", "norm", "embedding", "head"]


class Weight(NamedTuple):
    """One parameter. Muon moves matrices and experts (the last two dimensions are the matrix), AdamW the rest."""

    name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def values(self) -> int:
        return prod(self.shape)

    @property
    def by_muon(self) -> bool:
        return self.role in ("matrix", "expert")

    def of_process(self, expert: int) -> "Weight":
        """What a process has of it before it is sharded: of a stack of experts cut in `expert` its part, else all."""
        return self._replace(shape=(self.shape[0] // expert, *self.shape[1:])) if self.role == "expert" else self

    def held(self, processes: int) -> int:
        """Values that the fullest of `processes` holds: FSDP2 cuts the first dimension and pads it to a multiple."""
        return -(-self.shape[0] // processes) * prod(self.shape[1:])


def layer_weights(model: ModelConfig, sparse: bool) -> list[Weight]:
    """The parameters of one layer; local and global layers have the same."""
    width, head = model.hidden_size, model.head_dim
    query, key = model.num_attention_heads * head, model.num_key_value_heads * head
    hidden, shared = model.moe_intermediate_size, model.moe_intermediate_size * model.num_shared_experts
    found = [
        Weight(f"{place}_layernorm", (width,), "norm") for place in ("input", "post_attention", "pre_mlp", "post_mlp")
    ]
    found += [Weight(f"{kind}_norm", (head,), "norm") for kind in "qk"]
    found += [Weight(f"{kind}_proj", (query, width), "matrix") for kind in ("q", "gate")]
    found += [Weight(f"{kind}_proj", (key, width), "matrix") for kind in "kv"]
    found += [Weight("o_proj", (width, query), "matrix")]
    if not sparse:
        return found + _swiglu("mlp", width, model.intermediate_size)
    found += [Weight("router", (model.num_experts, width), "router")]
    found += [Weight("experts.gate_up_proj", (model.num_experts, 2, hidden, width), "expert")]
    found += [Weight("experts.down_proj", (model.num_experts, width, hidden), "expert")]
    return found + (_swiglu("shared_experts", width, shared) if shared else [])


@lru_cache
def outer_weights(model: ModelConfig) -> list[Weight]:
    """The parameters outside layers."""
    table = (model.vocab_size, model.hidden_size)
    return [
        Weight("embed_tokens", table, "embedding"),
        Weight("lm_head", table, "head"),
        Weight("norm", (model.hidden_size,), "norm"),
    ]


@lru_cache
def layer_kinds(model: ModelConfig) -> list[tuple[int, list[Weight]]]:
    """(how many layers, the weights of one) for the dense and for the sparse ones."""
    counts = ((model.num_dense_layers, False), (model.num_sparse_layers, True))
    return [(count, layer_weights(model, sparse)) for count, sparse in counts if count]


class LayerKind(NamedTuple):
    """Layers that are alike in what they see and what they hold."""

    layers: int
    is_global: bool
    is_sparse: bool


@lru_cache
def layer_patterns(model: ModelConfig) -> list[LayerKind]:
    """The kinds of layers that a model has."""
    every = [(model.is_global(layer), model.is_sparse(layer)) for layer in range(model.num_hidden_layers)]
    return [LayerKind(every.count(kind), *kind) for kind in sorted(set(every))]


@lru_cache
def muon_shapes(model: ModelConfig) -> tuple[tuple[int, int], ...]:
    """The dense matrices that Muon moves, in the order in which the model names them."""
    order = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj")
    found: list[tuple[int, int]] = []
    for layer in range(model.num_hidden_layers):
        members = {w.name: w.shape for w in layer_weights(model, model.is_sparse(layer)) if w.role == "matrix"}
        names = [*order, *(name for name in members if name not in order)]
        found += [(members[name][0], members[name][1]) for name in names]
    return tuple(found)


@lru_cache
def held_values(model: ModelConfig, fsdp: int, expert: int) -> "Held":
    """What the fullest process holds when dense weights are cut in `fsdp` and experts first in `expert`."""
    found = dict.fromkeys(("matrix", "expert", "router", "norm", "embedding", "head"), 0)
    for layers, members in [(1, outer_weights(model)), *layer_kinds(model)]:
        for weight in members:
            shards = fsdp // expert if weight.role == "expert" else fsdp
            found[weight.role] += layers * weight.of_process(expert).held(shards)
    return Held(**found)


class Held(NamedTuple):
    """Values by role. Muon keeps one moment of matrices and experts, AdamW two of the rest."""

    matrix: int
    expert: int
    router: int
    norm: int
    embedding: int
    head: int

    @property
    def weights(self) -> int:
        return sum(self)

    @property
    def dense(self) -> int:
        return self.weights - self.expert

    @property
    def moments(self) -> int:
        return self.matrix + self.expert + 2 * (self.router + self.norm + self.embedding + self.head)


def _swiglu(name: str, width: int, hidden: int) -> list[Weight]:
    return [
        Weight(f"{name}.gate_proj", (hidden, width), "matrix"),
        Weight(f"{name}.up_proj", (hidden, width), "matrix"),
        Weight(f"{name}.down_proj", (width, hidden), "matrix"),
    ]


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
    def multiplied(self) -> int:
        """Parameters that one token is multiplied with: all active ones but the gains of norms."""
        return self.active - self.norms

    @property
    def active(self) -> int:
        """Parameters one token passes through, output head included, embedding (a look-up) not."""
        return self.active_without_embedding + self.head


@lru_cache
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
