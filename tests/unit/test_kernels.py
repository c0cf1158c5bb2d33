"""The compiled CPU kernels beside their plain twins; building them, and doing without."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from trinity.kernels import compiled, products
from trinity.kernels.attention import StretchAttention
from trinity.kernels.norm import Normalise
from trinity.model.attend import Packed, scaled_dot_product, visible
from trinity.model.experts import grouped_matmul_loop, through_experts
from trinity.optim.orthogonalise import orthogonalise

needs_kernels = pytest.mark.skipif(not compiled.is_loaded(), reason="no C++ compiler here: torch does this work")
HAS_AMX = compiled.is_loaded() and torch.ops.trinity.use_amx(True)
needs_amx = pytest.mark.skipif(not HAS_AMX, reason="this processor has no AMX: the other products do its work")


@pytest.mark.skipif(os.environ.get("TRINITY_KERNELS") == "off", reason="kernels are switched off")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_the_kernels_compile():
    """Without them the tests of kernels would be skipped, and all would look well."""
    assert compiled.is_loaded()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both_ways(function, x, weight, upstream):
    """The result and both gradients."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = function(x, weight)
    out.backward(upstream)
    return out.detach(), x.grad, weight.grad if weight.grad is not None else torch.zeros_like(weight)


@needs_kernels
@given(st.integers(1, 700), st.integers(1, 40), st.integers(1, 70), st.integers(0, 99))
def test_a_product_is_that_of_torch(rows, inner, outer, seed):
    x, weight, upstream = normal(rows, inner, seed=seed), normal(outer, inner), normal(rows, outer)
    fast = both_ways(products.Product.apply, x, weight, upstream)
    for a, b in zip(fast, both_ways(F.linear, x, weight, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def sides_of_a_product(rows, depth, columns, turned, flipped):
    """Two sides, each in rows or, turned or flipped, in columns; and what the result may be added to."""
    a = normal(depth, rows).T if turned else normal(rows, depth)
    b = normal(columns, depth, seed=1).T if flipped else normal(depth, columns, seed=1)
    return a, b, normal(rows, columns, seed=2)


@needs_amx
@settings(deadline=None)
@given(
    st.sampled_from([1, 15, 32, 33, 100, 300]), st.sampled_from([0, 1, 31, 64, 500, 2100, 4000]),
    st.sampled_from([1, 16, 47, 96, 1600]), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_a_product_on_amx_is_as_exact_as_one_in_float32(rows, depth, columns, turned, flipped, add):
    """Whole and broken tiles, both orders of memory on both sides, sums over stretches of a great depth."""
    a, b, start = sides_of_a_product(rows, depth, columns, turned, flipped)
    out = start.clone()
    torch.ops.trinity.multiply_by_amx(a, b, out, add)
    exact = a.double() @ b.double() + (start.double() if add else 0)
    room = a.double().abs() @ b.double().abs() + start.double().abs()
    assert (out.double() - exact).abs().le(1e-6 * room).all()  # 8 units of float32's precision, of thousands summed


@needs_amx
def test_all_24_bits_of_float32_reach_a_product_on_amx():
    """Of bfloat16's 8 bits alone, or 16 of two parts, little would be left of these."""
    x = (1 + torch.rand(64, 64, generator=torch.Generator().manual_seed(0))) * 2.0 ** torch.arange(-32, 32)
    out = torch.empty(64, 64)
    torch.ops.trinity.multiply_by_amx(x, torch.eye(64), out, False)
    assert torch.equal(out, x)
    torch.ops.trinity.multiply_by_amx(torch.eye(64), x, out, False)
    assert torch.equal(out, x)
    for broken in (float("nan"), float("inf")):
        x[3, 5] = broken
        torch.ops.trinity.multiply_by_amx(x, normal(64, 64), out, False)
        assert (~out.isfinite()).any(-1).nonzero().flatten().tolist() == [3], "a guard can only see what arrives"


def through(sizes, weighted, inner, hidden, kernels, backwards=1):
    """Tokens through experts of which the e-th gets sizes[e] rows: the result and all gradients."""
    seeds = iter(range(9))
    per_token = 2 if weighted else 1
    experts = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    experts = experts[torch.randperm(len(experts), generator=torch.Generator().manual_seed(0))]
    x = normal(len(experts) // per_token, inner, seed=next(seeds)).requires_grad_()
    gate_up = normal(len(sizes), 2, hidden, inner, seed=next(seeds)).requires_grad_()
    down = normal(len(sizes), inner, hidden, seed=next(seeds)).requires_grad_()
    weights = normal(len(x), 2, seed=next(seeds)).requires_grad_() if weighted else None
    order, ends = experts.argsort(stable=True), torch.tensor(sizes).cumsum(0)
    with pytest.MonkeyPatch.context() as patch:
        if not kernels:
            patch.setattr("trinity.model.experts.fits", lambda *_: False)
            patch.setattr("trinity.model.experts.grouped_matmul", grouped_matmul_loop)
        for _ in range(backwards):
            out = through_experts(x, weights, order, ends, gate_up, down)
            out.backward(normal(*out.shape, seed=8))
    grads = [t.grad if t.grad is not None else torch.zeros_like(t) for t in (x, gate_up, down)]
    return [out.detach(), *grads, *([weights.grad] if weighted else [])]


SIZES = st.lists(st.sampled_from([0, 2, 4, 16, 30, 64, 66, 96, 98, 200]), min_size=1, max_size=6)


@needs_kernels
@settings(deadline=None)
@given(SIZES, st.booleans(), st.integers(1, 50), st.integers(1, 40), st.integers(1, 2))
def test_experts_are_those_of_the_loop(sizes, weighted, inner, hidden, backwards):
    """Uneven counts, empty experts, widths that are no multiple of a vector, rows that are taken in parts, sums."""
    fast = through(sizes, weighted, inner, hidden, kernels=True, backwards=backwards)
    plain = through(sizes, weighted, inner, hidden, kernels=False, backwards=backwards)
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max()) if b.numel() else 1.0))
    for gradient, size in zip(fast[2], sizes, strict=True):
        assert size or not gradient.any(), "an expert without rows has a gradient of exact zeros"


@needs_kernels
def test_counts_of_other_experts_are_refused():
    gate_up, down = normal(2, 2, 4, 8), normal(2, 8, 4)
    for ends in ([10, 20, 40], [10, 39]):
        with pytest.raises(RuntimeError, match="3 counts for 2 experts|every row needs an expert"):
            through_experts(normal(40, 8), None, torch.arange(40), torch.tensor(ends), gate_up, down)


@needs_kernels
def test_nan_reaches_the_result():
    """A guard can only see what arrives."""
    x = normal(40, 8)
    x[3, 2] = float("nan")
    gate_up, down = normal(2, 2, 4, 8), normal(2, 8, 4)
    out = through_experts(x, None, torch.arange(40), torch.tensor([10, 40]), gate_up, down)
    assert out.isnan().any(-1).nonzero().flatten().tolist() == [3]
    q = normal(1, 1, 40, 8)
    q[0, 0, 3, 2] = float("nan")
    seen = StretchAttention.apply(q, normal(1, 1, 40, 8), normal(1, 1, 40, 8), torch.zeros(1, 40, dtype=torch.int64))
    assert seen.isnan().any(-1).nonzero()[:, 2].tolist() == [3]


@needs_kernels
@given(st.integers(1, 300), st.integers(1, 70), st.integers(0, 99))
def test_a_norm_is_that_of_torch(rows, size, seed):
    x, gain, upstream = normal(rows, size, seed=seed), normal(size, seed=1), normal(rows, size, seed=2)
    fast = both_ways(lambda t, w: Normalise.apply(t, w, 1e-5), x, gain, upstream)
    plain = both_ways(lambda t, w: F.rms_norm(t, w.shape, w, 1e-5), x, gain, upstream)
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize(
    "upstream", [torch.ones(()).expand(64, 24), normal(24).expand(64, 24), normal(64, 1).expand(64, 24)]
)
def test_expanded_gradients_count_as_whole_ones(upstream):
    x, weight = normal(64, 16), normal(24, 16)
    fast = both_ways(products.Product.apply, x, weight, upstream)
    for a, b in zip(fast, both_ways(F.linear, x, weight, upstream.clone()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    order, ends = torch.arange(64), torch.tensor([10, 64])
    gate_up, down = normal(2, 2, 5, 24).requires_grad_(), normal(2, 24, 5)
    out = through_experts(normal(64, 24), None, order, ends, gate_up, down)
    (expanded,) = torch.autograd.grad(out, gate_up, upstream, retain_graph=True)
    (whole,) = torch.autograd.grad(out, gate_up, upstream.clone())
    assert torch.equal(expanded, whole)


@needs_kernels
@given(st.integers(1, 130), st.integers(1, 800), st.integers(1, 200), st.booleans(), st.booleans(), st.booleans())
def test_our_tiles_multiply_as_torch_does(rows, depth, columns, left, right, add):
    """The path of processors on which torch's BLAS is not at full width, whatever this one is."""
    a, b, held = sides_of_a_product(rows, depth, columns, left, right)
    out = held.clone()
    torch.ops.trinity.multiply_by_tiles(a, b, out, add)
    torch.testing.assert_close(out, a @ b + (held if add else 0), rtol=1e-4, atol=1e-3)


@needs_kernels
def test_more_threads_change_no_bit():
    """Whole blocks are spread over threads, and each block is computed by one."""
    x, weight, upstream = normal(300, 48), normal(200, 48), normal(300, 200)
    seen = torch.arange(300).expand(1, -1) // 70 * 70
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        grouped = through([0, 130, 2, 0, 168], True, 48, 20, kernels=True)
        single = both_ways(products.Product.apply, x, weight, upstream)
        tiles = torch.empty(300, 200)
        torch.ops.trinity.multiply_by_tiles(x, weight.T, tiles, False)
        deep = torch.zeros(384, 384)
        if HAS_AMX:
            torch.ops.trinity.multiply_by_amx(normal(2100, 384).T, normal(2100, 384, seed=1), deep, False)
        norm = both_ways(lambda t, w: Normalise.apply(t, w, 1e-5), normal(9000, 48), normal(48), normal(9000, 48))
        query, key = x.view(1, 6, 300, 8), x[:, :16].reshape(1, 2, 300, 8)
        attended = both_ways(lambda q, k: StretchAttention.apply(q, k, k.detach(), seen), query, key, query)
        results.append([*grouped, *single, tiles, deep, *norm, *attended, orthogonalise(normal(5, 200, 70))])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernels
@pytest.mark.parametrize("routed", [True, False])
def test_a_second_backward_adds_to_the_gradient_in_place(routed):
    weight = torch.nn.Parameter(normal(3, 2, 4, 4) if routed else normal(8, 4))
    down, order, ends = normal(3, 4, 4), torch.arange(40), torch.tensor([3, 3, 40])
    first, second = normal(40, 4, seed=1), normal(40, 4, seed=2)

    def run(x):
        out = through_experts(x, None, order, ends, weight, down) if routed else products.linear(x, weight)
        out.square().sum().backward()

    alone = []
    for x in (first, second):
        weight.grad = None
        run(x)
        alone.append(weight.grad.clone())
    weight.grad = None
    run(first)
    place = weight.grad.data_ptr()
    run(second)
    assert weight.grad.data_ptr() == place
    torch.testing.assert_close(weight.grad, alone[0] + alone[1], rtol=1e-5, atol=1e-4)


@needs_kernels
def test_gradients_that_are_only_asked_for_leave_those_held_alone():
    weight = torch.nn.Parameter(normal(8, 4))
    products.linear(normal(20, 4), weight).sum().backward()
    held = weight.grad.clone()
    (asked,) = torch.autograd.grad(products.linear(normal(20, 4, seed=1), weight).sum(), weight)
    assert torch.equal(weight.grad, held)
    assert not torch.equal(asked, held)
    heard = []
    weight.register_hook(heard.append)
    products.linear(normal(20, 4), weight).sum().backward()
    assert len(heard) == 1, "a hook on the weight still hears its gradient"
    torch.testing.assert_close(weight.grad, 2 * held)


@needs_kernels
@given(st.lists(st.integers(1, 150), min_size=1, max_size=4), st.sampled_from([1, 3, 64, 70, None]), st.integers(1, 9))
def test_attention_and_its_gradients_are_those_of_the_plain_mask(lengths, window, size):
    """Documents that begin and end inside tiles, windows shorter and longer than a tile, shared key heads."""
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1)
    total = sum(lengths)
    packed, plain = Packed(documents), Packed(documents)
    plain._starts = None
    results = []
    for attend in (packed, plain):
        q, k, v = (normal(2, heads, total, size, seed=heads).requires_grad_() for heads in (6, 3, 3))
        out = attend(0, q, k, v, window)
        out.backward(normal(*out.shape))
        results.append((out.detach(), q.grad, k.grad, v.grad))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_a_document_that_comes_back_is_one_document():
    """Stretches cannot say that; the mask can."""
    attend = Packed(torch.tensor([[0, 1, 0, 2]]))
    q, k, v = normal(1, 2, 4, 8), normal(1, 2, 4, 8, seed=1), normal(1, 2, 4, 8, seed=2)
    expected = scaled_dot_product(q, k, v, mask=visible(4, None, attend.document_ids, q.device))
    torch.testing.assert_close(attend(0, q, k, v, None), expected)


@needs_kernels
@pytest.mark.parametrize("amx", [False, pytest.param(True, marks=needs_amx)])
@pytest.mark.parametrize("shape", [(5, 64, 96), (5, 96, 64), (70, 70), (2, 3, 65, 90), (300, 80), (7, 7), (5, 24, 16)])
def test_orthogonalised_stacks_are_those_of_torch(shape, amx, monkeypatch):
    matrices = normal(*shape)
    torch.ops.trinity.use_amx(amx)
    fast = orthogonalise(matrices)
    torch.ops.trinity.use_amx(HAS_AMX)
    monkeypatch.setattr("trinity.optim.orthogonalise.fits", lambda *_: False)
    torch.testing.assert_close(fast, orthogonalise(matrices), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fake", [True, False])
def test_shapes_are_traced_without_values(fake):
    """What a dry run does: float32 tensors without memory, forward and backward."""
    with FakeTensorMode() if fake else torch.device("meta"):
        x, weights = torch.empty(12, 8, requires_grad=True), torch.empty(12, 2)
        gate_up, down = torch.empty(3, 2, 4, 8, requires_grad=True), torch.empty(3, 8, 4, requires_grad=True)
        order, ends = torch.empty(24, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
        out = through_experts(x, weights, order, ends, gate_up, down)
        out.sum().backward()
    assert (out.shape, x.grad.shape, gate_up.grad.shape, down.grad.shape) == (
        (12, 8), x.shape, gate_up.shape, down.shape,
    )  # fmt: skip


PRINT = (
    "import torch, os\nfrom trinity.kernels.products import linear\n"
    "x = torch.arange(64.0).view(16, 4)\nprint(linear(x, x).equal(x @ x.T))\n"
)


def run_apart(folder: Path, **environment: str) -> subprocess.Popen:
    variables = {**os.environ, "XDG_CACHE_HOME": str(folder), **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", PRINT], env=variables, **pipes)


@needs_kernels
def test_processes_that_start_together_build_once(tmp_path):
    """The compiler of this test writes down its calls and hands out the library that the other tests have built."""
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    compiler.write_text(f"""#!/bin/sh
for word in "$@"; do [ "$before" = -o ] && goal=$word; before=$word; done
echo "$goal" >> {calls}
sleep 0.3
cp {compiled._built()} "$goal"
""")
    compiler.chmod(0o755)
    together = [run_apart(tmp_path, CXX=str(compiler)) for _ in range(2)]
    ends = [process.communicate(timeout=250) for process in together]
    assert [out.strip() for out, _ in ends] == ["True", "True"]
    assert "".join(error for _, error in ends).count("Compiling the CPU kernels") == 1
    assert [path.suffix for path in (tmp_path / "trinity").iterdir() if path.suffix != ".lock"] == [".so"]
    made = [Path(line).name for line in calls.read_text().splitlines()]
    assert len(made) == len(set(made)) == len(list(Path(compiled.__file__).parent.glob("*.cpp"))) + 1
    assert made[-1].endswith(".so"), "linked last, from the objects of every source"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CXX": "/bin/false"}, "Install g++ to have them built."),
        ({"CXX": "/nowhere/g++"}, "Install g++ to have them built."),
        ({"XDG_CACHE_HOME": "/proc/nothing"}, "Make that a place to write in, or name another as XDG_CACHE_HOME."),
        ({"TRINITY_KERNELS": "off"}, ""),
    ],
)
def test_without_a_compiler_torch_does_the_work(tmp_path, environment, said):
    out, error = run_apart(tmp_path, **environment).communicate(timeout=120)
    assert out.strip() == "True"
    assert error.count("The CPU kernels are not used") == bool(said) and "Traceback" not in error
    assert error.strip().endswith(said)
