"""Our model against transformers' AfmoeForCausalLM: the same weights, the same logits, gradients and continuations."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AfmoeConfig, AfmoeForCausalLM

from trinity.ckpt.hf import published_config, read_hf, write_hf
from trinity.ckpt.names import slot_of
from trinity.config.model import ModelConfig
from trinity.engine.device import DeviceRunner
from trinity.engine.pages import Pools
from trinity.engine.runner import runner_for
from trinity.engine.step import Rows
from trinity.model.attend import Packed
from trinity.model.generate import continue_greedily
from trinity.model.init import build_model
from trinity.model.transformer import Transformer


def small_config(**changes) -> ModelConfig:
    shape = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 5,
        "num_dense_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "route_scale": 2.4,
        "sliding_window": 5,
        "max_position_embeddings": 64,
    }
    return ModelConfig(**{**shape, **changes})


def twins(config: ModelConfig, seed: int) -> tuple[Transformer, AfmoeForCausalLM]:
    """The same random weights and non-zero expert biases in both models."""
    ours = build_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        for bias in ours.expert_biases():
            bias.copy_(torch.randn(bias.shape, generator=generator) * 0.2)
    values = published_config(config, torch.float32, 5e-4)
    theirs = AfmoeForCausalLM(AfmoeConfig(**{k: v for k, v in values.items() if k not in ("architectures", "dtype")}))
    theirs.eval()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if name.endswith("experts.gate_up_proj"):
                tensor.copy_(ours.state_dict()[name.removeprefix("model.")].flatten(1, 2))
            else:
                tensor.copy_(ours.state_dict()[name.removeprefix("model.")])
    return ours, theirs


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


configs = st.builds(
    small_config,
    num_dense_layers=st.integers(0, 3),
    num_hidden_layers=st.integers(4, 6),
    num_key_value_heads=st.sampled_from([1, 2, 4]),
    num_experts_per_tok=st.integers(1, 4),
    num_shared_experts=st.integers(1, 2),
    sliding_window=st.sampled_from([2, 5, 11, 40]),
    mup_enabled=st.booleans(),
    global_attn_every_n_layers=st.sampled_from([2, 4]),
    rope_theta=st.sampled_from([100.0, 10000.0]),
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configs, st.integers(0, 10**6), st.integers(1, 3), st.integers(2, 30))
def test_logits_and_gradients_are_equal(config, seed, rows, length):
    ours, theirs = twins(config, seed)
    theirs.train()
    tokens = torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    logits = ours.head(ours(tokens).hidden)
    expected = theirs(input_ids=tokens).logits
    assert relative_error(logits, expected) <= 1e-5
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    mine = dict(ours.named_parameters())
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    # Where the exact gradient is zero (a router choosing one expert), theirs is rounding noise of the whole.
    noise = 1e-7 * float(torch.stack([gradient.norm() for gradient in wanted.values()]).norm())
    for name, gradient in wanted.items():
        found = mine[name.removeprefix("model.")].grad
        error = float((found.flatten() - gradient.flatten()).norm())
        assert error <= 1e-5 * float(gradient.norm()) + noise, name


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_equal_where_there_is_text(side):
    ours, theirs = twins(small_config(), 3)
    tokens = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 4, 13)):
        if padding:
            mask[row, slice(0, padding) if side == "left" else slice(-padding, None)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
        logits = ours.head(ours(tokens, positions=positions, attend=Packed(mask)).hidden)
    assert relative_error(logits[mask.bool()], expected[mask.bool()]) <= 1e-5


def test_greedy_continuations_are_identical_with_and_without_their_cache():
    ours, theirs = twins(small_config(), 7)
    prompt = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(0))
    mine = continue_greedily(ours, prompt[0].tolist(), 30)
    for use_cache in (True, False):
        out = theirs.generate(
            prompt, max_new_tokens=30, min_new_tokens=30, do_sample=False, use_cache=use_cache, pad_token_id=0
        )
        assert out[0, 9:].tolist() == mine


@pytest.mark.parametrize("made", [runner_for, DeviceRunner])
@pytest.mark.parametrize("chunks", [[23], [1] * 23, [9, 1, 1, 7, 5]])
def test_logits_over_our_pages_equal_theirs_over_their_cache(chunks, made):
    """Windows of 5 are shorter than the text; every chunk is compared, prompt and single tokens alike."""
    ours, theirs = twins(small_config(), 5)
    runner, pools = made(ours), Pools(ours.config, 1, 1, 23)
    pages, ring = pools.paged.take(1), pools.take_ring()
    tokens = torch.randint(0, 97, (1, 23), generator=torch.Generator().manual_seed(0))
    past, start = None, 0
    with torch.no_grad():
        for length in chunks:
            part = tokens[:, start : start + length]
            logits = runner.forward([Rows(part[0].tolist(), start, pages, ring, length)], pools)
            out = theirs(input_ids=part, past_key_values=past, use_cache=True)
            past, start = out.past_key_values, start + length
            assert relative_error(logits[None], out.logits) <= 1e-5


def test_transformers_reads_our_folder_and_we_read_it_back_unchanged(tmp_path):
    ours, _ = twins(small_config(), 11)
    write_hf(tmp_path, ours, shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    theirs = AfmoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, 97, (2, 25), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error(ours.head(ours(tokens).hidden), theirs(input_ids=tokens).logits) <= 1e-5
    back = read_hf(tmp_path)
    assert back.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_we_read_a_folder_written_by_transformers(tmp_path):
    ours, theirs = twins(small_config(), 13)
    theirs.save_pretrained(tmp_path)
    back = read_hf(tmp_path)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_the_written_config_names_every_router_key_and_both_rope_forms(tmp_path):
    ours, _ = twins(small_config(), 1)
    write_hf(tmp_path, ours, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("score_func", "route_norm", "route_scale", "n_group", "topk_group", "num_experts", "num_local_experts",
                "num_experts_per_tok", "num_shared_experts", "num_dense_layers", "load_balance_coeff", "layer_types",
                "global_attn_every_n_layers", "mup_enabled", "head_dim", "rope_theta", "rope_parameters"):  # fmt: skip
        assert key in config, key
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        biases = [name for name in file.keys() if name.endswith("expert_bias")]  # noqa: SIM118
        assert len(biases) == 4
        assert all(file.get_tensor(name).dtype == torch.float32 for name in biases)
        assert file.get_tensor("lm_head.weight").dtype == torch.bfloat16


def test_every_published_name_has_one_slot():
    ours, theirs = twins(small_config(), 1)
    state = ours.state_dict()
    from trinity.ckpt.names import published_tensors

    seen = set()
    for name, tensor in published_tensors(state):
        slot = slot_of(name, state)
        assert slot is not None and slot[1].data_ptr() == tensor.data_ptr()
        seen.add(name)
    assert len(seen) == len(list(published_tensors(state)))
    assert slot_of("model.layers.0.nonsense", state) is None
    assert slot_of("model.layers.1.mlp.experts.99.up_proj.weight", state) is None
