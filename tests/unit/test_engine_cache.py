"""The cache against the plain attention on the whole text, for any split into chunks; and its memory."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.config.model import ModelConfig
from trinity.engine.cache import FIRST_ENTRIES, KVCache
from trinity.model.init import build_model
from trinity.plan.memory import kv_bytes
from trinity.recipes.table import recipe


def read_in_chunks(
    config: ModelConfig, tokens: torch.Tensor, sizes: list[int], chunk: int
) -> tuple[torch.Tensor, KVCache]:
    model, cache = build_model(config, 1).eval(), KVCache(config, chunk)
    parts = []
    with torch.inference_mode():
        for part in tokens.split(sizes, dim=1):
            positions = torch.arange(cache.tokens, cache.tokens + part.shape[1])
            parts.append(model(part, positions, cache).hidden)
    return torch.cat(parts, dim=1), cache


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    window=st.sampled_from([1, 2, 5, 16, 33, 64]),
    seed=st.integers(0, 2**31),
)
def test_any_chunking_equals_the_whole_text(sizes: list[int], window: int, seed: int) -> None:
    config = replace(recipe("debug").model, sliding_window=window)
    tokens = torch.randint(config.vocab_size, (1, sum(sizes)), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        whole = build_model(config, 1).eval()(tokens).hidden
    hidden, cache = read_in_chunks(config, tokens, sizes, chunk=40)
    assert cache.tokens == sum(sizes)
    torch.testing.assert_close(hidden, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decoded", [3, 200])
def test_memory_is_the_formula_and_stays_bounded_in_local_layers(decoded: int) -> None:
    config, chunk = recipe("debug").model, 64
    total = 100 + decoded
    tokens = torch.zeros(1, total, dtype=torch.int64)
    _, cache = read_in_chunks(config, tokens, [64, 36] + [1] * decoded, chunk)
    formula = kv_bytes(config, bytes_per_value=4).at(total, config.sliding_window)
    assert cache.bytes_used() == formula
    entry = 2 * config.num_key_value_heads * config.head_dim * 4
    for layer in cache.layers:
        if layer.window is None:
            assert layer.bytes_held() <= 2 * max(total, FIRST_ENTRIES) * entry
        else:
            assert layer.bytes_held() <= (config.sliding_window + chunk) * entry


def test_a_chunk_larger_than_agreed_is_a_defect() -> None:
    config = recipe("debug").model
    with pytest.raises(AssertionError, match="chunks of 8"):
        read_in_chunks(config, torch.zeros(1, 9, dtype=torch.int64), [9], chunk=8)
