"""The engine on a GPU: logits as on a CPU, recordings that compute what their steps do, and its speed, printed."""

import copy
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trinity.ckpt.weights import HeldWeights
from trinity.config.model import ModelConfig
from trinity.engine.device import DeviceRunner
from trinity.engine.narrow import (
    NarrowKind,
    fused,
    narrow_model,
    product_of_few,
    rounded,
    rounded_rows,
    scaled_grouped_loop,
    scaled_grouped_product,
    widened,
)
from trinity.engine.pages import Pools, pages_for
from trinity.engine.runner import runner_for
from trinity.engine.step import Rows
from trinity.kernels.varlen import attend_to_past
from trinity.model.attend import scaled_dot_product, visible
from trinity.model.init import build_model
from trinity.model.transformer import Transformer
from trinity.recipes.table import recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
]
CONFIG = replace(recipe("debug").model, sliding_window=40)
GPU = torch.device("cuda", 0)
LENGTH = 150


def a_model(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """On the GPU, in `dtype` but for what stays in float32."""
    model = build_model(config, 3).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" not in name and "router" not in name:
            parameter.data = parameter.to(dtype)
    return model.to(GPU)


def texts_of(config: ModelConfig, count: int, length: int = LENGTH) -> list[list[int]]:
    return torch.randint(config.vocab_size, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


def read(runner: DeviceRunner, texts: list[list[int]], prompt: int) -> Tensor:
    """Logits [T, B, V] on the CPU of texts that are read together: a prompt at once, then token by token."""
    length = len(texts[0])
    pools = Pools(runner.config, len(texts) * pages_for(length), len(texts), prompt, runner.device, runner.kv_dtype)
    places = [(pools.paged.take(pages_for(length)), pools.take_ring() or []) for _ in texts]
    made = runner.forward([Rows(t[:prompt], 0, *p, prompt) for t, p in zip(texts, places, strict=True)], pools)
    steps = [made.unflatten(0, (len(texts), prompt)).transpose(0, 1).cpu()]
    for at in range(prompt, length):
        rows = [Rows([text[at]], at, *place) for text, place in zip(texts, places, strict=True)]
        steps.append(runner.forward(rows, pools)[None].cpu())
    return torch.cat(steps)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("batch", [1, 3, 19])
@torch.inference_mode()
def test_logits_are_those_of_a_cpu(dtype, off, batch):
    model = a_model(CONFIG, dtype)
    twin = copy.deepcopy(model).cpu().float()
    texts = texts_of(CONFIG, batch)
    runner = runner_for(model)
    assert isinstance(runner, DeviceRunner)
    found, expected = read(runner, texts, 60), read(DeviceRunner(twin), texts, 60)
    # In bfloat16 a token here and there goes to another expert: bounded is the error as a whole.
    assert float((found - expected).norm() / expected.norm()) < off
    routed = batch * LENGTH * CONFIG.num_sparse_layers * CONFIG.num_experts_per_tok
    assert int(runner.expert_rows.sum()) == routed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_recordings_compute_what_their_steps_do(dtype):
    model, texts = a_model(CONFIG, dtype), texts_of(CONFIG, 5)
    recorded, anew = read(DeviceRunner(model), texts, 60), read(DeviceRunner(model, lambda work: work), texts, 60)
    torch.testing.assert_close(recorded, anew, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.05)


@torch.inference_mode()
def test_recordings_follow_others_that_have_all_gone():
    """As from one answer to the next: torch asserts that memory which graphs share is in use."""
    runner, texts = DeviceRunner(a_model(CONFIG, torch.bfloat16)), texts_of(CONFIG, 2)
    first, second = (read(runner, texts, 60) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0.05)


@pytest.mark.parametrize("window", [None, 1, 48, 4096])
@pytest.mark.parametrize("asking", [1, 9, 256])
def test_the_kernel_has_the_last_query_beside_the_last_key(window, asking):
    q, k, v = (torch.randn(1, heads, 256, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    whole = scaled_dot_product(q, k, v, mask=visible(256, window, None, q.device))
    found = attend_to_past(q[:, :, -asking:], k, v, window)
    torch.testing.assert_close(found, whole[:, :, -asking:], rtol=2e-2, atol=2e-2)


NARROW = ["int8", "int4", pytest.param("float8", marks=pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="compute capability is not 9"
))]  # fmt: skip


def a_narrow_model(config: ModelConfig, kind: NarrowKind, device: torch.device = GPU) -> Transformer:
    return narrow_model(config, HeldWeights(build_model(config, 3).state_dict()), kind, device)


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("batch", [1, 3, 19])
@torch.inference_mode()
def test_logits_of_few_bits_are_those_of_their_twins(kind, batch):
    texts = texts_of(CONFIG, batch)
    found = read(DeviceRunner(a_narrow_model(CONFIG, kind)), texts, 60)
    expected = read(DeviceRunner(a_narrow_model(CONFIG, kind, torch.device("cpu"))), texts, 60)
    assert float((found - expected).norm() / expected.norm()) < 0.2  # a token here and there goes to another expert


@pytest.mark.parametrize("kind", NARROW)
@torch.inference_mode()
def test_recordings_of_few_bits_compute_what_their_steps_do(kind):
    model, texts = a_narrow_model(CONFIG, kind), texts_of(CONFIG, 5)
    recorded, anew = read(DeviceRunner(model), texts, 60), read(DeviceRunner(model, lambda work: work), texts, 60)
    torch.testing.assert_close(recorded, anew, rtol=0, atol=0.05)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 3, 8])
@torch.inference_mode()
def test_the_kernel_for_few_rows_is_a_product(kind, rows):
    numbers, scales = (part.cuda() for part in rounded(torch.randn(1000, 384), kind))
    x = torch.randn(rows, 384, device=GPU)
    found = fused(product_of_few)(x, numbers, scales)
    torch.testing.assert_close(found, x @ widened(numbers, scales, torch.float32).T, rtol=1e-3, atol=1e-2)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="compute capability is not 9"
)
@torch.inference_mode()
def test_the_grouped_kernel_of_float8_is_its_twin():
    numbers, scales = (part.cuda() for part in rounded(torch.randn(5, 96, 64), "float8"))
    x, x_scales = rounded_rows(torch.randn(40, 64, device=GPU))
    ends = torch.tensor([3, 3, 20, 39, 40], device=GPU)
    found = scaled_grouped_product(x, x_scales, numbers, scales, ends, torch.bfloat16)
    wanted = scaled_grouped_loop(x, x_scales, numbers, scales, ends, torch.bfloat16)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=0.1)


@pytest.mark.parametrize("kind", ["bfloat16", *NARROW])
@pytest.mark.parametrize("batch", [1, 8, 16])
@torch.inference_mode()
def test_speed(batch, kind, capsys):
    """Tokens a second at lab256's shape, recorded and not. Printed, not judged."""
    config = recipe("lab256").model
    model = a_model(config, torch.bfloat16) if kind == "bfloat16" else a_narrow_model(config, kind)
    texts = texts_of(config, batch, 256)
    for name, runner in (("recorded", DeviceRunner(model)), ("anew", DeviceRunner(model, lambda work: work))):
        read(runner, texts, 128)
        pools = Pools(config, batch * 4, batch, 128, GPU, runner.kv_dtype)
        places = [(pools.paged.take(4), pools.take_ring() or []) for _ in texts]
        seconds = []
        for at in range(128, 192):
            rows = [Rows([text[at]], at, *place) for text, place in zip(texts, places, strict=True)]
            begin = time.perf_counter()
            runner.forward(rows, pools).cpu()
            seconds.append(time.perf_counter() - begin)
        with capsys.disabled():
            middle = sorted(seconds)[len(seconds) // 2]
            speed = f"{batch / middle:,.0f} tokens a second on {torch.cuda.get_device_name()}"
            print(f"\n{kind}, {name}, batch {batch}: {speed}")


@pytest.mark.parametrize("model", ["lab256"])
def test_the_bench_beside_transformers(model, tmp_path, capsys):
    """Shares of the bandwidth, and 64 requests beside transformers' continuous batching. Printed, not judged."""
    script, out = Path(__file__).parents[2] / "bench" / "decode.py", tmp_path / "figures.json"
    sizes = ["--batch", "1", "64", "--prefill", "4096", "--tokens", "64", "--repeats", "3", "--requests", "64"]
    line = [sys.executable, str(script), model, "--device", "cuda", *sizes, "--json", str(out)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=540)
    with capsys.disabled():
        print(f"\n{done.stdout}{done.stderr}")
    assert done.returncode == 0
    found = json.loads(out.read_text())
    assert found["device"] == "cuda" and {"trinity-bfloat16", "transformers-bfloat16"} <= set(found["engines"])
