"""`trinity import`: read a published checkpoint, check every tensor, and write it as a verified folder.

Example:
  trinity import downloads/Trinity-Nano-Base models/nano

No value is changed. The copy is sealed with a manifest of sha256 sums; sign it with `trinity release`.
"""

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="HF_DIR", help="Hugging Face folder of an AFMoE model")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    parser.set_defaults(action=import_checkpoint)


def import_checkpoint(options: argparse.Namespace) -> None:
    from trinity.base.durable import folder_aside
    from trinity.base.errors import UsageError
    from trinity.base.units import show_count
    from trinity.ckpt.model_folder import check_folder, copy_model_files
    from trinity.plan.params import count_parameters

    if options.out.exists():
        raise UsageError(f"{options.out} exists.", "Name a folder that does not, or remove it first.")
    config = check_folder(options.source)
    with folder_aside(options.out) as aside:
        copy_model_files(options.source, aside)
    total = show_count(count_parameters(config).total)
    print(f"Read {options.source}: every tensor is there ({total} parameters). Wrote {options.out}.")
