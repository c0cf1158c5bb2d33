"""`trinity export`: write a model as a Hugging Face folder, as one GGUF file for llama.cpp, or packed for our engine.

Example:
  trinity export runs/demo models/demo --dtype bfloat16
  trinity export models/chat models/chat.gguf --format gguf --dtype q8_0
  trinity export models/mini models/mini-int4 --format packed --dtype int4

The folder holds what other programs load: published tensor names, every router key, both RoPE forms, the tokenizer.
A model that was fine-tuned on conversations keeps ending its turns, and the record of where it came from goes along.
The file holds the same; llama.cpp can also read matrices in 8 and 4 bits (q8_0, q4_0), which only it can.
A packed folder is for `trinity generate`, `chat` and `serve`: it opens at once, in the precision it was packed in, and
with --expert-bytes its experts may stay on the disk. It is written a tensor at a time, from models larger than memory.
"""

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from trinity.plan.inference import KINDS

if TYPE_CHECKING:
    from trinity.ckpt.opened import OpenedModel, StoredModel

FORMATS = {
    "hf": ("a Hugging Face folder", ("float32", "bfloat16")),
    "gguf": ("a GGUF file", ("float32", "bfloat16", "q8_0", "q4_0")),
    "packed": ("a folder packed for the engine", KINDS),
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="Hugging Face folder, run folder or checkpoint folder"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder or .gguf file to write; must not exist")
    parser.add_argument(
        "--format",
        default="hf",
        choices=FORMATS,
        help="a folder, a file for llama.cpp, or weights as the engine has them",
    )
    every = list(dict.fromkeys(dtype for _, dtypes in FORMATS.values() for dtype in dtypes))
    parser.add_argument("--dtype", default="float32", choices=every, help="precision of the matrices")
    parser.set_defaults(action=export)


def export(options: argparse.Namespace) -> None:
    from trinity.base.errors import UsageError
    from trinity.ckpt.opened import find_model, read_model

    if options.out.exists():
        raise UsageError(f"{options.out} exists.", "Name one that does not, or remove it first.")
    what, dtypes = FORMATS[options.format]
    if options.dtype not in dtypes:
        offer = next(name for name, (_, others) in FORMATS.items() if options.dtype in others)
        raise UsageError(
            f"{options.out} as {what} cannot be written in {options.dtype}.",
            f"Add --format {offer}, or choose --dtype {dtypes[-1]}.",
        )
    if options.format == "gguf" and options.out.suffix != ".gguf":
        raise UsageError(
            f"{options.out} does not end in .gguf, by which programs know such a file.", f"Try {options.out}.gguf."
        )
    if options.format == "gguf":
        from trinity.ckpt.gguf import gguf_package

        gguf_package()  # before the minutes that a large model takes to load
    stored = find_model(options.model)
    if options.format == "packed":
        _write_packed(stored, options.out, options.dtype)
    else:
        opened = read_model(stored, "bfloat16" if options.dtype == "bfloat16" else "float32")
        (_write_file if options.format == "gguf" else _write_folder)(opened, options.out, options.dtype)
    print(f"Wrote {options.out}, {what} of {stored.name} in {options.dtype}.")


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


def _write_packed(stored: "StoredModel", out: Path, dtype: str) -> None:
    import torch

    from trinity.base.durable import folder_aside, write_json
    from trinity.base.errors import UsageError
    from trinity.base.lineage import LINEAGE
    from trinity.base.progress import progress
    from trinity.base.units import show_bytes
    from trinity.ckpt.hf import published_config
    from trinity.ckpt.model_folder import write_companions
    from trinity.ckpt.weights import MARK
    from trinity.engine.packed import packed_bytes, write_packed
    from trinity.engine.weights import kind_named

    kind = kind_named(dtype)
    needed, there = packed_bytes(stored.config, kind), next(place for place in out.absolute().parents if place.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UsageError(
            f"{out} would take {show_bytes(needed)}; {show_bytes(free)} are free there.", "Make room first."
        )
    with folder_aside(out) as aside, progress(f"Packing {stored.name}", needed) as advance:
        config = published_config(stored.config, torch.bfloat16, stored.load_balance_coeff)
        write_json(aside / "config.json", config | {MARK: kind})
        write_companions(aside, stored.config, stored.tokenizer, stored.ends_turns)
        if stored.generation:
            write_json(aside / "generation_config.json", stored.generation)
        if stored.lineage:
            write_json(aside / LINEAGE, stored.lineage)
        write_packed(aside, stored, kind, advance)
