"""Plans: published totals to the unit, and closed forms beside models built on the meta device."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity.cli.main import main
from trinity.config.model import ModelConfig
from trinity.plan.memory import kv_bytes, training_state_bytes
from trinity.plan.params import count_parameters
from trinity.recipes.table import RECIPES, recipe


@st.composite
def small_configs(draw: st.DrawFn) -> ModelConfig:
    layers = draw(st.integers(1, 6))
    experts = draw(st.integers(1, 6))
    key_heads = draw(st.integers(1, 3))
    return ModelConfig(
        vocab_size=draw(st.integers(2, 40)),
        hidden_size=draw(st.integers(1, 24)),
        intermediate_size=draw(st.integers(1, 24)),
        moe_intermediate_size=draw(st.integers(1, 12)),
        num_hidden_layers=layers,
        num_dense_layers=draw(st.integers(0, layers)),
        num_attention_heads=key_heads * draw(st.integers(1, 3)),
        num_key_value_heads=key_heads,
        head_dim=2 * draw(st.integers(1, 6)),
        num_experts=experts,
        num_experts_per_tok=draw(st.integers(1, experts)),
        num_shared_experts=draw(st.integers(0, 2)),
        sliding_window=draw(st.integers(1, 64)),
        global_attn_every_n_layers=draw(st.integers(1, 5)),
        max_position_embeddings=128,
    )


@pytest.mark.parametrize(
    ("name", "total"), [("nano", 6_120_003_328), ("mini", 26_123_974_400), ("large", 398_635_286_016)]
)
def test_published_totals_to_the_unit(name: str, total: int):
    assert count_parameters(recipe(name).model).total == total


@given(small_configs())
def test_closed_form_equals_the_built_model(config: ModelConfig):
    from trinity.model.init import build_on_meta

    model, count = build_on_meta(config), count_parameters(config)
    assert count.total == sum(tensor.numel() for tensor in model.state_dict().values())
    assert count.total - count.selection_bias == sum(parameter.numel() for parameter in model.parameters())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}

    def in_model(*marks: str) -> int:
        return sum(size for name, size in sizes.items() if any(mark in name for mark in marks))

    assert count.embedding == in_model("embed_tokens") and count.head == in_model("lm_head")
    assert count.routed_experts == in_model("mlp.experts.") and count.shared_experts == in_model("shared_experts")
    assert count.router == in_model("router") and count.norms == in_model("norm")
    assert count.attention + in_model("q_norm", "k_norm") == in_model("self_attn")
    chosen = config.num_experts_per_tok / config.num_experts
    assert count.active_experts == pytest.approx(count.routed_experts * chosen)
    assert count.active <= count.total


@given(small_configs(), st.integers(0, 300))
def test_kv_cache_is_counted_layer_by_layer(config: ModelConfig, tokens: int):
    layer_token = 2 * config.num_key_value_heads * config.head_dim * 2
    kept = [
        tokens if config.is_global(layer) else min(tokens, config.sliding_window)
        for layer in range(config.num_hidden_layers)
    ]
    assert kv_bytes(config).at(tokens, config.sliding_window) == layer_token * sum(kept)


@given(small_configs())
def test_training_state_is_counted_tensor_by_tensor(config: ModelConfig):
    """Weights, gradients and one moment for all; a second moment for what AdamW moves."""
    count = count_parameters(config)
    adamw = count.embedding + count.head + count.router + count.norms
    assert training_state_bytes(config) == 4 * (3 * count.total + adamw)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_plan(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(found["parameters"]["parts"].values()) == found["parameters"]["total"]
    cache = list(found["kv_bytes_bfloat16"].values())
    assert cache == sorted(cache) and cache[0] > 0
    for length, held in found["request_bytes"]["bfloat16"].items():
        assert found["kv_bytes_bfloat16"][length] < held < found["request_bytes"]["float32"][length]
    assert main(["plan", name]) == 0
    assert f"{found['parameters']['total']:,}" in capsys.readouterr().out


def test_a_setting_changes_the_plan(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "debug", "--set", "model.num_experts=16", "--json"]) == 0
    more = json.loads(capsys.readouterr().out)
    assert more["parameters"]["total"] > count_parameters(recipe("debug").model).total


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nanno"], "Did you mean 'nano'?"),
        (["nano", "--set", "model.hiden_size=4"], "Did you mean 'hidden_size'?"),
        (["nano", "--set", "model.num_experts_per_tok=500"], "cannot be chosen from 128"),
        (["nano", "--set", "model"], "is not a setting"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
