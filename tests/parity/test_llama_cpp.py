"""Our GGUF files in llama.cpp itself: the same logits, the same tokens. Skipped where llama-cpp-python is absent."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trinity.ckpt.gguf import write_gguf
from trinity.config.load import override
from trinity.config.model import ModelConfig
from trinity.model.init import build_model
from trinity.model.transformer import Transformer
from trinity.recipes.table import recipe
from trinity.text.chat import render
from trinity.text.tokenizer import Tokenizer

pytest.importorskip("gguf", reason="the package gguf is not installed")
llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

F32 = 0  # of ggml: keys and values are kept as they are, where llama.cpp would round them to 16 bits


@pytest.fixture(scope="module", autouse=True)
def silence():
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    yield
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p(0))


def debug_config(*settings: str) -> ModelConfig:
    return override(recipe("debug"), [*settings]).model


def made(config: ModelConfig) -> Transformer:
    """A model whose every part matters: norms off one, biases that choose."""
    model, generator = build_model(config, 1), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        for bias in model.expert_biases():
            bias.copy_(torch.randn(bias.shape, generator=generator) * 0.2)
    return model.eval().requires_grad_(False)


def logits_in_llama_cpp(path: Path, tokens: list[int], at_once: int) -> np.ndarray:
    options: dict[str, Any] = {"n_ctx": 512, "n_batch": at_once, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    llama = llama_cpp.Llama(str(path), logits_all=True, type_k=F32, type_v=F32, flash_attn=False, **options)
    llama.eval(tokens)
    found = np.array(llama.scores[: len(tokens)])
    llama.close()
    return found


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("at_once", [1, 150])
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["model.num_dense_layers=0", "model.num_shared_experts=2"],
        ["model.num_shared_experts=0", "model.sliding_window=1"],
        ["model.num_hidden_layers=9", "model.rope_theta=100", "model.head_dim=24", "model.num_experts_per_tok=8"],
    ],
    ids=lambda settings: " ".join(settings) or "debug",
)
def test_logits_are_equal(debug_data: Path, tmp_path: Path, settings: list[str], at_once: int):
    config = debug_config(*settings)
    model = made(config)
    write_gguf(tmp_path / "m.gguf", config, model.state_dict(), Tokenizer.load(debug_data), "float32", "m")
    ids = torch.randint(0, config.vocab_size, (1, 150))
    expected = model.head(model(ids).hidden)[0].numpy()
    found = logits_in_llama_cpp(tmp_path / "m.gguf", ids[0].tolist(), at_once)
    error, agree = relative_error(found, expected), float((found.argmax(1) == expected.argmax(1)).mean())
    print(f"relative error {error:.1e}, the same likeliest token at {agree:.1%} of the places")
    assert error < 1e-4 and agree == 1.0


@pytest.mark.parametrize(("precision", "most"), [("bfloat16", 0.03), ("q8_0", 0.08), ("q4_0", 0.6)])
def test_rounded_matrices_are_read_as_they_were_meant(debug_data: Path, tmp_path: Path, precision: str, most: float):
    """One token at a time, and all experts chosen, since rounding would choose others. llama.cpp rounds activations."""
    config = debug_config("model.num_experts_per_tok=8")
    model = made(config)
    write_gguf(tmp_path / "m.gguf", config, model.state_dict(), Tokenizer.load(debug_data), precision, "m")
    ids = torch.randint(0, config.vocab_size, (1, 60))
    expected = model.head(model(ids).hidden)[0].numpy()
    error = relative_error(logits_in_llama_cpp(tmp_path / "m.gguf", ids[0].tolist(), at_once=1), expected)
    print(f"{precision}: relative error {error:.1e}")
    assert error < most


@pytest.fixture(scope="module")
def vocabulary(debug_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """(llama.cpp over a file that holds our vocabulary, our tokenizer)."""
    path, tokenizer, config = (
        tmp_path_factory.mktemp("vocabulary") / "m.gguf",
        Tokenizer.load(debug_data),
        debug_config(),
    )
    write_gguf(path, config, build_model(config, 1).state_dict(), tokenizer, "bfloat16", "m")
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    yield llama, tokenizer
    llama.close()


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x + 12345\n\n\n\tpass  # done\r\n",
        "",
        " leading, and   several spaces   ",
        "Grüße 你好 🙂 한국어日本語ไทย",
        "1234567 89 a1b22c333d4444 3.14159 -1",
        "'s 'LL don't \"quoted\" ![a](b) ---===",
        "a<|im_end|>b <|begin_of_text|>",
        "½ ²³ Ⅳ ٣٤٥٦٧",
    ],
)
def test_texts_become_the_same_tokens(vocabulary, text: str):
    llama, tokenizer = vocabulary
    assert llama.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)
    marked = tokenizer.encode_with_special(text)
    assert llama.tokenize(text.encode(), add_bos=True, special=True) == [tokenizer.bos_id, *marked]
    assert llama.detokenize(tokenizer.encode(text)).decode() == text


def test_real_texts_become_the_same_tokens(vocabulary, real_data: Path):
    llama, tokenizer = vocabulary
    text = (real_data / "tinyshakespeare" / "input.txt").read_text()[:100_000]
    assert llama.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)


def test_where_llama_cpp_is_known_to_cut_otherwise(vocabulary):
    """Of several spaces before a digit it takes the last by itself. When this fails, llama.cpp was mended."""
    llama, tokenizer = vocabulary
    theirs = llama.tokenize(b"x =  3", add_bos=False, special=False)
    assert theirs != tokenizer.encode("x =  3") and llama.detokenize(theirs) == b"x =  3"
    visible = llama.tokenize(b"<think>", add_bos=False, special=False)
    assert visible == [tokenizer.id_of("<think>")] == tokenizer.encode_with_special("<think>")


def test_a_conversation_becomes_the_tokens_we_train_and_serve(vocabulary):
    llama, tokenizer = vocabulary
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is 1 + 1?"}]
    template = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
        llama.metadata["tokenizer.chat_template"], eos_token="<|end_of_text|>", bos_token="<|begin_of_text|>"
    )
    prompt = template(messages=messages).prompt
    found = llama.tokenize(prompt.encode(), add_bos=False, special=True)
    assert found == render(messages, tokenizer, add_generation_prompt=True).tokens
