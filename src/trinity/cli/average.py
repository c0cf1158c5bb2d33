"""`trinity average`: one model from several checkpoints of a run.

Example:
  trinity average runs/nano --last 4 --out models/nano-averaged
  trinity average runs/nano/checkpoints/step-00001000 runs/nano/checkpoints/step-00002000 --out models/two

Weights are averaged tensor by tensor; --decay 0.9 lets each checkpoint weigh 0.9 of the next newer one. The result is
a Hugging Face folder that every command takes as a MODEL, with the record of what it was made from.
"""

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, nargs="+", metavar="RUN", help="a run folder, or checkpoints of one run")
    parser.add_argument("--last", type=int, default=4, metavar="K", help="newest checkpoints of a run folder")
    parser.add_argument("--decay", type=float, metavar="D", help="weight of a checkpoint against the next newer one")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="precision of the matrices written"
    )
    parser.set_defaults(action=average_checkpoints)


def average_checkpoints(options: argparse.Namespace) -> None:
    import torch

    from trinity.base.durable import folder_aside
    from trinity.base.errors import UsageError
    from trinity.base.lineage import read_lineage, write_lineage
    from trinity.ckpt.average import average, latest
    from trinity.ckpt.folder import STATE, read_state
    from trinity.ckpt.model_folder import write_model_folder
    from trinity.ckpt.opened import tokenizer_of

    if options.out.exists():
        raise UsageError(f"{options.out} exists.", "Name a folder that does not, or remove it first.")
    if options.decay is not None and not 0 < options.decay < 1:
        raise UsageError(f"--decay {options.decay} is not between 0 and 1.", "Leave it out for the plain mean.")
    one = len(options.model) == 1 and not (options.model[0] / STATE).exists()
    folders = latest(options.model[0], max(options.last, 0)) if one else options.model
    for folder in folders:
        if not (folder / STATE).is_file():
            raise UsageError(f"{folder} is not a checkpoint.", "Name one run folder, or checkpoints of one run.")
    run = folders[0].resolve().parent.parent
    tokenizer = tokenizer_of(run, read_state(folders[-1]), folders[-1])
    model, made_of = average(folders, options.decay)
    with folder_aside(options.out) as aside:
        write_model_folder(aside, model, tokenizer, getattr(torch, options.dtype))
        write_lineage(
            aside,
            "average of checkpoints",
            {"run": run.name, "lineage": read_lineage(run), "checkpoints": made_of},
            {"mean": "uniform" if options.decay is None else "exponential", "decay": options.decay},
        )
    print(f"Wrote {options.out}: the mean of {', '.join(folder.name for folder in folders)}.")
