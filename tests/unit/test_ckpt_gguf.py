"""A GGUF file, read back with its own library: every value, every number llama.cpp reads, the vocabulary; refusals."""

import builtins
import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trinity.base.errors import StorageError, UsageError
from trinity.base.lineage import write_lineage
from trinity.ckpt.gguf import PRECISIONS, write_gguf
from trinity.ckpt.model_folder import write_model_folder
from trinity.cli.main import main
from trinity.config.load import override
from trinity.config.model import ModelConfig
from trinity.model.init import build_model
from trinity.model.transformer import Transformer
from trinity.recipes.table import recipe
from trinity.text.chat import jinja_template
from trinity.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")


@pytest.fixture(scope="module")
def tokenizer(debug_data: Path) -> Tokenizer:
    return Tokenizer.load(debug_data)


@pytest.fixture(scope="module")
def model() -> Transformer:
    """The `debug` model with eight rows more than its tokenizer has entries, and biases that choose."""
    model = build_model(override(recipe("debug"), ["model.vocab_size=520"]).model, 1)
    for bias in model.expert_biases():
        bias.copy_(torch.linspace(-0.1, 0.1, len(bias)) / 3)
    return model.eval().requires_grad_(False)


def values_of(tensor: Any) -> Tensor:
    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))


def our_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every tensor by the name llama.cpp's AFMoE looks for, written out by hand."""
    state, found = model.state_dict(), {}
    at = {
        "token_embd.weight": "embed_tokens.weight",
        "output_norm.weight": "norm.weight",
        "output.weight": "lm_head.weight",
    }
    parts = {
        "attn_norm.weight": "input_layernorm.weight", "post_attention_norm.weight": "post_attention_layernorm.weight",
        "ffn_norm.weight": "pre_mlp_layernorm.weight", "post_ffw_norm.weight": "post_mlp_layernorm.weight",
        "attn_q.weight": "self_attn.q_proj.weight", "attn_k.weight": "self_attn.k_proj.weight",
        "attn_v.weight": "self_attn.v_proj.weight", "attn_output.weight": "self_attn.o_proj.weight",
        "attn_gate.weight": "self_attn.gate_proj.weight", "attn_q_norm.weight": "self_attn.q_norm.weight",
        "attn_k_norm.weight": "self_attn.k_norm.weight", "ffn_gate.weight": "mlp.gate_proj.weight",
        "ffn_up.weight": "mlp.up_proj.weight", "ffn_down.weight": "mlp.down_proj.weight",
        "ffn_gate_inp.weight": "mlp.router.gate.weight", "exp_probs_b.bias": "mlp.expert_bias",
        "ffn_gate_shexp.weight": "mlp.shared_experts.gate_proj.weight",
        "ffn_up_shexp.weight": "mlp.shared_experts.up_proj.weight",
        "ffn_down_shexp.weight": "mlp.shared_experts.down_proj.weight", "ffn_down_exps.weight": "mlp.experts.down_proj",
    }  # fmt: skip
    for layer in range(model.config.num_hidden_layers):
        at |= {f"blk.{layer}.{theirs}": f"layers.{layer}.{ours}" for theirs, ours in parts.items()}
        if model.config.is_sparse(layer):
            stack = state[f"layers.{layer}.mlp.experts.gate_up_proj"]
            found[f"blk.{layer}.ffn_gate_exps.weight"], found[f"blk.{layer}.ffn_up_exps.weight"] = stack.unbind(1)
    return found | {theirs: state[ours] for theirs, ours in at.items() if ours in state}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_value_is_there(model: Transformer, tokenizer: Tokenizer, tmp_path: Path, precision: str, monkeypatch):
    monkeypatch.setattr("trinity.ckpt.gguf.PART_VALUES", 3000)  # several parts of most tensors, some of one row
    write_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), tokenizer, precision, "m")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    wanted = our_tensors(model)
    assert found.keys() == wanted.keys()
    kept = 0
    for name, ours in wanted.items():
        theirs, type_ = values_of(found[name]).view_as(ours), found[name].tensor_type.name
        if ours.dim() == 1 or name.endswith("ffn_gate_inp.weight"):
            kept += 1
            assert type_ == "F32" and torch.equal(theirs, ours), name
            continue
        assert type_ == PRECISIONS[precision], name
        if precision in ("float32", "bfloat16"):
            assert torch.equal(theirs, ours.to(getattr(torch, precision)).float()), name
        else:  # the largest of 32 values spans 127 or 8 steps, and scales are float16
            step = ours.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / (127 if precision == "q8_0" else 8)
            error = (theirs - ours).unflatten(-1, (-1, 32)).abs()
            assert bool((error <= step * (0.6 if precision == "q8_0" else 1.01)).all()), name
    assert kept == 1 + 4 * 6 + 3 * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]


def test_the_file_says_all_that_llama_cpp_would_guess(model: Transformer, tokenizer: Tokenizer, tmp_path: Path):
    lineage = {"kind": "fine-tuned model", "command": "trinity …"}
    write_gguf(tmp_path / "m", model.config, model.state_dict(), tokenizer, "q8_0", "first", chat=True, lineage=lineage)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m").fields.items()}
    config = model.config
    expected = {
        "general.architecture": "afmoe", "general.type": "model", "general.name": "first", "general.file_type": 7,
        "afmoe.vocab_size": 520, "afmoe.context_length": config.max_position_embeddings,
        "afmoe.embedding_length": config.hidden_size, "afmoe.block_count": 4, "afmoe.leading_dense_block_count": 1,
        "afmoe.feed_forward_length": config.intermediate_size, "afmoe.attention.head_count": 4,
        "afmoe.attention.head_count_kv": 2, "afmoe.attention.key_length": 16, "afmoe.attention.value_length": 16,
        "afmoe.rope.dimension_count": 16, "afmoe.rope.freq_base": 10000.0, "afmoe.attention.sliding_window": 32,
        "afmoe.expert_count": 8, "afmoe.expert_used_count": 2, "afmoe.expert_shared_count": 1,
        "afmoe.expert_feed_forward_length": 32, "afmoe.expert_weights_norm": True,
        "afmoe.expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "afmoe", "tokenizer.chat_template": jinja_template(),
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id, "tokenizer.ggml.eos_token_id": tokenizer.im_end_id,
        "tokenizer.ggml.eot_token_id": tokenizer.im_end_id, "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": False,
    }  # fmt: skip
    assert {name: fields.get(name) for name in expected} == expected
    assert fields["afmoe.expert_weights_scale"] == pytest.approx(config.route_scale)
    assert fields["afmoe.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
    assert json.loads(fields["trinity.lineage"]) == lineage


def test_the_vocabulary_has_a_text_and_a_kind_for_every_row(model: Transformer, tokenizer: Tokenizer, tmp_path: Path):
    write_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), tokenizer, "bfloat16", "m")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    texts, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(texts) == len(kinds) == 520 and len(set(texts)) == 520
    assert texts[tokenizer.im_end_id] == "<|im_end|>" and kinds[tokenizer.im_end_id] == gguf.TokenType.CONTROL
    assert kinds[tokenizer.id_of("<think>")] == gguf.TokenType.USER_DEFINED
    assert set(kinds[32:512]) == {gguf.TokenType.NORMAL} and set(kinds[512:]) == {gguf.TokenType.UNUSED}
    vocabulary = tokenizer.sections()["model"]
    assert [texts[id] for id in vocabulary["vocab"].values()] == list(vocabulary["vocab"])
    assert [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]] == vocabulary["merges"]
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id  # of a model that was not fine-tuned


def test_afmoe_is_how_llama_cpp_calls_the_published_tokenizer(real_data: Path):
    """llama.cpp's converter knows pre-tokenizers by the hash of the ids of one text; the begin mark counted there."""
    text = (
        "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n"
        "🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
        "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
        "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
        "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, "
        "'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
    )
    ids = Tokenizer.load(real_data / "trinity-tokenizer").encode(text)
    known = "49fc0303c9e0d2c2c565c510f64b2d9b271276acdcdadff733249eda9f7d59df"
    assert hashlib.sha256(str([0, *ids]).encode()).hexdigest() == known


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("model.global_attn_every_n_layers=2", "one layer in every 4 is global; in this model it is one in every 2"),
        ("model.mup_enabled=false", "mup_enabled off"),
        ("model.moe_intermediate_size=48", "q8_0 takes 32 values of a row at a time; .* has 48"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, setting: str, what: str
):
    config: ModelConfig = override(recipe("debug"), [setting]).model
    with pytest.raises(UsageError, match=what) as refused:
        write_gguf(tmp_path / "m.gguf", config, {}, tokenizer, "q8_0", "m")
    assert refused.value.remedy.startswith("Export it with")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(model: Transformer, tokenizer: Tokenizer, tmp_path: Path):
    other = tokenizer.sections()
    del other["pre_tokenizer"]["pretokenizers"][1]
    with pytest.raises(UsageError, match="cuts texts otherwise"):
        write_gguf(tmp_path / "m", model.config, {}, Tokenizer(json.dumps(other), "other"), "float32", "m")


def test_a_full_disk_leaves_the_old_file(model: Transformer, tokenizer: Tokenizer, tmp_path: Path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_text("old")
    open_full = partial(builtins.open, "/dev/full", "wb")
    monkeypatch.setattr("gguf.gguf_writer.open", lambda *_: open_full(), raising=False)
    with pytest.raises(StorageError, match="The disk is full"):
        write_gguf(path, model.config, model.state_dict(), tokenizer, "float32", "m")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def folder(model: Transformer, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "chat"
    folder.mkdir()
    write_model_folder(folder, model, tokenizer, torch.float32, chat=True)
    write_lineage(folder, "fine-tuned model", {"model": "x"}, {"method": "sft"})
    return folder


def test_export_writes_the_file(folder: Path, model: Transformer, tmp_path: Path, capsys):
    out = tmp_path / "chat.gguf"
    assert main(["export", str(folder), str(out), "--format", "gguf", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == f"Wrote {out}, a GGUF file of chat in bfloat16.\n"
    reader = gguf.GGUFReader(out)
    found = {tensor.name: values_of(tensor) for tensor in reader.tensors}
    for name, ours in our_tensors(model).items():  # the folder's float32 was rounded once
        kept = ours.dim() == 1 or name.endswith("ffn_gate_inp.weight")
        assert torch.equal(found[name].view_as(ours), ours if kept else ours.bfloat16().float()), name
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["tokenizer.ggml.eos_token_id"] == Tokenizer.load(folder).im_end_id
    assert json.loads(fields["trinity.lineage"])["kind"] == "fine-tuned model"


def test_mistakes_of_export_are_told(folder: Path, tmp_path: Path, capsys, monkeypatch):
    def refused(what: str, *words: str) -> None:
        assert main(["export", str(folder), *words]) == 2
        assert what in capsys.readouterr().err

    refused("as a Hugging Face folder cannot be written in q8_0", str(tmp_path / "m"), "--dtype", "q8_0")
    refused("does not end in .gguf", str(tmp_path / "m"), "--format", "gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused("pip install 'trinity[gguf]'", str(tmp_path / "m.gguf"), "--format", "gguf")
    assert not list(tmp_path.iterdir())
