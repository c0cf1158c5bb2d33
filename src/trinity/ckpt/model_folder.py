"""A whole model folder, as other programs expect it: weights, config, tokenizer, chat template, generation defaults.

Writing serves `trinity export` and the bundle of a release; checking and copying serve `trinity import`.
"""

import shutil
from pathlib import Path

import torch

from trinity.base.durable import write_durably, write_json
from trinity.base.errors import CheckpointError
from trinity.ckpt.hf import DEFAULT_BALANCE_COEFF, FolderWeights, read_published_config, shard_files, write_hf
from trinity.ckpt.tensor_file import TensorFile
from trinity.ckpt.weights import PACKED, PackedWeights
from trinity.config.model import ModelConfig
from trinity.model.transformer import Transformer
from trinity.text.chat import jinja_template
from trinity.text.tokenizer import Tokenizer

_COPIED = ("*.json", "*.jinja", "LICENSE*", "README.md")
_CODE = (".py", ".bin", ".pt", ".pth", ".pickle", ".pkl", ".ckpt")


def write_model_folder(
    folder: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    chat: bool = False,
    load_balance_coeff: float = DEFAULT_BALANCE_COEFF,
) -> None:
    """Fill an existing folder with all that a program needs to run the model. A chat model ends turns at <|im_end|>."""
    write_hf(folder, model, dtype, load_balance_coeff)
    write_companions(folder, model.config, tokenizer, chat)


def write_companions(folder: Path, config: ModelConfig, tokenizer: Tokenizer, chat: bool) -> None:
    """What stands beside weights and config.json: tokenizer, chat template, generation defaults."""
    tokenizer.save(folder)
    write_durably(folder / "chat_template.jinja", jinja_template())
    end = "<|im_end|>" if chat else "<|end_of_text|>"
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": end,
            "pad_token": "<|pad|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_position_embeddings,
        },
    )
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": sorted({tokenizer.id_of(end), tokenizer.eos_id}) if chat else tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
            "do_sample": True,
            "temperature": 0.8,
            "top_p": 0.95,
        },
    )


def check_folder(folder: Path) -> ModelConfig:
    """Check that a folder is a whole AFMoE model without loading it: every tensor once, of the right shape, no code.

    Returns its configuration; raises CheckpointError naming the first thing that is wrong.
    """
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}.", "Name the folder that holds config.json.")
    config = read_published_config(folder)
    if (folder / PACKED).is_file():
        PackedWeights(TensorFile(folder / PACKED)).refuse()
    FolderWeights(folder, config)
    matching_tokenizer(folder, config)
    return config


def matching_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a model folder; a CheckpointError where the model has no row for some of its ids."""
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"The tokenizer of {folder} has {tokenizer.vocab_size} entries, the model only {config.vocab_size} rows.",
            "They do not belong together: copy the folder again.",
        )
    return tokenizer


def copy_model_files(source: Path, out: Path) -> None:
    """Copy weights, configuration, tokenizer, card and licence, byte for byte. What nothing names stays behind."""
    for path in shard_files(source):
        shutil.copyfile(path, out / path.name)
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.suffix not in _CODE and path.name != "manifest.json":
                shutil.copyfile(path, out / path.name)
