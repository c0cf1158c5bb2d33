"""Weights of fewer bits in the model's own modules, as a GPU has them: the same code, with its kernels' twins."""

import inspect
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_engine_device import Tapes, anew
from test_engine_runner import CONFIGS, STEP, a_model, a_text, compiled, plain_logits, pools_for, read
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from trinity.base.errors import CheckpointError, UsageError
from trinity.ckpt.hf import write_hf
from trinity.ckpt.weights import HeldWeights
from trinity.config.engine import EngineLimits
from trinity.engine import limits, narrow
from trinity.engine.device import DeviceRunner
from trinity.engine.loaded import load
from trinity.engine.narrow import Float8Experts, Float8Linear, NarrowExperts, NarrowKind, NarrowLinear
from trinity.engine.pages import PAGE, kv_bytes_per_token, ring_bytes
from trinity.engine.step import Rows
from trinity.engine.weights import packed, unpacked
from trinity.kernels.compiled import is_loaded
from trinity.model.experts import Experts, grouped_matmul_loop
from trinity.model.layers import Linear
from trinity.model.transformer import Transformer
from trinity.text.train_bpe import train_bpe

CPU = torch.device("cpu")
KINDS: list[NarrowKind] = ["float8", "int8", "int4"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def narrow_of(model: Transformer, kind: NarrowKind) -> Transformer:
    return narrow.narrow_model(model.config, HeldWeights(model.state_dict()), kind, CPU)


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("kind", ["int8", "int4"])
@given(outputs=st.integers(1, 70), groups=st.integers(1, 3), seed=st.integers(0, 99))
def test_numbers_are_those_of_the_compiled_decoder(kind: NarrowKind, outputs: int, groups: int, seed: int):
    matrices = normal(2, outputs, 32 * groups, seed=seed)
    numbers, scales = narrow.rounded(matrices, kind)
    assert numbers.nbytes + scales.nbytes == matrices.numel() * {"int8": 17, "int4": 9}[kind] // 16
    wanted = unpacked(packed(matrices, kind), outputs, 32 * groups, kind)  # type: ignore[arg-type]
    assert torch.equal(narrow.widened(numbers, scales, torch.float32), wanted)


@pytest.mark.skipif(not is_loaded(), reason="no C++ compiler here")
@pytest.mark.parametrize("name", ["debug", "odd", "wide"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@torch.inference_mode()
def test_logits_are_those_of_the_compiled_decoder(name: str, kind: NarrowKind):
    """In float32, so that no token goes to another expert; sizes that are no multiples of 32 stay as they are."""
    model, tokens = a_model(CONFIGS[name]), a_text(CONFIGS[name], 150)
    found = read(DeviceRunner(narrow_of(model, kind).float()), tokens, [STEP, 1, 33])
    if name == "odd":  # the compiled decoder keeps these in float32, here they are bfloat16
        assert not torch.equal(found, plain_logits(model, tokens)) and off(found, plain_logits(model, tokens)) < 0.2
        return
    torch.testing.assert_close(found, read(compiled(model, kind), tokens, [STEP]), rtol=1e-3, atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_which_matrices_are_narrow_and_what_they_take(kind: NarrowKind):
    for name, config in CONFIGS.items():
        model = narrow_of(a_model(config), kind)
        plain = [name for name, module in model.named_modules() if isinstance(module, Linear | Experts)]
        if name != "odd":
            assert plain == [n for n, _ in model.named_modules() if n.endswith("router.gate")] + ["lm_head"] * (
                kind == "float8"
            )
        state = model.state_dict()
        assert sum(tensor.nbytes for tensor in state.values()) == narrow.narrow_bytes(config, kind)
        assert state["embed_tokens.weight"].dtype == torch.bfloat16 and state["norm.weight"].dtype == torch.float32
        assert all(state[name].dtype == torch.float32 for name in state if "router" in name or "expert_bias" in name)


def test_the_head_of_four_bits_has_eight():
    model = narrow_of(a_model(CONFIGS["debug"]), "int4")
    assert model.lm_head.numbers.dtype == torch.int8
    assert model.layers[0].self_attn.q_proj.numbers.dtype == torch.uint8


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_recording_computes_what_its_step_does(kind: NarrowKind):
    """To the bit, nothing in it waits for the host: of few rows experts are read one by one."""
    model = narrow_of(a_model(CONFIGS["debug"]), kind)
    if kind == "float8":  # on a CPU the twin of its grouped product reads its offsets; recorded is all else
        for module in model.modules():
            if isinstance(module, Float8Experts):
                module.forward = lambda x, weights, order, ends: x * 0.5  # type: ignore[method-assign]
    texts = [a_text(model.config, 60, number) for number in range(3)]
    tapes, made = Tapes(), []
    for record in (anew, tapes):
        runner = DeviceRunner(model, record)
        pools, places = pools_for(model.config, 3, 60, "bfloat16")
        for text, place in zip(texts, places, strict=True):
            runner.forward([Rows(text[:50], 0, *place, 0)], pools)
        for at in range(50, 60):
            made.append(runner.forward([Rows([t[at]], at, *p) for t, p in zip(texts, places, strict=True)], pools))
    assert tapes.recorded == 1 and tapes.replayed == 9
    for one, replayed in zip(made[:10], made[10:], strict=True):
        assert torch.equal(one, replayed) and torch.isfinite(replayed).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@given(rows=st.integers(1, 9), outputs=st.integers(1, 40), seed=st.integers(0, 99))
def test_the_form_for_few_rows_is_a_product(kind: NarrowKind, rows: int, outputs: int, seed: int):
    x, (numbers, scales) = normal(rows, 64, seed=seed), narrow.rounded(normal(outputs, 64, seed=seed + 1), kind)
    found = narrow.product_of_few(x, numbers, scales)
    torch.testing.assert_close(found, F.linear(x, narrow.widened(numbers, scales, x.dtype)), rtol=1e-4, atol=1e-4)


def some_experts(kind: NarrowKind, rows: int) -> tuple[NarrowExperts | Float8Experts, Tensor, Tensor, Tensor]:
    """6 experts of width 64 and hidden width 32; rows for them, weights and what they chose."""
    experts = Float8Experts(6, 64, 32) if kind == "float8" else NarrowExperts(6, 64, 32, kind)
    parts = (*narrow.rounded(normal(6, 2, 32, 64), kind), *narrow.rounded(normal(6, 64, 32, seed=1), kind))
    names = ("gate_up_numbers", "gate_up_scales", "down_numbers", "down_scales")
    experts.load_state_dict(dict(zip(names, parts, strict=True)), assign=True)
    chosen = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(n))[:2] for n in range(rows)])
    return experts, normal(rows, 64, seed=2), normal(rows, 2, seed=3).sigmoid(), chosen


def grouped(experts: NarrowExperts | Float8Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    numbers, order = chosen.flatten().sort(stable=True)
    return experts(x, weights, order, torch.searchsorted(numbers, torch.arange(6), right=True))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_form_for_few_rows_is_that_of_experts(kind: NarrowKind, rows: int):
    experts, x, weights, chosen = some_experts(kind, rows)
    assert isinstance(experts, NarrowExperts)
    wanted = grouped(experts, x, weights, chosen)
    torch.testing.assert_close(experts.by_row(x, weights, chosen), wanted, rtol=1e-4, atol=1e-3)
    stacks = (experts.gate_up_numbers, experts.gate_up_scales), (experts.down_numbers, experts.down_scales)
    found = narrow.experts_of_few(x, weights, chosen, *stacks)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:bf16 and fp16 are mixed", "ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_torch_compiles_computes_the_same_in_few_kernels(kind: NarrowKind):
    """A product of few rows is one kernel: nothing of the matrix is written down on the way. In C++, not in Triton."""
    from torch._inductor import metrics

    numbers, scales = narrow.rounded(normal(100, 64), kind)
    experts, x, weights, chosen = some_experts(kind, 3)
    assert isinstance(experts, NarrowExperts)
    stacks = (experts.gate_up_numbers, experts.gate_up_scales), (experts.down_numbers, experts.down_scales)
    for function, arguments, most in (
        (narrow.product_of_few, (x, numbers, scales), 1),
        (narrow.experts_of_few, (x, weights, chosen, *stacks), 4),
        (narrow.widened, (numbers, scales, torch.bfloat16), 2),
        (narrow.rounded_rows, (x,), 4),
    ):
        torch._dynamo.reset()
        metrics.reset()
        found, wanted = narrow.fused(function)(*arguments), function(*arguments)
        assert 0 < metrics.generated_kernel_count <= most, function
        for one, other in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
            torch.testing.assert_close(one.float(), other.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:bf16 and fp16 are mixed", "ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("kind", ["int8", "int4"])
@torch.inference_mode()
def test_a_whole_model_of_compiled_functions(kind: NarrowKind, monkeypatch: pytest.MonkeyPatch):
    """Steps of many sizes, few and more rows than are read as they are, in a number of variants that does not grow."""
    runner = DeviceRunner(narrow_of(a_model(CONFIGS["debug"]), kind).float(), anew)
    made: list[list[Tensor]] = []
    for fuses in (False, True):
        monkeypatch.setattr(narrow, "fuses", lambda _, fuses=fuses: fuses)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        made.append([])
        for batch in (1, 2, 3, 5, 8, 9, 12, 17):
            texts = [a_text(runner.config, 44, number) for number in range(batch)]
            pools, places = pools_for(runner.config, batch, 44)
            made[-1].append(
                runner.forward([Rows(t[:40], 0, *p, 40) for t, p in zip(texts, places, strict=True)], pools)
            )
            for at in range(40, 44):
                rows = [Rows([text[at]], at, *place) for text, place in zip(texts, places, strict=True)]
                made[-1].append(runner.forward(rows, pools))
    torch.testing.assert_close(made[1], made[0], rtol=1e-3, atol=1e-4)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 24


@given(rows=st.integers(1, 9), seed=st.integers(0, 99))
def test_float8_multiplies_what_was_rounded(rows: int, seed: int):
    """Within the rounding of the result to bfloat16; and what was rounded is within an eighth of each value."""
    x, matrix = normal(rows, 64, seed=seed) * 5, normal(96, 64, seed=seed + 1)
    linear = Float8Linear(96, 64)
    numbers, scales = narrow.rounded(matrix, "float8")
    linear.load_state_dict({"numbers": numbers, "scales": scales}, assign=True)
    x_numbers, x_scales = narrow.rounded_rows(x)
    exact = (x_numbers.double() * x_scales.unsqueeze(1)) @ (numbers.double() * scales.unsqueeze(1)).T
    torch.testing.assert_close(linear(x).double(), exact, rtol=2**-7, atol=1e-2)
    torch.testing.assert_close(numbers.float() * scales.unsqueeze(1), matrix, rtol=1 / 16, atol=1e-3)
    assert off(linear(x), x @ matrix.T) < 0.06


@pytest.mark.parametrize("rows", [1, 40])
def test_experts_of_float8_are_those_experts(rows: int):
    experts, x, weights, chosen = some_experts("float8", rows)
    assert isinstance(experts, Float8Experts)
    gate_up = experts.gate_up_numbers.float() * experts.gate_up_scales.unsqueeze(-1)
    down = experts.down_numbers.float() * experts.down_scales.unsqueeze(-1)
    wanted = torch.zeros_like(x)
    for row in range(rows):
        for weight, expert in zip(weights[row], chosen[row].tolist(), strict=True):
            gate, up = (gate_up[expert] @ x[row]).unbind(0)
            wanted[row] += weight * (down[expert] @ (F.silu(gate) * up))
    assert off(grouped(experts, x, weights, chosen), wanted) < 0.06  # inputs are rounded, too


def test_the_twin_of_the_grouped_product_of_float8():
    x, ends = normal(9, 64), torch.tensor([2, 2, 9])
    numbers, scales = narrow.rounded(normal(3, 32, 64, seed=1), "float8")
    found = narrow.scaled_grouped_loop(*narrow.rounded_rows(x), numbers, scales, ends, torch.float32)
    wanted = grouped_matmul_loop(x, numbers.float() * scales.unsqueeze(-1), ends)
    assert found.shape == wanted.shape and off(found, wanted) < 0.04


def test_torch_takes_the_layout_of_the_grouped_product_of_float8():
    """By its own checks, which need no GPU: those of the operator that `scaled_grouped_mm` has replaced."""
    x, ends = normal(9, 64), torch.tensor([2, 2, 9], dtype=torch.int32)
    numbers, scales = narrow.rounded(normal(3, 2, 16, 64, seed=1), "float8")
    rows = [part.to("meta") for part in narrow.rounded_rows(x)]
    stack, its_scales = numbers.flatten(1, 2).to("meta"), scales.flatten(1, 2).to("meta")
    made = torch._scaled_grouped_mm(
        rows[0], stack.transpose(1, 2), rows[1], its_scales, offs=ends.to("meta"), out_dtype=torch.bfloat16
    )
    assert made.shape == (9, 32)


@torch.inference_mode()
def test_float8_loses_what_its_three_bits_lose():
    """Without experts: which of them are chosen turns on less."""
    model = a_model(replace(CONFIGS["debug"], num_dense_layers=CONFIGS["debug"].num_hidden_layers))
    tokens = a_text(model.config, 90)
    errors = [off(read(DeviceRunner(one), tokens, [STEP]), plain_logits(model, tokens))
              for one in (narrow_of(model, "float8"), narrow_of(model, "int8"), narrow_of(model, "int4"))]  # fmt: skip
    assert errors[1] < errors[0] < errors[2] < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_weights_are_refused(kind: NarrowKind):
    model = a_model(CONFIGS["debug"])
    model.layers[1].self_attn.v_proj.weight[3, 5] = torch.nan
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.v_proj has values"):
        narrow_of(model, kind)


def a_folder(path: Path) -> None:
    tokenizer = train_bpe([inspect.getsource(textwrap)], 512)
    write_hf(path, a_model(CONFIGS["debug"]))
    tokenizer.save(path)


def test_float8_is_refused_where_it_has_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    a_folder(tmp_path)
    with pytest.raises(UsageError, match="float8 is for GPUs. Use --device cuda where there is one, or --dtype int8"):
        load(tmp_path, dtype="float8", device="cpu")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (8, 0))
    with pytest.raises(UsageError, match=r"needs a GPU of compute capability 9; this one has 8\.0. Use --dtype int8"):
        narrow.check_float8(torch.device("cuda", 0))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_gpu_takes_the_models_own_code(kind: NarrowKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A device without memory stands for it, and what torch.compile is asked to write runs as it is."""
    a_folder(tmp_path)
    monkeypatch.setattr(narrow, "fused", lambda function: function)
    monkeypatch.setattr("trinity.engine.loaded.device_named", lambda _: torch.device("meta"))
    monkeypatch.setattr("trinity.engine.loaded.available_bytes", lambda _: 10**9)
    runner = load(tmp_path, dtype=kind).runner
    assert isinstance(runner, DeviceRunner) and isinstance(runner.model.layers[0].self_attn.q_proj, NarrowLinear)
    assert runner.kv_dtype == "bfloat16" and runner.weight_bytes == narrow.narrow_bytes(runner.config, kind)
    monkeypatch.setattr("trinity.engine.loaded.available_bytes", lambda _: 1000)
    with pytest.raises(UsageError, match=rf"{kind} takes .* for weights and a step; 1000 B are free"):
        load(tmp_path, dtype=kind)


def test_a_gpu_for_which_nothing_can_be_compiled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In Triton's words, within those of torch.compile."""

    def failing(*_: object) -> None:
        said = "Failed to find C compiler. Specify it via CC.\n\nSet TORCHDYNAMO_VERBOSE=1"
        raise RuntimeError(f"backend='inductor' raised:\nRuntimeError: {said}")

    a_folder(tmp_path)
    monkeypatch.setattr(narrow, "fused", lambda _: failing)
    monkeypatch.setattr("trinity.engine.loaded.device_named", lambda _: torch.device("meta"))
    monkeypatch.setattr("trinity.engine.loaded.available_bytes", lambda _: 10**9)
    with pytest.raises(UsageError) as told:
        load(tmp_path, dtype="int4")
    assert str(told.value) == (
        "torch.compile writes no kernels here, which fewer bits need: RuntimeError: Failed to find C compiler. Specify "
        "it via CC. Install Triton and a C compiler such as gcc, or use --dtype bfloat16."
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:bf16 and fp16 are mixed", "ignore:.torch.jit.script_method:DeprecationWarning")
def test_what_torch_says_without_a_compiler_is_one_sentence():
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}), torch._inductor.utils.fresh_cache():
        torch._dynamo.reset()
        with pytest.raises(UsageError, match=r"need: InvalidCxxCompiler: .*/nowhere/g\+\+.*\. Install Triton and a C"):
            narrow.check_kernels(CPU)
    torch._dynamo.reset()
    narrow.check_kernels(CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_room_is_left_for_what_is_made_wide(kind: NarrowKind, monkeypatch: pytest.MonkeyPatch):
    """The experts of a layer, or the largest matrix: here the head."""
    config = CONFIGS["debug"]
    experts = 2 * 3 * config.num_experts * config.hidden_size * config.moe_intermediate_size
    head, ring = 2 * 10**4 * config.hidden_size, ring_bytes(config, 64, "bfloat16")
    asked, page = (
        EngineLimits(max_active=1, step_tokens=64, window_bytes=0),
        PAGE * kv_bytes_per_token(config, "bfloat16"),
    )
    for size, wide in ((64, experts), (10**4, head)):
        model = narrow_of(a_model(replace(config, vocab_size=size)), kind)
        assert narrow.widest_bytes(model) == (0 if kind == "float8" else wide) and experts < head
        free = narrow.widest_bytes(model) + ring + 4 * page  # half of four pages may be taken
        monkeypatch.setattr(limits, "available_bytes", lambda _, free=free: free)
        assert len(limits.pools_for(DeviceRunner(model), asked).paged.uses) == 2


@pytest.mark.parametrize(("batch", "recorded"), [(16, 1), (17, 0)])
@torch.inference_mode()
def test_steps_that_make_experts_wide_are_not_recorded(batch: int, recorded: int):
    tapes = Tapes()
    runner = DeviceRunner(narrow_of(a_model(CONFIGS["debug"]), "int4"), tapes)
    pools, places = pools_for(runner.config, batch, 2, "bfloat16")
    for at in range(2):
        runner.forward([Rows([5], at, *place) for place in places], pools)
    assert tapes.recorded == recorded
