"""The compiled decoder against the model's own code, in every kind of weight; and against itself in other company."""

import copy
import os
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trinity.ckpt.weights import HeldWeights
from trinity.config.engine import KvDtype
from trinity.config.model import ModelConfig
from trinity.engine.device import DeviceRunner, likeliest_of
from trinity.engine.pages import PAGE, Pools, kv_bytes_per_token, pages_for
from trinity.engine.runner import CompiledRunner, Runner
from trinity.engine.step import Output, Rows
from trinity.engine.weights import Kind, decoder_weights, interleaved, packed, packed_plainly, unpacked
from trinity.kernels.compiled import is_loaded
from trinity.model.experts import MixtureOfExperts
from trinity.model.init import build_model
from trinity.model.layers import SwiGLU
from trinity.model.transformer import Transformer
from trinity.recipes.table import recipe

STEP = 96  # tokens at most
CONFIGS = {
    "debug": replace(recipe("debug").model, sliding_window=40),
    "odd": replace(recipe("debug").model, sliding_window=100, hidden_size=72, moe_intermediate_size=24, head_dim=12,
                   intermediate_size=52, vocab_size=515, num_shared_experts=0, num_experts=7, mup_enabled=False),
    # Heads for the matrix unit where the processor has AMX.
    "wide": replace(recipe("debug").model, sliding_window=100, head_dim=64),
    "wider": replace(recipe("debug").model, sliding_window=100, head_dim=128, global_attn_every_n_layers=2),
}  # fmt: skip

needs_kernels = pytest.mark.skipif(not is_loaded(), reason="no C++ compiler here")
HAS_AMX = os.environ.get("TRINITY_KERNELS") != "tiles" and is_loaded() and torch.ops.trinity.use_amx(True)
needs_amx = pytest.mark.skipif(not HAS_AMX, reason="this processor has no AMX, or it is left out")


def a_model(config: ModelConfig) -> Transformer:
    model = build_model(config, 3).eval().requires_grad_(False)
    for number, bias in enumerate(model.expert_biases()):
        bias.normal_(0, 0.05, generator=torch.Generator().manual_seed(number))
    return model


def compiled(model: Transformer, kind: Kind = "float32") -> CompiledRunner:
    return CompiledRunner(decoder_weights(model.config, HeldWeights(model.state_dict()), kind))


@pytest.fixture(scope="module", params=CONFIGS)
def model(request) -> Transformer:
    return a_model(CONFIGS[request.param])


def pools_for(
    config: ModelConfig, sequences: int, length: int, kv_dtype: KvDtype = "float32"
) -> tuple[Pools, list[tuple[list[int], list[int]]]]:
    """Pools full of nan, and pages and ring of each sequence, in no order."""
    pools = Pools(config, sequences * pages_for(length) + 3, sequences, STEP, kv_dtype=kv_dtype)
    pools.paged.values.fill_(torch.nan)
    pools.local.values.fill_(torch.nan)
    pools.paged.free.sort(key=lambda page: page * 7 % 5)
    rings = [pools.take_ring() or [] for _ in range(sequences)]
    return pools, [(pools.paged.take(pages_for(length)), ring) for ring in rings]


def read(runner: Runner, tokens: list[int], cuts: list[int], kv_dtype: KvDtype = "float32") -> Tensor:
    """Logits [T, V] of a text that is read in pieces of these lengths, over and over."""
    pools, [(pages, ring)] = pools_for(runner.config, 1, len(tokens), kv_dtype)
    made, start, turn = [], 0, 0
    while start < len(tokens):
        part = tokens[start : start + cuts[turn % len(cuts)]]
        made.append(runner.forward([Rows(part, start, pages, ring, len(part))], pools))
        start, turn = start + len(part), turn + 1
    return torch.cat(made)


def a_text(config: ModelConfig, length: int, seed: int = 0) -> list[int]:
    return torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def plain_logits(model: Transformer, tokens: list[int]) -> Tensor:
    return model.head(model(torch.tensor([tokens])).hidden)[0]


@torch.inference_mode()
def test_pages_change_nothing_for_the_models_own_code(model):
    tokens = a_text(model.config, 230)
    found = read(DeviceRunner(model), tokens, [STEP, 1, 33])
    torch.testing.assert_close(found, plain_logits(model, tokens), rtol=1e-4, atol=1e-4)


@needs_kernels
@torch.inference_mode()
def test_the_compiled_decoder_computes_what_the_model_does(model):
    tokens = a_text(model.config, 230)
    runner, plain = compiled(model), DeviceRunner(model)
    found = read(runner, tokens, [STEP])
    torch.testing.assert_close(found, read(plain, tokens, [STEP]), rtol=1e-3, atol=1e-4)
    assert torch.equal(runner.expert_rows, plain.expert_rows)


@needs_kernels
@needs_amx
@pytest.mark.parametrize("name", ["wide", "wider"])
@torch.inference_mode()
def test_whole_numbers_on_amx_are_as_exact_as_float32(name: str):
    """Against the model in float64, without experts: which of them are chosen turns on the last bit."""
    model = a_model(replace(CONFIGS[name], num_dense_layers=CONFIGS[name].num_hidden_layers))
    tokens = a_text(model.config, 700)
    exact = plain_logits(copy.deepcopy(model).double(), tokens)
    found = []
    try:
        for wanted in (False, True):
            torch.ops.trinity.use_amx(wanted)
            found.append(read(compiled(model), tokens, [STEP]))
    finally:
        torch.ops.trinity.use_amx(True)
    by_float32, on_amx = [(logits - exact).norm() / exact.norm() for logits in found]
    assert not torch.equal(*found) and on_amx < 2.5 * by_float32 < 1e-5


@needs_kernels
@needs_amx
@pytest.mark.parametrize("name", ["wide", "wider"])
@pytest.mark.parametrize("every", [1, 9])  # all layers see all; all see a window
@torch.inference_mode()
def test_pages_of_bfloat16_on_amx_lose_no_more_than_their_rounding(name: str, every: int):
    """Beside the vector unit's float32 over the same rounded keys and values, as those of a single layer are."""
    one = replace(CONFIGS[name], num_hidden_layers=1, num_dense_layers=1, global_attn_every_n_layers=every)
    model, tokens = a_model(one), a_text(one, 700)
    rounded = []
    try:
        for wanted in (False, True):
            torch.ops.trinity.use_amx(wanted)
            rounded.append(read(compiled(model), tokens, [STEP], "bfloat16"))
            kept = read(compiled(model), tokens, [STEP])
    finally:
        torch.ops.trinity.use_amx(True)
    by_vectors, on_amx = rounded
    assert 0 < (on_amx - by_vectors).norm() < 0.03 * (by_vectors - kept).norm()


@needs_kernels
@needs_amx
@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_what_is_no_number_comes_out_of_the_matrix_unit_again(kv_dtype: KvDtype, projection: str):
    model = a_model(replace(CONFIGS["wide"], num_hidden_layers=1, num_dense_layers=1))
    getattr(model.layers[0].self_attn, projection).weight[3] = torch.inf
    assert read(compiled(model), a_text(model.config, 9), [STEP], kv_dtype).isnan().all()


@needs_kernels
@torch.inference_mode()
def test_the_likeliest_token_is_found_with_the_logits(model):
    tokens = a_text(model.config, 90)
    changed = a_model(model.config)
    # The head as it is; every token five times or more; all alike, so that whole rows lie below zero.
    head = changed.lm_head.weight.clone()
    for rows in (range(len(head)), [i % 90 for i in range(len(head))], [0] * len(head)):
        changed.lm_head.weight.copy_(head[rows])
        logits, likeliest = output_of(changed, tokens)
        assert likeliest == logits.argmax(-1).tolist() == likeliest_of(logits)
    assert (logits < 0).all(-1).any() and not any(likeliest)


@needs_kernels
@pytest.mark.parametrize("token", [0, 70, -1])
@torch.inference_mode()
def test_no_token_is_likeliest_where_a_logit_is_no_number(model, token: int):
    changed = a_model(model.config)
    changed.lm_head.weight[token] = 3e38
    logits, likeliest = output_of(changed, a_text(model.config, 9))
    assert logits[:, token].isinf().all() and likeliest == likeliest_of(logits) == [-1] * 9
    changed.lm_head.weight[token] = 1.0
    changed.embed_tokens.weight[5] = torch.nan
    logits, likeliest = output_of(changed, [5])
    assert logits.isnan().all() and likeliest == likeliest_of(logits) == [-1]


def output_of(model: Transformer, tokens: list[int]) -> Output:
    pools, [(pages, ring)] = pools_for(model.config, 1, len(tokens))
    runner = compiled(model)
    return runner.read([Rows(tokens, 0, pages, ring, len(tokens))], pools)


@needs_kernels
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
@torch.inference_mode()
def test_narrow_weights_are_computed_with_as_they_are_unpacked(model, kind: Kind):
    found = read(compiled(model, kind), a_text(model.config, 90), [STEP])
    narrow = a_model(model.config)
    narrowed(narrow, kind)
    torch.testing.assert_close(found, plain_logits(narrow, a_text(model.config, 90)), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, plain_logits(model, a_text(model.config, 90)), rtol=1e-3, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_narrow_keys_and_values_cost_what_they_cost_the_models_own_code(name: str):
    """Without experts: which of them are chosen turns on the last bit."""
    model = a_model(replace(CONFIGS[name], num_dense_layers=CONFIGS[name].num_hidden_layers))
    tokens = a_text(model.config, 230)
    runner, plain = compiled(model), DeviceRunner(model)
    found, twin = read(runner, tokens, [STEP], "bfloat16"), read(plain, tokens, [STEP], "bfloat16")
    off = (plain_logits(model, tokens) - twin).norm() / twin.norm()
    assert 1e-5 < off < 1e-2
    # What differs by a bit before it is rounded may be rounded to the other side, one value in thousands.
    assert (found - twin).norm() / twin.norm() < off / 5


@needs_kernels
@torch.inference_mode()
def test_values_get_into_narrow_pages_as_torch_rounds_them():
    """The pages of the decoder's first layer against the plain twin's: before any attention."""
    config = replace(CONFIGS["debug"], num_hidden_layers=1, num_dense_layers=1)
    model = a_model(config)
    pages = []
    for runner in (compiled(model), DeviceRunner(model)):
        pools, [(paged, ring)] = pools_for(config, 1, PAGE, "bfloat16")
        runner.forward([Rows(a_text(config, PAGE), 0, paged, ring)], pools)
        pages.append(pools.local.values[ring[0]].float())
    assert (pages[0] == pages[1]).float().mean() > 0.99
    torch.testing.assert_close(*pages, rtol=2**-7, atol=1e-6)


def narrowed(model: Transformer, kind: Kind) -> None:
    """Every weight of a model becomes what the decoder makes of it."""

    def narrow(weight: Tensor, kind: Kind = kind) -> None:
        weight.copy_(unpacked(packed(weight, kind), *weight.shape[-2:], kind))

    model.embed_tokens.weight.copy_(model.embed_tokens.weight.bfloat16())
    narrow(model.lm_head.weight, "bfloat16" if kind == "bfloat16" else "int8")
    for block in model.layers:
        attention, mlp = block.self_attn, block.mlp
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.gate_proj, attention.o_proj):
            narrow(projection.weight)
        for part in (mlp, mlp.shared_experts) if isinstance(mlp, MixtureOfExperts) else (mlp,):
            if isinstance(part, SwiGLU):
                for projection in (part.gate_proj, part.up_proj, part.down_proj):
                    narrow(projection.weight)
        if isinstance(mlp, MixtureOfExperts):
            narrow(mlp.experts.gate_up_proj)
            narrow(mlp.experts.down_proj)


@needs_kernels
@pytest.mark.parametrize(
    ("name", "kind", "kv_dtype"),
    [
        ("debug", "float32", "float32"),
        ("debug", "int4", "float32"),
        ("debug", "float32", "bfloat16"),
        ("wide", "float32", "float32"),
        ("wide", "float32", "bfloat16"),
        ("wider", "float32", "bfloat16"),
        ("widest", "float32", "bfloat16"),
    ],
)
@settings(max_examples=12)
@given(seed=st.integers(0, 10**6))
@torch.inference_mode()
def test_no_bit_depends_on_company_or_on_how_a_text_is_cut(name: str, kind: Kind, kv_dtype: KvDtype, seed: int):
    chance = Random(seed)
    # Groups of three queries, which no tile of 16 holds whole; more of a head than goes between scores.
    widest = replace(CONFIGS["wide"], num_attention_heads=6, num_key_value_heads=2, head_dim=192)
    config = CONFIGS.get(name, widest)
    if (name, kind) not in RUNNERS:
        RUNNERS[name, kind] = compiled(a_model(config), kind)
    runner = RUNNERS[name, kind]
    texts = [a_text(config, chance.randint(1, 150), place) for place in range(chance.randint(1, 4))]
    pools, places = pools_for(config, len(texts), 150, kv_dtype)
    made: list[list[Tensor]] = [[] for _ in texts]
    done = [0] * len(texts)
    while any(start < len(text) for start, text in zip(done, texts, strict=True)):
        rows, who = [], []
        for number in chance.sample(range(len(texts)), len(texts)):
            count = min(chance.randint(0, STEP), len(texts[number]) - done[number])
            if count:
                part = texts[number][done[number] : done[number] + count]
                rows.append(Rows(part, done[number], *places[number], count))
                who.append(number)
        if not rows:
            continue
        logits = runner.forward(rows, pools).split([one.wanted for one in rows])
        for number, one, part in zip(who, rows, logits, strict=True):
            made[number].append(part)
            done[number] += len(one.tokens)
    for text, parts in zip(texts, made, strict=True):
        assert torch.equal(torch.cat(parts), read(runner, text, [1], kv_dtype))


RUNNERS: dict[tuple[str, str], CompiledRunner] = {}


@needs_kernels
@pytest.mark.parametrize(
    ("name", "kv_dtype"),
    [("debug", "float32"), ("debug", "bfloat16"), ("wide", "float32"), ("wide", "bfloat16"), ("wider", "bfloat16")],
)
@torch.inference_mode()
def test_threads_change_no_bit_where_one_sequence_is_long(name: str, kv_dtype: KvDtype):
    """Beyond 1,024 tokens a few queries' softmaxes are made in parts, by whoever is free."""
    config = replace(CONFIGS[name], sliding_window=1500, num_hidden_layers=4, max_position_embeddings=4096)
    runner = compiled(a_model(config))
    tokens = a_text(config, 2600)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = read(runner, tokens, [STEP], kv_dtype)
        torch.set_num_threads(3)
        pools, [(pages, ring)] = pools_for(config, 1, len(tokens), kv_dtype)
        for start in range(0, 2590, 74):
            runner.forward([Rows(tokens[start : start + 74], start, pages, ring, 1)], pools)
        few = runner.forward([Rows(tokens[2590:2595], 2590, pages, ring, 5)], pools)
        single = [runner.forward([Rows([tokens[i]], i, pages, ring)], pools) for i in range(2595, 2600)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat([few, *single]), alone[2590:])


@needs_kernels
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@given(outputs=st.integers(1, 140), depth=st.sampled_from([32, 96, 40, 1]), seed=st.integers(0, 99))
def test_the_kernel_packs_as_its_twin_does(kind: Kind, outputs: int, depth: int, seed: int):
    matrices = torch.randn(3, outputs, depth, generator=torch.Generator().manual_seed(seed))
    matrices[0], matrices[1, :, : depth // 2] = 0, matrices[1, :, : depth // 2] * 1e-9
    found, wanted = packed(matrices, kind), packed_plainly(matrices, kind)
    assert found.shape == wanted.shape
    if kind == "int4" and depth % 32 == 0:  # sums of squares in another order
        errors = [unpacked(one, outputs, depth, kind).sub(matrices).square().sum(-1) for one in (found, wanted)]
        torch.testing.assert_close(*errors, rtol=1e-4, atol=0)
        assert float((found != wanted).float().mean()) < 0.01
    else:
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@given(outputs=st.integers(1, 140), groups=st.integers(1, 3), seed=st.integers(0, 99))
def test_packing_keeps_values_to_half_a_step(kind: Kind, outputs: int, groups: int, seed: int):
    matrix = torch.randn(outputs, 32 * groups, generator=torch.Generator().manual_seed(seed))
    matrix[0, :32] = 0
    found = unpacked(packed(matrix, kind), *matrix.shape, kind)
    assert found.shape == matrix.shape and not found[0, :32].any()
    widest = matrix.unflatten(-1, (-1, 32)).abs().amax(-1).repeat_interleave(32, -1)
    step = {"float32": 0.0, "bfloat16": 2**-8, "int8": 1.02 / 254, "int4": 0.19}[kind]
    assert bool(((found - matrix).abs() <= step * widest).all())


def test_a_panel_has_a_gate_and_what_it_multiplies():
    gate, up = torch.arange(40.0)[:, None], torch.arange(40.0)[:, None] + 100
    found = interleaved(gate, up).flatten().tolist()
    assert found[:32] == list(range(32)) and found[32:64] == list(range(100, 132))
    assert found[64:72] == list(range(32, 40)) and found[96:104] == list(range(132, 140)) and len(found) == 128


def test_pages_are_counted():
    pools = Pools(CONFIGS["debug"], 4, 1, STEP)
    pages, ring = pools.paged.take(3), pools.take_ring()
    assert ring is not None and pools.take_ring() is None and len(ring) == pages_for(40 + STEP) + 1
    pools.paged.share(pages[:1])
    pools.paged.release(pages)
    assert pools.paged.in_use == 1 and pools.bytes_in_use() > 0
    pools.paged.release(pages[:1])
    pools.local.release(ring)
    assert pools.paged.in_use == pools.bytes_in_use() == 0
    with pytest.raises(AssertionError, match="free already"):
        pools.paged.release(pages[:1])


@pytest.mark.parametrize(("kv_dtype", "asked"), [("float32", 2), ("bfloat16", 1)])
def test_pools_of_trinity_large_are_what_the_formula_says(kv_dtype: KvDtype, asked: int):
    """60 KiB a token and 720 MiB a request in bfloat16; beside them a ring has room for one step alone."""
    config, tokens = replace(recipe("large").model, max_position_embeddings=524288), 32768
    assert kv_bytes_per_token(config, kv_dtype) == asked * 60 * 2**10
    for step, off in ((64, 0.02), (512, 0.05)):
        pools = Pools(config, pages_for(tokens), 1, step, torch.device("meta"), kv_dtype)
        held = pools.paged.values.nbytes + pools.local.values.nbytes
        assert held == pytest.approx(asked * (60 * 2**10 * tokens + 720 * 2**20), rel=off)
        assert pools.paged.values.nbytes == tokens * kv_bytes_per_token(config, kv_dtype)
        assert pools.local.values.nbytes == asked * 45 * 2 * 8 * 128 * 2 * (config.sliding_window + step + PAGE)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_a_window_moves_to_another_ring(kv_dtype: KvDtype):
    config = CONFIGS["debug"]
    runner, tokens = DeviceRunner(a_model(config)), a_text(config, 2 * PAGE + 9)
    pools, [(pages, ring), (_, other)] = pools_for(config, 2, 200, kv_dtype)
    runner.forward([Rows(tokens[:STEP], 0, pages, ring, 0)], pools)
    runner.forward([Rows(tokens[STEP : 2 * PAGE], STEP, pages, ring, 0)], pools)
    pools.put_window(other, 2 * PAGE, pools.window_of(ring, 2 * PAGE))
    rest = tokens[2 * PAGE :]
    logits = [runner.forward([Rows(rest, 2 * PAGE, pages, one, 9)], pools) for one in (ring, other)]
    assert torch.equal(*logits)
