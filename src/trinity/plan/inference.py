"""Memory of inference, and what a token reads of it: closed forms of what the compiled engine holds.

    keys and values = 2 x key heads x head size x bytes of a value x (global layers x tokens + local layers x ring)

of a request, tokens in whole pages of 64 and a ring of window + step + 64. Weights lie in panels of 64 outputs; router,
norms and selection bias are float32 in any kind. tests/unit/test_plan_inference.py holds both against the engine's own
tensors.

A token at batch 1 reads what is always on, its experts, and its keys and values: bytes over memory bandwidth is the
least time that it can take.
"""

from trinity.config.engine import KvDtype
from trinity.config.model import ModelConfig

PAGE, PANEL, GROUP = 64, 64, 32  # tokens; outputs; values of depth that share a scale
STEP = 512  # tokens read in one step unless somebody says otherwise
KINDS = ("float32", "bfloat16", "int8", "int4")
DTYPES = ("float32", "bfloat16", "float8", "int8", "int4")  # float8 is for GPUs
VALUE_BYTES = {"float32": 4, "bfloat16": 2}  # of keys and values


def whole(count: int, of: int) -> int:
    """`count`, up to the next multiple."""
    return -(-count // of) * of


def cache_bytes(model: ModelConfig, tokens: int, kv_dtype: str, step: int = STEP) -> int:
    """Keys and values of one request of `tokens` tokens, all that the engine holds for it."""
    ring = whole(model.sliding_window + step, PAGE) + PAGE
    return _past(model, whole(tokens, PAGE), ring, kv_dtype)


def weight_bytes(model: ModelConfig, kind: str) -> int:
    """All weights, as the engine packs them."""
    experts = model.num_sparse_layers * model.num_experts * record_bytes(model, kind)
    return _embedding(model, kind) * model.vocab_size + _always(model, kind) + experts


def read_bytes(model: ModelConfig, tokens: int, kind: str, kv_dtype: str) -> int:
    """Weights, keys and values that one more token reads behind `tokens` tokens, alone in its step."""
    experts = model.num_sparse_layers * model.num_experts_per_tok * record_bytes(model, kind)
    past = _past(model, tokens, min(tokens, model.sliding_window), kv_dtype)
    return _embedding(model, kind) + _always(model, kind) + experts + past


def _past(model: ModelConfig, in_global: int, in_local: int, kv_dtype: str) -> int:
    """Keys and values of so many tokens in each global and in each local layer."""
    globals_ = sum(model.is_global(layer) for layer in range(model.num_hidden_layers))
    tokens = globals_ * in_global + (model.num_hidden_layers - globals_) * in_local
    return 2 * model.num_key_value_heads * model.head_dim * VALUE_BYTES[kv_dtype] * tokens


def values_of(kind: str) -> KvDtype:
    """What keys and values are kept in beside weights of `kind`, unless somebody says otherwise."""
    return "float32" if kind == "float32" else "bfloat16"


def matrix_bytes(outputs: int, depth: int, kind: str) -> int:
    """Of a matrix [outputs, depth]; 8 and 4 bits take whole groups of depth, or leave it in float32."""
    values = whole(outputs, PANEL) * depth
    if kind in ("int8", "int4") and depth % GROUP == 0:
        return values // (1 if kind == "int8" else 2) + values // GROUP * 2  # a float16 for each group
    return values * (2 if kind == "bfloat16" else 4)


def _feed_forward(width: int, hidden: int, kind: str) -> int:
    return matrix_bytes(2 * whole(hidden, PANEL // 2), width, kind) + matrix_bytes(width, hidden, kind)


def record_bytes(model: ModelConfig, kind: str) -> int:
    """Of one expert."""
    return _feed_forward(model.hidden_size, model.moe_intermediate_size, kind)


def _embedding(model: ModelConfig, kind: str) -> int:
    """One token's row."""
    return model.hidden_size * (4 if kind == "float32" else 2)


def _always(model: ModelConfig, kind: str) -> int:
    """What every token reads: head, attention, norms, dense layers, routers, shared experts."""
    width, query = model.hidden_size, model.num_attention_heads * model.head_dim
    key, sparse = model.num_key_value_heads * model.head_dim, model.num_sparse_layers
    attention = matrix_bytes(2 * query + 2 * key, width, kind) + matrix_bytes(width, query, kind)
    attention += 4 * (4 * width + 2 * model.head_dim)  # norms
    dense = _feed_forward(width, model.intermediate_size, kind)
    routed = matrix_bytes(model.num_experts, width, "float32") + 4 * model.num_experts
    if model.num_shared_experts:
        routed += _feed_forward(width, model.num_shared_experts * model.moe_intermediate_size, kind)
    head = matrix_bytes(model.vocab_size, width, "int8" if kind == "int4" else kind) + 4 * width  # and the last norm
    return head + model.num_hidden_layers * attention + (model.num_hidden_layers - sparse) * dense + sparse * routed
