"""Bytes that one process puts on the wire in one optimiser step, by purpose and collective.

`payload` is the whole tensor of a collective (gathered, reduced, or all rows of an exchange, those that stay included),
summed over the calls of a step. What leaves a process, at even routing and by the bandwidth-optimal algorithms:

    all-gather, reduce-scatter    payload (n - 1) / n            all-to-all    payload (n - 1) / n
    all-reduce                    2 payload (n - 1) / n          halo          payload

One process sends nothing. That is the mean process; `rank` says whose figures are wanted exactly, where the share of
Muon's work and the place in a row decide. Who sends what is decided in parallel/apply.py, expert.py, context.py and
muon.py.
"""

from typing import Literal, NamedTuple

from trinity.config.model import ModelConfig
from trinity.config.run import RunConfig
from trinity.plan.dealing import values_sent
from trinity.plan.layout import Layout
from trinity.plan.params import held_values, layer_patterns, muon_shapes

Collective = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "halo"]  # halo: counted, not shared
Group = Literal["fsdp", "expert_shard", "expert", "context", "replicate", "world"]


class Transfer(NamedTuple):
    """All calls of one collective for one purpose in one step."""

    purpose: str
    collective: Collective
    group: Group
    processes: int
    payload: float
    calls: int

    @property
    def sent(self) -> float:
        """Bytes that leave one process in one step."""
        if self.collective == "halo":
            return self.payload
        share = self.payload * (self.processes - 1) / self.processes
        return 2 * share if self.collective == "all-reduce" else share


def transfers(run: RunConfig, layout: Layout, rank: int | None = None) -> list[Transfer]:
    """Everything a step sends, purposes without partners left out. rank: of this process, not of the mean one."""
    microbatches = layout.microbatches(run)
    found = [
        *_weights(run.model, layout, microbatches),
        *_experts(run, layout, microbatches),
        *_context(run, layout, microbatches, rank),
        *_muon(run, layout, rank),
        Transfer("routing counts", "all-reduce", "world", layout.size,
                 8 * run.model.num_sparse_layers * run.model.num_experts, 1),
        Transfer("losses of microbatches", "all-reduce", "world", layout.size, 16 * microbatches * layout.data, 1),
        Transfer("figures of the step", "all-reduce", "world", layout.size, 24, 2),
        Transfer("gradient norm", "all-reduce", "fsdp", layout.fsdp, 8, 1),
        Transfer("gradient norm", "all-reduce", "replicate", layout.replicate, 8, 1),
    ]  # fmt: skip
    return [transfer for transfer in found if transfer.processes > 1 and transfer.payload]


def _weights(model: ModelConfig, layout: Layout, microbatches: int) -> list[Transfer]:
    """FSDP2: layers and embedding gathered for forward and again for backward, the root (head) once; gradients summed
    over shards in every microbatch, over replicas in the last.

    The gains of norms and the router are gathered in float32 whatever the precision.
    """
    held, size = held_values(model, layout.fsdp, layout.expert), layout.value_bytes
    rooted = 0 if layout.precision == "bfloat16" else -(-model.hidden_size // layout.fsdp)  # the final norm
    dense = 2 * size * (held.matrix + held.embedding) + size * held.head + 4 * (2 * (held.router + held.norm) - rooted)
    found = []
    kinds: list[tuple[str, Group, int, int, int, int]] = [
        ("experts", "expert_shard", layout.expert_shard, 2 * size * held.expert, held.expert, model.num_sparse_layers),
        ("weights", "fsdp", layout.fsdp, dense, held.dense, model.num_hidden_layers + 2),
    ]
    for name, group, processes, gathered, own, units in kinds:
        calls = microbatches * units
        sharded = microbatches * processes
        gathers = 2 * calls - (microbatches if name == "weights" else 0)
        found += [
            Transfer(f"{name} gathered", "all-gather", group, processes, sharded * gathered, gathers),
            Transfer(f"{name}' gradients", "reduce-scatter", group, processes, sharded * 4 * own, calls),
            Transfer(f"{name}' gradients over replicas", "all-reduce", "replicate", layout.replicate,
                     4 * own, units),
        ]  # fmt: skip
    return found


def _experts(run: RunConfig, layout: Layout, microbatches: int) -> list[Transfer]:
    """Rows to their experts and back, and their gradients the same way; recomputed blocks send theirs again."""
    model, again = run.model, layout.remat == "block"
    calls = microbatches * model.num_sparse_layers
    rows = layout.tokens(run) * model.num_experts_per_tok * model.hidden_size * layout.value_bytes
    exchanges = calls * (4 + 2 * again)
    return [
        Transfer("rows of experts", "all-to-all", "expert", layout.expert, exchanges * rows, exchanges),
        Transfer("counts of rows", "all-to-all", "expert", layout.expert, calls * (1 + again) * 8 * model.num_experts,
                 calls * (1 + again)),
    ]  # fmt: skip


def _context(run: RunConfig, layout: Layout, microbatches: int, rank: int | None) -> list[Transfer]:
    """Local layers: keys and values of the window before the stretch. Global layers: heads for positions and back."""
    model, size, ranks = run.model, layout.value_bytes, layout.context
    if ranks == 1:
        return []
    passes = 3 if layout.remat == "block" else 2
    stretch = run.data.sequence_length // ranks
    key = model.num_key_value_heads * model.head_dim
    query = model.num_attention_heads * model.head_dim
    spread = key if model.num_key_value_heads % ranks == 0 else query
    num_global = sum(kind.layers for kind in layer_patterns(model) if kind.is_global)
    local = microbatches * (model.num_hidden_layers - num_global)
    whole = microbatches * passes * num_global
    places = range(ranks) if rank is None else [rank % ranks]
    far = sum(_halo(model.sliding_window, stretch, ranks, place, passes - 1) for place in places) / len(places)
    halo = layout.microbatch_rows * far * 2 * key * size
    exchanged = layout.tokens(run) * 2 * (query + spread) * size
    counted = microbatches * model.num_sparse_layers * bool(run.balance.sequence_loss)
    counts = 8 * layout.microbatch_rows * model.num_experts
    return [
        Transfer("counts of the balance loss", "all-reduce", "context", ranks, counted * counts, counted),
        Transfer("keys of the window", "halo", "context", ranks, local * halo, local * passes),
        Transfer("heads for positions", "all-to-all", "context", ranks, whole * exchanged, 4 * whole),
    ]


def _halo(window: int, stretch: int, ranks: int, place: int, forwards: int) -> int:
    """Positions whose keys and values process `place` of a row sends to later ones, in each forward pass, and whose
    gradients it sends to earlier ones, in one backward pass."""
    later = min(window - 1, stretch * (ranks - 1 - place)) if place < ranks - 1 else 0
    earlier = min(window - 1, stretch * place)
    return forwards * later + earlier


def _muon(run: RunConfig, layout: Layout, rank: int | None) -> list[Transfer]:
    """Rows of dense matrices to the owner of each and the orthogonalised ones back; experts stay where they are."""
    size, processes = 2 if run.optim.newton_schulz_dtype == "bfloat16" else 4, layout.fsdp
    payload = 2.0 * size * held_values(run.model, processes, layout.expert).matrix
    if rank is not None and processes > 1:
        shapes = muon_shapes(run.model)
        payload = size * values_sent(shapes, processes, rank % processes) * processes / (processes - 1)
    return [Transfer("Muon's matrices", "all-to-all", "fsdp", processes, payload, 2)]
