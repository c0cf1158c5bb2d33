"""`trinity export`: write a model as a Hugging Face folder.

Example:
  trinity export runs/demo models/demo --dtype bfloat16

The folder holds what other programs load: published tensor names, every router key, both RoPE forms, the tokenizer.
A model that was fine-tuned on conversations keeps ending its turns, and the record of where it came from goes along.
"""

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="Hugging Face folder, run folder or checkpoint folder"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="precision of the matrices")
    parser.set_defaults(action=export)


def export(options: argparse.Namespace) -> None:
    import torch

    from trinity.base.durable import folder_aside, write_json
    from trinity.base.errors import UsageError
    from trinity.base.lineage import LINEAGE
    from trinity.ckpt.model_folder import write_model_folder
    from trinity.ckpt.opened import open_model

    if options.out.exists():
        raise UsageError(f"{options.out} exists.", "Name a folder that does not, or remove it first.")
    opened = open_model(options.model)
    with folder_aside(options.out) as aside:
        write_model_folder(
            aside,
            opened.model,
            opened.tokenizer,
            getattr(torch, options.dtype),
            chat=opened.ends_turns,
            load_balance_coeff=opened.load_balance_coeff,
        )
        if opened.lineage:
            write_json(aside / LINEAGE, opened.lineage)
    print(f"Wrote {options.out}, a Hugging Face folder of {opened.name} in {options.dtype}.")
