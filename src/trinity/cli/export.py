"""`trinity export`: write a model as a Hugging Face folder, or as one GGUF file for llama.cpp.

Example:
  trinity export runs/demo models/demo --dtype bfloat16
  trinity export models/chat models/chat.gguf --format gguf --dtype q8_0

The folder holds what other programs load: published tensor names, every router key, both RoPE forms, the tokenizer.
A model that was fine-tuned on conversations keeps ending its turns, and the record of where it came from goes along.
The file holds the same; llama.cpp can also read matrices in 8 and 4 bits (q8_0, q4_0), which only it can.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trinity.ckpt.opened import OpenedModel

FOLDER_DTYPES = ("float32", "bfloat16")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="Hugging Face folder, run folder or checkpoint folder"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder or .gguf file to write; must not exist")
    parser.add_argument("--format", default="hf", choices=("hf", "gguf"), help="a folder, or a file for llama.cpp")
    parser.add_argument(
        "--dtype", default="float32", choices=(*FOLDER_DTYPES, "q8_0", "q4_0"), help="precision of the matrices"
    )
    parser.set_defaults(action=export)


def export(options: argparse.Namespace) -> None:
    from trinity.base.errors import UsageError
    from trinity.ckpt.gguf import gguf_package
    from trinity.ckpt.opened import open_model

    if options.out.exists():
        raise UsageError(f"{options.out} exists.", "Name one that does not, or remove it first.")
    if options.format == "hf" and options.dtype not in FOLDER_DTYPES:
        raise UsageError(
            f"{options.out} as a Hugging Face folder cannot be written in {options.dtype}.",
            "Add --format gguf, or choose --dtype bfloat16.",
        )
    if options.format == "gguf" and options.out.suffix != ".gguf":
        raise UsageError(
            f"{options.out} does not end in .gguf, by which programs know such a file.", f"Try {options.out}.gguf."
        )
    if options.format == "gguf":
        gguf_package()  # before the minutes that a large model takes to load
    opened = open_model(options.model, "bfloat16" if options.dtype == "bfloat16" else "float32")
    write, what = (_write_file, "a GGUF file") if options.format == "gguf" else (_write_folder, "a Hugging Face folder")
    write(opened, options.out, options.dtype)
    print(f"Wrote {options.out}, {what} of {opened.name} in {options.dtype}.")


def _write_folder(opened: "OpenedModel", out: Path, dtype: str) -> None:
    import torch

    from trinity.base.durable import folder_aside, write_json
    from trinity.base.lineage import LINEAGE
    from trinity.ckpt.model_folder import write_model_folder

    with folder_aside(out) as aside:
        write_model_folder(
            aside,
            opened.model,
            opened.tokenizer,
            getattr(torch, dtype),
            chat=opened.ends_turns,
            load_balance_coeff=opened.load_balance_coeff,
        )
        if opened.lineage:
            write_json(aside / LINEAGE, opened.lineage)


def _write_file(opened: "OpenedModel", out: Path, dtype: str) -> None:
    from trinity.ckpt.gguf import write_gguf

    model, chat = opened.model, opened.ends_turns
    write_gguf(out, model.config, model.state_dict(), opened.tokenizer, dtype, opened.name, chat, opened.lineage)
