"""Write a model as one GGUF file, for llama.cpp and the programs around it. The only file that imports gguf.

Where a file is silent, llama.cpp takes for granted what is not always AFMoE (expert weights that are not normalised),
so the file says all of it. Two things llama.cpp has built in, whatever a file says: one global layer in every four, and
embeddings scaled by the square root of the width. A model that differs is refused.

Matrices take the precision asked for; norms, the router's matrix and the selection bias stay float32. No second copy of
the model is made: each matrix is converted and written in parts.

The vocabulary goes along under the pre-tokenizer that llama.cpp calls 'afmoe', which is the published one. It cuts
texts as ours does, but for digits after several spaces: llama.cpp takes the last of those by itself.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity.base.durable import file_aside, recover
from trinity.base.errors import UsageError
from trinity.ckpt.weights import FLOAT32_ALWAYS
from trinity.config.model import ModelConfig
from trinity.model.init import build_on_meta
from trinity.text.chat import jinja_template
from trinity.text.tokenizer import Tokenizer
from trinity.text.train_bpe import pre_tokenizer

PRECISIONS = {"float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}  # ours, and GGML's names of them
FLOAT32 = np.dtype(np.float32)
GLOBAL_EVERY = 4  # built into llama.cpp
PART_VALUES = 2**24  # converted at once
AS_FOLDER = "Export it with --format hf, which transformers, vLLM and SGLang read."


class Place(NamedTuple):
    """One tensor of the file: its name there, where its values are with us, and as what they are written."""

    theirs: str
    ours: str
    half: int | None  # of gate and up, which we hold as one
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    bytes: int

    def values(self, state: Mapping[str, Tensor]) -> Tensor:
        whole = state[self.ours].detach()
        return whole if self.half is None else whole[:, self.half]


def write_gguf(
    path: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    precision: str,
    name: str,
    chat: bool = False,
    lineage: Mapping[str, Any] | None = None,
) -> None:
    """Write the weights `state`, by our names, to `path`, whole or not at all. A chat model ends turns at <|im_end|>.

    UsageError where llama.cpp would compute something else than this model, or cut texts otherwise.
    """
    gguf = gguf_package()
    _refuse_what_llama_cpp_has_not(config, tokenizer)
    places = _places(gguf, config, precision)
    recover(path.parent, path.name)
    with file_aside(path) as aside:
        writer = gguf.GGUFWriter(aside, "afmoe")
        try:
            _describe(gguf, writer, config, precision)
            writer.add_name(name)
            if lineage:
                writer.add_string("trinity.lineage", json.dumps(lineage, ensure_ascii=False))
            _add_vocabulary(gguf, writer, tokenizer, config.vocab_size, chat)
            for place in places:
                writer.add_tensor_info(place.theirs, place.shape, FLOAT32, place.bytes, place.kind)
            writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            (file,) = writer.fout
            for place in places:
                writer.write_padding(file, file.tell())
                for part in _parts(place.values(state)):
                    file.write(_converted(gguf, part, place.kind).data)  # tofile hides why a disk refused
            writer.write_padding(file, file.tell())
        finally:
            writer.close()


def _refuse_what_llama_cpp_has_not(config: ModelConfig, tokenizer: Tokenizer) -> None:
    if config.global_attn_every_n_layers != GLOBAL_EVERY:
        raise UsageError(
            f"To llama.cpp one layer in every {GLOBAL_EVERY} is global; in this model it is one in every "
            f"{config.global_attn_every_n_layers}.",
            AS_FOLDER,
        )
    if not config.mup_enabled:
        raise UsageError("llama.cpp always scales embeddings; this model has mup_enabled off.", AS_FOLDER)
    sections = tokenizer.sections()
    if sections["pre_tokenizer"] != pre_tokenizer() or sections["normalizer"] is not None:
        raise UsageError(
            "This model's tokenizer cuts texts otherwise than the published one, which is the one llama.cpp knows.",
            AS_FOLDER,
        )


def _places(gguf: Any, config: ModelConfig, precision: str) -> list[Place]:
    """Every tensor of the file, in the order of our names. UsageError for rows that the precision cannot cut up."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.AFMOE, config.num_hidden_layers)
    places = []
    for ours, meta in build_on_meta(config).state_dict().items():
        kept = meta.dim() == 1 or ours.endswith(FLOAT32_ALWAYS)
        kind = gguf.GGMLQuantizationType["F32" if kept else PRECISIONS[precision]]
        for published, half in _published(ours):
            shape = tuple(meta.shape if half is None else meta[:, half].shape)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                raise UsageError(
                    f"{precision} takes {block} values of a row at a time; {ours} has {shape[-1]} in a row.",
                    "Export it with --dtype bfloat16.",
                )
            theirs = names.get_name(published, try_suffixes=(".weight", ".bias"))
            assert theirs is not None, published
            places.append(Place(theirs, ours, half, shape, kind, math.prod(shape) // block * size))
    return places


def _published(ours: str) -> list[tuple[str, int | None]]:
    """The names under which gguf knows what we hold under one, each with its half of gate and up."""
    if ours.endswith("experts.gate_up_proj"):
        stack = f"model.{ours.removesuffix('.gate_up_proj')}"
        return [(f"{stack}.gate_proj.weight", 0), (f"{stack}.up_proj.weight", 1)]
    name = ours if ours.startswith("lm_head.") else f"model.{ours}"
    ending = {"down_proj": ".weight", "expert_bias": ".bias"}.get(ours.rsplit(".", 1)[-1], "")
    return [(name + ending, None)]


def _describe(gguf: Any, writer: Any, config: ModelConfig, precision: str) -> None:
    """All that llama.cpp reads of an AFMoE model, also where its defaults agree today."""
    writer.add_type("model")
    extent = "ALL" if precision == "float32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{extent}_{PRECISIONS[precision]}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_leading_dense_block_count(config.num_dense_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.num_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(config.route_scale)


def _add_vocabulary(gguf: Any, writer: Any, tokenizer: Tokenizer, rows: int, chat: bool) -> None:
    """Tokens, merges and marks. Marks that are visible text (`<think>`) become one token in any text, as in
    transformers; control marks only where a program asks for it."""
    sections = tokenizer.sections()
    texts, kinds = [f"[PAD{row}]" for row in range(rows)], [gguf.TokenType.UNUSED] * rows
    for text, row in sections["model"]["vocab"].items():
        texts[row], kinds[row] = text, gguf.TokenType.NORMAL
    for entry in sections["added_tokens"]:
        texts[entry["id"]] = entry["content"]
        kinds[entry["id"]] = gguf.TokenType.CONTROL if entry["special"] else gguf.TokenType.USER_DEFINED
    merges = sections["model"]["merges"]
    writer.add_tokenizer_model("gpt2")  # as llama.cpp calls byte-level BPE
    writer.add_tokenizer_pre("afmoe")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.im_end_id if chat else tokenizer.eos_id)
    writer.add_eot_token_id(tokenizer.im_end_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(tokenizer.begins_texts)
    writer.add_add_eos_token(False)
    writer.add_chat_template(jinja_template())


def _parts(values: Tensor) -> Iterator[Tensor]:
    """Whole rows, or experts, of a tensor, few enough to convert at once."""
    yield from values.split(max(1, PART_VALUES // max(1, values[0].numel())))


def _converted(gguf: Any, part: Tensor, kind: Any) -> np.ndarray:
    if kind is gguf.GGMLQuantizationType.BF16:
        return part.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    return gguf.quantize(part.float().contiguous().numpy(), kind)


def gguf_package() -> Any:
    """The package, or the UsageError that says how to get it."""
    try:
        import gguf
    except ImportError as error:
        raise UsageError(
            f"Writing GGUF needs a package that is not here ({error}).", "Try: pip install 'trinity[gguf]'"
        ) from error
    return gguf
