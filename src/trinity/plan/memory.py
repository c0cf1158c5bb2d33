"""Bytes of a training process, part by part, and of the KV cache: closed forms of what the implementation holds.

Weights, their float32 gradients and the optimiser's moments are sharded as FSDP2 shards them, padding included. The
activations are the tensors that autograd saves in src/trinity/model; tests/unit/test_plan_memory.py counts them there.
Shapes: n tokens of a microbatch on this process, D width, Q and J query and key width, R = n x K routed rows.
"""

from dataclasses import dataclass, field

from trinity.config.model import ModelConfig
from trinity.config.run import RunConfig
from trinity.plan.layout import Kernels, Layout
from trinity.plan.params import (
    LayerKind,
    Weight,
    count_parameters,
    held_values,
    layer_kinds,
    layer_patterns,
    layer_weights,
)

KEPT_PADDING = 15  # rows that each expert may keep more (kernels/experts.py)
KERNEL_ROWS = 64  # of the smallest matrices that the kernels orthogonalise (optim/orthogonalise.py)
LOSS_CHUNK = 2048  # tokens whose logits exist at once (model/loss.py)
MUON_BATCH = 1 << 24  # values orthogonalised at once (optim/muon.py)
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
    recomputed: int = field(metadata={"meaning": "the inside of one block, where it is computed again in backward"})
    passing: int = field(metadata={"meaning": "the inside of one block in forward, where it keeps nothing"})
    head: int = field(metadata={"meaning": "the head's working copy, which stays"})
    layer: int = field(metadata={"meaning": "the working copy of the layer in hand"})
    backward: int = field(metadata={"meaning": "gradients of the layer in hand, and of the head"})
    prefetched: int = field(metadata={"meaning": "on a GPU: the next layer and the buffer it arrives in"})
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
            # The layer, and the buffer it arrives in.
            "forward": always + early + self.activations + self.passing + self.head + 2 * self.layer,
            "loss": always + early + self.activations + self.head + self.loss,
            "backward": always
            + early
            + self.activations
            + self.recomputed
            + self.head
            + self.layer
            + self.backward
            + self.prefetched,
            "update": always + self.gradients + self.muon,
        }

    @property
    def peak(self) -> int:
        """Device bytes at the worst moment of a step."""
        return max(self.moments_of_a_step.values())


def rank_memory(run: RunConfig, layout: Layout, in_host_memory: bool) -> RankMemory:
    """What the fullest process of a layout holds. in_host_memory: it computes in host memory (a CPU)."""
    held = held_values(run.model, layout.fsdp, layout.expert)
    kernels = layout.kernels(in_host_memory)
    activations, recomputed = activation_bytes(run, layout, kernels), recomputed_bytes(run, layout, kernels)
    whole = layout.size > 1 or layout.precision != "float32"  # weights are gathered
    layer = max(_own_values(members, layout) for _, members in layer_kinds(run.model)) if whole else 0
    head = run.model.vocab_size * run.model.hidden_size if whole else 0
    biases = 4 * run.model.num_sparse_layers * run.model.num_experts
    tokens = layout.tokens(run)
    return RankMemory(
        weights=4 * held.weights + biases,
        moments=4 * held.moments + biases,
        gradients=4 * held.weights,
        activations=activations,
        recomputed=recomputed,
        passing=_passing_bytes(run, layout, kernels),
        head=layout.value_bytes * head,
        layer=layout.value_bytes * layer,
        backward=_backward_bytes(run, layout, tokens, layer, recomputed, kernels),
        prefetched=0 if in_host_memory else 2 * layout.value_bytes * layer,
        loss=_loss_bytes(run.model, layout, tokens),
        muon=_muon_bytes(run, layout, in_host_memory),
        process=HOST_PROCESS if in_host_memory else DEVICE_PROCESS,
        allocator=_kept_by_malloc(activations + recomputed, layout.microbatches(run)) if in_host_memory else 0,
        staging=4 * (held.weights + held.moments),
        kept_gradients=layout.microbatches(run) > 1,
    )


def _kept_by_malloc(activations: int, microbatches: int) -> int:
    """glibc hands the freed tensors of one pass to the next only in part, so resident memory holds some twice: measured
    all of them when passes follow each other, half when an update lies between. On a GPU such losses are in the share
    of memory that is usable."""
    return activations if microbatches > 1 else activations // 2


def activation_bytes(run: RunConfig, layout: Layout, kernels: Kernels) -> int:
    """Everything autograd keeps of one microbatch from forward to backward; with remat=block, the inputs of blocks.
    Masks of documents, and copies of keys, are kept where attention has no kernel of its own."""
    model, tokens, length = run.model, layout.tokens(run), run.data.sequence_length
    final = tokens * model.hidden_size * (4 + layout.value_bytes) + 4 * tokens
    masks = _mask_bytes(model, layout, length) if kernels == "plain" else 2 * 8 * tokens * layout.context
    if layout.remat == "none":
        kinds = layer_patterns(model)
        insides = (kind.layers * _block_activations(run, layout, kind, kernels) for kind in kinds)
        return sum(insides) + final + masks
    scores = tokens * (4 * model.num_experts + 12 * model.num_experts_per_tok)  # for the balance loss
    inputs = model.num_hidden_layers * tokens * model.hidden_size * layout.value_bytes
    return inputs + model.num_sparse_layers * scores + final + masks


def recomputed_bytes(run: RunConfig, layout: Layout, kernels: Kernels) -> int:
    """What one block keeps when it is computed again: 0 unless remat=block."""
    if layout.remat == "none":
        return 0
    return max(_block_activations(run, layout, kind, kernels) for kind in layer_patterns(run.model))


def _passing_bytes(run: RunConfig, layout: Layout, kernels: Kernels) -> int:
    """What one block holds of itself in forward at the fullest moment, among its experts, beyond the final norm that
    comes later: 0 unless remat=block."""
    model, size, width = run.model, layout.value_bytes, run.model.hidden_size
    if layout.remat == "none":
        return 0
    if not model.num_sparse_layers:
        return layout.tokens(run) * size * (2 * width + 3 * model.intermediate_size)
    hidden = model.moe_intermediate_size
    rows = 2 * hidden + width if kernels == "cpu" else max(width + 3 * hidden, 2 * width + hidden)
    arrived = width * (1 + (kernels == "cpu")) if layout.expert > 1 else 0
    inside = size * (2 * width + model.num_experts_per_tok * (rows + arrived))
    return layout.tokens(run) * max(0, inside - (4 + size) * width)


def _block_activations(run: RunConfig, layout: Layout, kind: LayerKind, kernels: Kernels) -> int:
    """Bytes that one block saves for its backward (model/block.py)."""
    return _attention_bytes(run, layout, kind, kernels) + _feed_forward_bytes(run, layout, kind, kernels)


def _attention_bytes(run: RunConfig, layout: Layout, kind: LayerKind, kernels: Kernels) -> int:
    """Of it, attention and its two norms (model/attention.py)."""
    model, size, head = run.model, layout.value_bytes, run.model.head_dim
    query, key = model.num_attention_heads * head, model.num_key_value_heads * head
    heads = model.num_attention_heads + model.num_key_value_heads
    norms = 4 * (query + key + heads)  # of queries and keys: what they read, and scales, float32
    if kernels == "cpu":
        attention = size * (3 * query + 2 * key)  # queries, keys, values; the output, and again with heads side by side
    elif kernels == "gpu":
        attention = size * (2 * query + 2 * key)  # queries, keys, values; the output
    else:  # a local layer's block of keys comes with the one before it
        copies = 2 if not kind.is_global and run.data.sequence_length >= 2 * model.sliding_window else 1
        attention = size * query * (2 + 2 * copies)  # queries, output, and keys and values for every query head
    attention += 4 * model.num_attention_heads + 2 * size * query  # log-sums; the gate and its product
    return layout.tokens(run) * (_sandwich(model, size) + norms + attention)


def _feed_forward_bytes(run: RunConfig, layout: Layout, kind: LayerKind, kernels: Kernels) -> int:
    """Of it, the feed-forward, dense or sparse, and its two norms (model/experts.py)."""
    model, size, width, tokens = run.model, layout.value_bytes, run.model.hidden_size, layout.tokens(run)
    if not kind.is_sparse:
        return tokens * (_sandwich(model, size) + 4 * size * model.intermediate_size)
    chosen, hidden = model.num_experts_per_tok, model.moe_intermediate_size
    router = 4 * model.num_experts + chosen * (8 + 3 * 4) + (4 * width if size == 2 else 0)
    if kernels == "cpu":  # their order; gate and up before the activation
        rows = chosen * (8 + size * 2 * hidden)
        if layout.expert > 1:  # and as they arrived and came back, with the order by local expert and weights of one
            rows += chosen * (size * 2 * width + 8 + 4)
    else:  # their order; into and out of experts, gate and up, product
        rows = chosen * (8 + size * (2 * width + 3 * hidden))
        if layout.expert > 1:  # the orders by local expert, there and back
            rows += chosen * 8 * 2
    shared = 4 * size * hidden * model.num_shared_experts
    padding = KEPT_PADDING * (model.num_experts // layout.expert) * 2 * hidden * 4 if kernels == "cpu" else 0
    return tokens * (_sandwich(model, size) + router + rows + shared) + padding


def _sandwich(model: ModelConfig, size: int) -> int:
    """Bytes of a token that the two norms around a sublayer keep, in float32, and what it reads."""
    return 2 * 4 * (model.hidden_size + 1) + size * model.hidden_size


def _mask_bytes(model: ModelConfig, layout: Layout, length: int) -> int:
    """Additive masks of the documents in the rows, one for each kind of layer (model/attend.py)."""
    rows, size, window = layout.microbatch_rows, layout.value_bytes, model.sliding_window
    kinds = {kind.is_global for kind in layer_patterns(model)}
    whole = rows * length * length * size
    local = rows * -(-length // window) * 2 * window * window * size if length >= 2 * window else whole
    return (whole if True in kinds else 0) + (local if False in kinds else 0)


def _own_values(members: list[Weight], layout: Layout) -> int:
    """Values of a layer when gathered, as padded: all dense weights and this process's experts."""
    cut = [(weight, layout.expert_shard if weight.role == "expert" else layout.fsdp) for weight in members]
    return sum(weight.of_process(layout.expert).held(shards) * shards for weight, shards in cut)


def _backward_bytes(run: RunConfig, layout: Layout, tokens: int, layer: int, recomputed: int, kernels: Kernels) -> int:
    """What backward holds beside what forward kept, at the fullest of three moments: inside the gate of the experts,
    when part of the block is already behind; inside a dense feed-forward; or when the gradients of a whole layer, in
    float32 too, wait to be summed over processes and what was computed again is gone."""
    model, size = run.model, layout.value_bytes
    width, hidden, chosen = model.hidden_size, model.moe_intermediate_size, model.num_experts_per_tok
    arriving = 2 * tokens * width * size
    behind = tokens * 4 * width  # the final norm's
    routed = [weight for _, members in layer_kinds(model) for weight in members if weight.role == "expert"]
    experts = _own_values(routed, layout) if layer else 0
    gate = dense = 0
    if model.num_sparse_layers:
        done = 4 * (width + 1) + 4 * size * hidden * model.num_shared_experts
        if kernels == "cpu":  # rows' gradients before they are summed, and those of the experts' weights
            gate = tokens * (size * width * (chosen + 1) - done) + size * experts
        else:
            gate = tokens * (chosen * size * (5 * hidden - width) - done) + layer * size // 3
    if model.num_dense_layers:
        dense = tokens * 3 * model.intermediate_size * size
    largest = max(weight.values for weight in layer_weights(model, model.num_sparse_layers > 0))
    own = 4 * largest if layout.size == 1 else 0
    head = size * model.vocab_size * width
    # Gradients of gathered weights leave after their unit: the experts' beside the attention's inside, the rest last.
    waiting = (4 + size) * (layer - experts) - recomputed
    if experts:  # copied to float32, summed over processes; their working copy is gone by then
        shards = layout.expert_shard
        own_grads = size * sum(weight.values for weight in routed) // layout.expert  # not padded
        summed = 4 * experts + max(own_grads, 4 * experts // shards + own_grads // 3)
        summed = 12 * experts if shards == 1 else summed  # alone: divided into a third copy
        beside = max(_attention_bytes(run, layout, kind, kernels) for kind in layer_patterns(model))
        beside += tokens * (4 * (width + 1) + 3 * width * size)  # the norm before the experts, and what arrives there
        inside = recomputed or max(_block_activations(run, layout, kind, kernels) for kind in layer_patterns(model))
        waiting = max(waiting, summed - size * experts + beside - inside)
    if recomputed and model.num_sparse_layers:
        waiting = max(waiting, _recomputing_bytes(run, layout, layer, experts, kernels))
    # The balance loss hands every layer's scores their gradient at the beginning of backward.
    scores = 4 * tokens * model.num_experts * max(model.num_sparse_layers - 1, 0) if run.balance.sequence_loss else 0
    return head + scores + max(arriving - behind + max(gate, dense, 0) + own, waiting)


def _recomputing_bytes(run: RunConfig, layout: Layout, layer: int, experts: int, kernels: Kernels) -> int:
    """What is held beside a block's inside when, computed again, it has come to the end of its experts: the gradient
    that waits for it (in float32 too) and what the block adds to, in place of the final norm's; rows on their way; what
    FSDP has not let go."""
    model, size, width = run.model, layout.value_bytes, run.model.hidden_size
    later = 4 * (width + 1) + 4 * size * model.moe_intermediate_size * model.num_shared_experts  # of the inside
    rows = size * width * model.num_experts_per_tok * (2 if layout.expert > 1 and kernels != "cpu" else 1)
    waiting = 4 * width
    arrived = size * experts if layout.expert_shard > 1 else 0  # the buffer in which the experts came
    leaving = 4 * (layer - experts) if layout.fsdp > 1 else 0  # gradients of the block behind it, on their way
    return layout.tokens(run) * (waiting + rows - later) + arrived + leaving


def _loss_bytes(model: ModelConfig, layout: Layout, tokens: int) -> int:
    """One chunk of logits in float32 (in working precision too, where that differs), gradients of head and hidden."""
    chunk, size = min(LOSS_CHUNK, tokens) * model.vocab_size, layout.value_bytes
    head = model.vocab_size * model.hidden_size
    logits, rounded = (6 * chunk + 2 * head, 2 * head) if size == 2 else (4 * chunk, 0)
    return 4 * head + max(logits, rounded) + tokens * model.hidden_size * size


def _muon_bytes(run: RunConfig, layout: Layout, kernels: bool) -> int:
    """Scratch of an update (optim/muon.py): matrices that travel to owners and back, then stacks that are whole."""
    size = 2 if run.optim.newton_schulz_dtype == "bfloat16" else 4
    stacks = travelling = 0
    held: dict[tuple[int, int], list[int]] = {}  # by shape of the matrix, what this process holds of each parameter
    for layers, members in layer_kinds(run.model):
        for weight in members:
            if weight.by_muon and (weight.role == "expert" or layout.fsdp == 1):
                shards = layout.expert_shard if weight.role == "expert" else layout.fsdp
                values = weight.of_process(layout.expert).held(shards)
                held.setdefault((weight.shape[-2], weight.shape[-1]), []).extend([values] * layers)
    for (rows, columns), values in held.items():
        one = rows * columns
        batch = min(sum(values), max(1, MUON_BATCH // one) * one)
        joined = max(values) < batch  # slices of several parameters are put together
        stacks = max(stacks, 4 * batch * (1 + joined) + _newton_schulz_bytes(rows, columns, batch, size, kernels))
    if layout.fsdp > 1:
        matrices = [w for _, members in layer_kinds(run.model) for w in members if w.role == "matrix"]
        largest = max(matrices, key=lambda weight: weight.values)
        cut = held_values(run.model, layout.fsdp, layout.expert).matrix
        round_of = max(largest.values, min(MUON_ROUND // layout.fsdp, cut))
        batch = max(largest.values, min(MUON_BATCH, round_of))
        spread = _newton_schulz_bytes(largest.shape[-2], largest.shape[-1], batch, size, kernels) + size * batch
        travelling = size * (2 * cut + 2 * round_of) + max(2 * size * round_of, spread)
    return max(stacks, travelling)


def _newton_schulz_bytes(rows: int, columns: int, values: int, size: int, kernels: bool) -> int:
    """What optim/orthogonalise.py holds beside a stack of `values` values while it works."""
    short, long = min(rows, columns), max(rows, columns)
    if kernels and size == 4 and short >= KERNEL_ROWS:
        return 4 * values * (2 if rows > columns else 1)  # the normalised stack, and turned so that rows are the short
    cast = values if size != 4 else 0
    return size * (cast + 2 * values + 3 * values * short // long)
