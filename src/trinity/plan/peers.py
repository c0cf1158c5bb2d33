"""Published models beside ours, counted from their configurations with one set of formulas.

`PEERS` holds what their config.json files and reports state; `published` are the totals their authors give, which tests
compare with the counted ones. Sinks, scales of a few values and multi-token heads are left out.
"""

from dataclasses import dataclass, field

from trinity.base.errors import UsageError, nearest
from trinity.config.model import ModelConfig
from trinity.plan.flops import keys_seen
from trinity.plan.params import count_parameters


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention: queries and keys through low ranks, one rotary key shared by all heads."""

    query: int
    key: int
    rotary: int
    value_head: int


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Shape of one decoder. Heads are `head` wide in queries and keys, values too unless `latent` says otherwise."""

    name: str
    vocab: int
    width: int
    layers: int
    heads: int
    key_heads: int
    head: int
    dense_layers: int
    dense_hidden: int
    expert_hidden: int = 0
    experts: int = 0
    chosen: int = 0
    shared: int = 0
    matrices: int = 3  # of a feed-forward: gate, up, down; two without a gate
    window: int | None = None
    windowed_layers: int = 0
    output_gate: bool = False
    biases: bool = False
    latent: Latent | None = None
    published: tuple[float, float] = (0.0, 0.0)  # parameters in all and active, as announced
    source: str = field(default="")

    @property
    def sparse_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def attention(self) -> int:
        """Parameters of the attention of one layer."""
        if self.latent is None:
            query, key = self.heads * self.head, self.key_heads * self.head
            bias = (query + 2 * key + self.width) * self.biases
            return self.width * ((2 + self.output_gate) * query + 2 * key) + bias
        latent, keys = self.latent, self.head - self.latent.rotary
        down = self.width * (latent.query + latent.key + latent.rotary)
        up = latent.query * self.heads * self.head + latent.key * self.heads * (keys + latent.value_head)
        return down + up + self.heads * latent.value_head * self.width

    @property
    def expert(self) -> int:
        """Parameters of one routed expert."""
        matrices = self.matrices * self.width * self.expert_hidden
        return matrices + (2 * self.expert_hidden + self.width) * self.biases

    @property
    def every_token(self) -> int:
        """Parameters that every token is multiplied with: attention, dense layers, shared experts, routers, head."""
        dense = self.dense_layers * self.matrices * self.width * self.dense_hidden
        sparse = self.sparse_layers * (self.shared * self.expert + self.experts * (self.width + self.biases))
        return self.layers * self.attention + dense + sparse + self.vocab * self.width

    @property
    def total(self) -> int:
        return self.every_token + self.sparse_layers * self.experts * self.expert + self.vocab * self.width

    @property
    def active(self) -> int:
        """Parameters one token passes through, output head included, embedding not."""
        return self.every_token + self.sparse_layers * self.chosen * self.expert

    def forward_flops(self, length: int) -> float:
        """One token's forward pass in a row of `length` tokens."""
        values = self.latent.value_head if self.latent else self.head
        keys = (self.layers - self.windowed_layers) * keys_seen(length, None)
        keys += self.windowed_layers * keys_seen(length, self.window)
        return 2 * self.active + 2 * self.heads * (self.head + values) * keys

    def kv_bytes(self, tokens: int, size: int = 2) -> float:
        """Bytes of the cache of one sequence; latent attention keeps one latent and one rotary key a layer."""
        values = self.latent.key + self.latent.rotary if self.latent else 2 * self.key_heads * self.head
        kept = (self.layers - self.windowed_layers) * tokens
        kept += self.windowed_layers * min(tokens, self.window or tokens)
        return float(size * values * kept)

    def touched(self, batch: int) -> float:
        """Parameters read to decode one token for each of `batch` sequences: experts that nobody chose stay unread."""
        read = self.experts * (1 - (1 - self.chosen / self.experts) ** batch) if self.experts else 0
        return self.every_token + self.sparse_layers * read * self.expert


def as_peer(name: str, model: ModelConfig) -> Peer:
    """One of our own models in the same terms."""
    count = count_parameters(model)
    return Peer(
        name=name,
        vocab=model.vocab_size,
        width=model.hidden_size,
        layers=model.num_hidden_layers,
        heads=model.num_attention_heads,
        key_heads=model.num_key_value_heads,
        head=model.head_dim,
        dense_layers=model.num_dense_layers,
        dense_hidden=model.intermediate_size,
        expert_hidden=model.moe_intermediate_size,
        experts=model.num_experts,
        chosen=model.num_experts_per_tok,
        shared=model.num_shared_experts,
        window=model.sliding_window,
        windowed_layers=sum(not model.is_global(layer) for layer in range(model.num_hidden_layers)),
        output_gate=True,
        published=(count.total, count.active),
        source="this recipe",
    )


def peer(name: str) -> Peer:
    """The published model of that name; an unknown one is a UsageError."""
    plain = {known.lower(): known for known in PEERS}
    if name.strip().lower() not in plain:
        raise UsageError(f"There is no '{name}' to compare with.", nearest(name, list(PEERS)))
    return PEERS[plain[name.strip().lower()]]


PEERS = {
    peer.name: peer
    for peer in (
        Peer(name="gpt-oss-120b", vocab=201088, width=2880, layers=36, heads=64, key_heads=8, head=64, dense_layers=0,
             dense_hidden=0, expert_hidden=2880, experts=128, chosen=4, window=128, windowed_layers=18, biases=True,
             published=(116.83e9, 5.13e9), source="model card, arXiv 2508.10925, table 1; config.json"),
        Peer(name="AFM-4.5B", vocab=128004, width=2560, layers=36, heads=20, key_heads=4, head=128, dense_layers=36,
             dense_hidden=18432, matrices=2, published=(4.6e9, 4.3e9),
             source="model page (4.6B parameters); shape from config.json as remembered: not checked"),
        Peer(name="GLM-4.5", vocab=151552, width=5120, layers=92, heads=96, key_heads=8, head=128, dense_layers=3,
             dense_hidden=12288, expert_hidden=1536, experts=160, chosen=8, shared=1, published=(355e9, 32e9),
             source="arXiv 2508.06471, table 1; its multi-token layer left out"),
        Peer(name="Qwen3-235B", vocab=151936, width=4096, layers=94, heads=64, key_heads=4, head=128, dense_layers=0,
             dense_hidden=0, expert_hidden=1536, experts=128, chosen=8, published=(235e9, 22e9),
             source="arXiv 2505.09388, table 2; config.json"),
        Peer(name="DeepSeek-V3", vocab=129280, width=7168, layers=61, heads=128, key_heads=128, head=192,
             dense_layers=3, dense_hidden=18432, expert_hidden=2048, experts=256, chosen=8, shared=1,
             latent=Latent(query=1536, key=512, rotary=64, value_head=128), published=(671e9, 37e9),
             source="arXiv 2412.19437, section 4.2; its multi-token layer left out"),
    )
}  # fmt: skip
