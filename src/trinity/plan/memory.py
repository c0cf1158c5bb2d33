"""Bytes of a training process, part by part, and of the KV cache: closed forms of what the implementation holds.

Weights, their float32 gradients and the optimiser's moments are sharded as FSDP2 shards them, padding included. The
activations are the tensors that autograd saves in src/trinity/model; tests/unit/test_plan_memory.py counts them there.
Shapes: n tokens of a microbatch on this process, D width, Q and J query and key width, R = n x K routed rows.
"""

from dataclasses import dataclass, field

from trinity.config.model import ModelConfig
from trinity.config.run import RunConfig
from trinity.plan.layout import Layout
from trinity.plan.params import (
    LayerKind,
    Weight,
    count_parameters,
    held_values,
    layer_kinds,
    layer_patterns,
    layer_weights,
)

LOSS_CHUNK = 2048  # tokens whose logits exist at once (model/loss.py)
MUON_BATCH = 1 << 24  # values orthogonalised at once (optim/muon.py), in about five copies
MUON_ROUND = 1 << 27  # values of matrices that travel to owners at once (parallel/muon.py)
HOST_PROCESS = 560 * 2**20  # resident bytes of a CPU process before its model, kernels warm; measured
DEVICE_PROCESS = 3 * 2**30  # CUDA context, kernels and NCCL's buffers on a GPU; a common figure, not measured here


@dataclass(frozen=True, kw_only=True)
class KVBytes:
    """KV cache of one sequence: a part that grows with every token, and a part that fills once to the window."""

    per_token: int
    window: int

    def at(self, tokens: int, sliding_window: int) -> int:
        """Bytes held after `tokens` tokens."""
        return self.per_token * tokens + self.window * min(tokens, sliding_window) // sliding_window


def kv_bytes(model: ModelConfig, bytes_per_value: int = 2) -> KVBytes:
    """Keys and values of the global layers grow; those of the local layers stop at the window."""
    layer = 2 * model.num_key_value_heads * model.head_dim * bytes_per_value
    num_global = sum(model.is_global(i) for i in range(model.num_hidden_layers))
    return KVBytes(
        per_token=layer * num_global,
        window=layer * (model.num_hidden_layers - num_global) * model.sliding_window,
    )


def training_state_bytes(model: ModelConfig) -> int:
    """Float32 weights, gradients and optimiser state on one device: Muon keeps one moment, AdamW two."""
    count = count_parameters(model)
    adamw = count.embedding + count.head + count.router + count.norms
    return 4 * (2 * count.total + count.total + adamw)


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of the fullest process. The parts below `always` are there all the time; each moment adds its own."""

    weights: int
    moments: int
    gradients: int
    activations: int
    gathered: int = field(metadata={"meaning": "working copies of whole layers, and their gradients on the way back"})
    backward: int = field(metadata={"meaning": "gradients of the layer in hand"})
    loss: int
    muon: int
    process: int
    allocator: int = field(metadata={"meaning": "freed memory of one pass that malloc cannot use for the next"})
    staging: int = field(metadata={"meaning": "copy of the state in host memory while a checkpoint is written"})
    kept_gradients: bool  # whether gradients of earlier microbatches are there during backward

    @property
    def moments_of_a_step(self) -> dict[str, int]:
        """Device bytes at each moment when the peak can be."""
        always = self.weights + self.moments + self.process + self.allocator
        early = self.gradients if self.kept_gradients else 0
        return {
            "loss": always + early + self.activations + self.gathered + self.loss,
            "backward": always + early + self.activations + self.gathered + self.backward,
            "update": always + self.gradients + self.muon,
        }

    @property
    def peak(self) -> int:
        """Device bytes at the worst moment of a step."""
        return max(self.moments_of_a_step.values())


def rank_memory(run: RunConfig, layout: Layout, in_host_memory: bool) -> RankMemory:
    """What the fullest process of a layout holds. in_host_memory: it computes in host memory (a CPU)."""
    held = held_values(run.model, layout.fsdp, layout.expert)
    activations = activation_bytes(run, layout, in_host_memory and layout.precision == "float32")
    biases = 4 * run.model.num_sparse_layers * run.model.num_experts
    tokens = layout.tokens(run)
    return RankMemory(
        weights=4 * held.weights + biases,
        moments=4 * held.moments + biases,
        gradients=4 * held.weights,
        activations=activations,
        gathered=_gathered_bytes(run.model, layout),
        backward=_backward_bytes(run.model, layout, tokens),
        loss=_loss_bytes(run.model, layout, tokens),
        muon=_muon_bytes(run, layout),
        process=HOST_PROCESS if in_host_memory else DEVICE_PROCESS,
        allocator=_kept_by_malloc(activations, layout.microbatches(run)) if in_host_memory else 0,
        staging=4 * (held.weights + held.moments),
        kept_gradients=layout.microbatches(run) > 1,
    )


def _kept_by_malloc(activations: int, microbatches: int) -> int:
    """glibc hands the freed tensors of one pass to the next only in part, so resident memory holds some twice: measured
    all of them when passes follow each other, half when an update lies between. On a GPU such losses are in the share
    of memory that is usable."""
    return activations if microbatches > 1 else activations // 2


def activation_bytes(run: RunConfig, layout: Layout, kernels: bool) -> int:
    """Everything autograd keeps of one microbatch until its backward; with remat=block, the inputs of all blocks and
    the inside of one. kernels: attention is that of the CPU kernels (src/trinity/kernels), which keep no copies."""
    model, tokens, length = run.model, layout.tokens(run), run.data.sequence_length
    one = {kind: tokens * _token_activations(model, layout, length, kind, kernels) for kind in layer_patterns(model)}
    final = tokens * model.hidden_size * (4 + layout.value_bytes) + 4 * tokens
    masks = 2 * 8 * tokens if kernels else _mask_bytes(model, layout, length)
    if layout.remat == "none":
        return sum(kind.layers * size for kind, size in one.items()) + final + masks
    scores = tokens * (4 * model.num_experts + 12 * model.num_experts_per_tok)  # for the balance loss
    inputs = model.num_hidden_layers * tokens * model.hidden_size * layout.value_bytes
    return inputs + model.num_sparse_layers * scores + max(one.values()) + final + masks


def _token_activations(model: ModelConfig, layout: Layout, length: int, kind: LayerKind, kernels: bool) -> int:
    """Bytes that one block saves of a token for its backward (model/block.py, attention.py, experts.py)."""
    size, width, head = layout.value_bytes, model.hidden_size, model.head_dim
    query, key = model.num_attention_heads * head, model.num_key_value_heads * head
    heads = model.num_attention_heads + model.num_key_value_heads
    norms = 4 * 4 * (width + 1) + 4 * (query + key + heads)  # normalised inputs and scales, float32
    norms += 2 * size * width  # what attention and feed-forward read
    if kernels:
        attention = size * (3 * query + 2 * key)  # queries, keys, values; the output, and again with heads side by side
    else:  # a local layer's block of keys comes with the one before it
        copies = 2 if not kind.is_global and length >= 2 * model.sliding_window else 1
        attention = size * query * (2 + 2 * copies)  # queries, output, and keys and values for every query head
    attention += 4 * model.num_attention_heads + 2 * size * query  # log-sums; the gate and its product
    if not kind.is_sparse:
        return norms + attention + 4 * size * model.intermediate_size
    chosen, hidden = model.num_experts_per_tok, model.moe_intermediate_size
    router = 4 * model.num_experts + chosen * (8 + 3 * 4) + (4 * width if size == 2 else 0)
    rows = chosen * (8 + size * (2 * width + 3 * hidden))  # their order; into and out of experts, gate and up, product
    if layout.expert > 1:
        rows += chosen * 8 * 2  # the orders by local expert, there and back
    shared = 4 * size * hidden * model.num_shared_experts
    return norms + attention + router + rows + shared


def _mask_bytes(model: ModelConfig, layout: Layout, length: int) -> int:
    """Additive masks of the documents in the rows, one for each kind of layer (model/attend.py)."""
    rows, size, window = layout.microbatch_rows, layout.value_bytes, model.sliding_window
    kinds = {kind.is_global for kind in layer_patterns(model)}
    whole = rows * length * length * size
    local = rows * -(-length // window) * 2 * window * window * size if length >= 2 * window else whole
    return (whole if True in kinds else 0) + (local if False in kinds else 0)


def _gathered_bytes(model: ModelConfig, layout: Layout) -> int:
    """Whole layers in working precision: the one in hand and the next, the buffer that one arrives in, the gradients of
    one on their way to be summed in float32; and the head, which stays. Nothing when one process keeps all."""
    if layout.size == 1 and layout.precision == "float32":
        return 0
    size, layer = layout.value_bytes, max(_own_values(members, layout) for _, members in layer_kinds(model))
    head = model.vocab_size * model.hidden_size
    return layer * (3 * size + size + 4) + head * (2 * size + 4)


def _own_values(members: list[Weight], layout: Layout) -> int:
    """Values of a layer when gathered: all dense weights and this process's experts."""
    return sum(weight.values // (layout.expert if weight.role == "expert" else 1) for weight in members)


def _backward_bytes(model: ModelConfig, layout: Layout, tokens: int) -> int:
    """Gradients of the widest activations in flight and, where weights are not sharded, of the largest weights."""
    sparse = model.num_sparse_layers > 0
    rows = tokens * model.num_experts_per_tok
    wide = rows * (2 * model.hidden_size + 3 * model.moe_intermediate_size) if sparse else 0
    dense = tokens * 3 * model.intermediate_size if model.num_dense_layers else 0
    largest = max(weight.values for weight in layer_weights(model, sparse)) if layout.size == 1 else 0
    return layout.value_bytes * (max(wide, dense) + 3 * tokens * model.hidden_size) + 4 * largest


def _loss_bytes(model: ModelConfig, layout: Layout, tokens: int) -> int:
    """One chunk of logits in float32 (in working precision too, where that differs), gradients of head and hidden."""
    chunk = min(LOSS_CHUNK, tokens) * model.vocab_size
    logits = 4 * chunk + (2 * layout.value_bytes * chunk if layout.value_bytes == 2 else 0)
    head = model.vocab_size * model.hidden_size
    return logits + 2 * 4 * head + tokens * model.hidden_size * layout.value_bytes


def _muon_bytes(run: RunConfig, layout: Layout) -> int:
    """Scratch of an update: one batch of matrices in about five copies, and what travels to owners and back."""
    size = 2 if run.optim.newton_schulz_dtype == "bfloat16" else 4
    matrices = [w for _, members in layer_kinds(run.model) for w in members if w.by_muon]
    one = max(weight.shape[-1] * weight.shape[-2] for weight in matrices)
    held = held_values(run.model, layout.fsdp, layout.expert)
    batch = max(one, min(MUON_BATCH, held.matrix + held.expert))
    scratch = 4 * 2 * batch + 3 * size * batch
    if layout.fsdp == 1:
        return scratch
    travelling = max(one, min(MUON_ROUND // layout.fsdp, held.matrix))
    return scratch + size * (2 * held.matrix + 4 * travelling)
