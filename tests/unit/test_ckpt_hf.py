"""The published format: what cannot be read is refused by name, in the reader and in the check that loads nothing."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trinity.base.errors import CheckpointError, DataError
from trinity.ckpt import hf
from trinity.ckpt.hf import INDEX, read_hf, read_published_config, write_hf
from trinity.ckpt.model_folder import check_folder
from trinity.text.tokenizer import Tokenizer

UP = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def whole(tiny_config, tiny_model, debug_data: Path, tmp_path: Path, monkeypatch) -> Path:
    """A model folder of several shards. Its tokenizer is larger than the tiny model, which only one test minds."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_hf(folder, tiny_model, shard_bytes=40_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    Tokenizer.load(debug_data).save(folder)
    monkeypatch.setattr(Tokenizer, "vocab_size", tiny_config.vocab_size)
    return folder


def refused(folder: Path, what: str) -> None:
    """Both ways of reading a folder refuse it with one sentence that holds `what`, and a remedy."""
    for read in (read_hf, check_folder):
        with pytest.raises(CheckpointError) as caught:
            read(folder)
        assert what in str(caught.value), read
        assert str(caught.value).endswith("."), read
        assert "\n" not in str(caught.value)


def change(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; ... takes a key away."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def test_a_whole_folder_is_read(whole: Path, tiny_model, tiny_config):
    back = read_hf(whole)
    assert back.config == tiny_config == check_folder(whole)
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


REFUSED_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "llama"}, "holds a 'llama' model"),
    "no model type": ({"model_type": ...}, "holds a 'None' model"),
    "softmax routing": ({"score_func": "softmax"}, "score_func is 'softmax'; AFMoE has 'sigmoid'"),
    "weights not normalised": ({"route_norm": False}, "route_norm is False"),
    "grouped routing": ({"n_group": 8}, "n_group is 8"),
    "limited groups": ({"topk_group": 4}, "topk_group is 4"),
    "limited groups, old name": ({"num_limited_groups": 4}, "num_limited_groups is 4"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "attention bias": ({"attention_bias": True}, "attention_bias is True"),
    "tied embeddings": ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    "old RoPE scaling": ({"rope_scaling": {"type": "linear", "factor": 2}}, "RoPE scaling"),
    "new RoPE scaling": ({"rope_parameters": {"rope_type": "yarn", "factor": 4, "rope_theta": 1e4}}, "RoPE scaling"),
    "partial RoPE": ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "RoPE scaling"),
    "another schedule": ({"layer_types": ["full_attention"] * 4}, "one global layer in every 4"),
    "a missing key": ({"moe_intermediate_size": ...}, "it lacks moe_intermediate_size"),
    "a key with two defaults": ({"mup_enabled": ...}, "it lacks mup_enabled"),
    "text for a number": ({"hidden_size": "wide"}, "hidden_size"),
    "a contradiction": ({"num_experts_per_tok": 9}, "9 experts cannot be chosen from 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_CONFIGS)
def test_a_configuration_of_other_arithmetic_is_refused(whole: Path, name: str):
    changes, what = REFUSED_CONFIGS[name]
    change(whole, **changes)
    refused(whole, what)


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"{", "is not JSON"), (b"\xff\xfe{}", "is not JSON"), (b"[]", "is not a JSON object"), (None, "no config.json")],
)
def test_a_config_that_is_none_is_refused(whole: Path, content: bytes | None, what: str):
    path = whole / "config.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused(whole, what)


def test_theta_is_read_from_either_form(whole: Path):
    change(whole, rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rope_theta=...)
    assert read_published_config(whole).rope_theta == 500.0
    change(whole, rope_parameters=..., rope_theta=700.0)
    assert read_published_config(whole).rope_theta == 700.0


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def rewrite(folder: Path, take: str, **add: torch.Tensor) -> None:
    """Take one tensor out of a shard and put others in."""
    path = shard_of(folder, UP)
    tensors = load_file(path)
    tensors.pop(take, None)
    save_file(tensors | add, path)


def test_tensors_that_do_not_fit_are_named(whole: Path):
    rewrite(whole, UP)
    refused(whole, UP)
    rewrite(whole, UP, **{UP: torch.zeros(3, 5)})
    refused(whole, UP)
    refused(whole, "[3, 5]")
    for name in ("model.extra", UP.replace("experts.3", "experts.4"), UP.replace("layers.1", "layers.0"), "lm_head"):
        rewrite(whole, UP, **{UP: torch.zeros(16, 32), name: torch.zeros(16, 32)})
        refused(whole, name)
        rewrite(whole, name)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_weights_that_others_made_narrow_are_refused(whole: Path, dtype: torch.dtype):
    """Their values alone, without the scales that somebody else's reader knows of, are another model."""
    rewrite(whole, UP, **{UP: torch.ones(16, 32).to(dtype)})
    refused(whole, f"{UP} is in {str(dtype).removeprefix('torch.')}. Take the model in bfloat16.")


def test_a_tensor_that_two_files_hold_is_refused(whole: Path):
    other = next(path for path in sorted(whole.glob("model-*")) if path != shard_of(whole, UP))
    save_file(load_file(other) | {UP: load_file(shard_of(whole, UP))[UP] + 1}, other)
    refused(whole, f"unexpected tensor {UP}")


def test_a_shard_that_is_cut_off_or_missing_is_named(whole: Path):
    shard = shard_of(whole, UP)
    content = shard.read_bytes()
    for size in (len(content) - 1, 100, 4, 0):
        shard.write_bytes(content[:size])
        refused(whole, shard.name)
    shard.unlink()
    refused(whole, f"{shard.name} is missing")


@pytest.mark.parametrize("index", [b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_refused(whole: Path, index: bytes):
    (whole / INDEX).write_bytes(index)
    refused(whole, INDEX)


def test_an_index_names_files_of_its_own_folder_only(whole: Path):
    elsewhere = whole.parent / "elsewhere.safetensors"
    os.replace(shard_of(whole, UP), elsewhere)
    index = json.loads((whole / INDEX).read_text())
    index["weight_map"] = {
        name: file if (whole / file).exists() else f"../{elsewhere.name}" for name, file in index["weight_map"].items()
    }
    (whole / INDEX).write_text(json.dumps(index))
    refused(whole, INDEX)
    index["weight_map"] = dict.fromkeys(index["weight_map"], "gone.safetensors")
    (whole / INDEX).write_text(json.dumps(index))
    refused(whole, "gone.safetensors is missing")


def test_a_folder_without_weights_or_tokenizer_is_refused(whole: Path, monkeypatch):
    monkeypatch.undo()  # the tokenizer has its true size again
    with pytest.raises(CheckpointError, match="512 entries, the model only 64 rows"):
        check_folder(whole)
    (whole / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="no tokenizer"):
        check_folder(whole)
    (whole / INDEX).unlink()
    refused(whole, "model.safetensors is missing")
    with pytest.raises(CheckpointError, match="There is no folder"):
        check_folder(whole / "nowhere")


def test_bfloat16_keeps_the_selection_bias_and_what_decides_routing(tiny_model, tmp_path: Path):
    for bias in tiny_model.expert_biases():
        bias.copy_(torch.linspace(-1, 1, len(bias)) / 3)
    write_hf(tmp_path, tiny_model, torch.bfloat16)
    saved = load_file(tmp_path / "model.safetensors")
    for name, tensor in saved.items():
        assert tensor.dtype == (torch.float32 if name.endswith("expert_bias") else torch.bfloat16), name
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    back = read_hf(tmp_path, torch.bfloat16)
    for ours, theirs in zip(tiny_model.expert_biases(), back.expert_biases(), strict=True):
        assert torch.equal(ours, theirs)
    kept = [name for name, tensor in back.state_dict().items() if tensor.dtype == torch.float32]
    assert sum("norm" in name for name in kept) == 4 * 6 + 1 and sum("router" in name for name in kept) == 3


@pytest.mark.parametrize(
    "refusal", [SafetensorError("No space left on device (os error 28)"), OSError(errno.ENOSPC, "No space left")]
)
def test_a_full_disk_is_told_as_one(tiny_model, tmp_path: Path, monkeypatch, refusal: Exception):
    def failing(*arguments, **keywords):
        raise refusal

    monkeypatch.setattr(hf, "save_file", failing)
    with pytest.raises(OSError) as caught:
        write_hf(tmp_path, tiny_model)
    assert caught.value.errno == errno.ENOSPC, "folder_aside makes the clear sentence of it"
