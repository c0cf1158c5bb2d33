"""`trinity train`: pretrain a recipe into a run folder.

Example:
  trinity train debug --out runs/debug
  trinity train demo --data tokens/ --out runs/demo --set train.tokens=2M --set optim.muon_lr=0.01

Recipe debug without --data reads a small corpus made from this Python's standard library. The same command again
resumes. What
decides no step's arithmetic (the guard, the cadence of saving and evaluating) may be set anew on resume.
"""

import argparse
import json
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="debug, demo, lab256, nano, mini or large")
    parser.add_argument("--out", required=True, type=Path, metavar="RUN", help="run folder, made or resumed")
    parser.add_argument("--data", type=Path, metavar="DIR", help="token folder or mix (trinity data tokenize, mix)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        dest="settings",
        help="override one setting of the recipe",
    )
    parser.add_argument("--json", action="store_true", help="print the final figures as JSON")
    parser.set_defaults(action=train_recipe)


def train_recipe(options: argparse.Namespace) -> None:
    from trinity.base.errors import UsageError
    from trinity.config.load import override
    from trinity.recipes.table import recipe

    config = override(recipe(options.recipe), options.settings)
    if options.out.is_file():
        raise UsageError(f"{options.out} is a file.", "Name a folder with --out.")
    from trinity.data.embedded import embedded_corpus
    from trinity.train.display import TrainingDisplay
    from trinity.train.loop import train

    data = options.data or data_of(options.out)
    if data is None:
        if options.recipe != "debug":
            raise UsageError(
                f"Recipe '{options.recipe}' needs text; the embedded corpus is for 'debug' alone.",
                "Give a token folder with --data, such as demo/tokens after `make demo`.",
            )
        data = embedded_corpus(options.out / "data", config.model.vocab_size)
    with TrainingDisplay(config.horizon) as display:
        state = train(config, data, options.out, display.say, display.show)
    result = {"run": str(options.out), "step": state.step, "tokens": state.tokens}
    if options.json:
        print(json.dumps(result))
        return
    print(f"Trained {options.out} to step {state.step}, {state.tokens:,} tokens.")
    print(f"Next: trinity generate {options.out} --prompt 'def '   |   trinity report {options.out} --out page.html")


def data_of(run: Path) -> Path | None:
    """The data a run was begun with: its own folder where it has one, else the recorded path. None for a new run."""
    from trinity.base.run import CONFIG
    from trinity.train.settings import begun

    if not (run / CONFIG).exists():
        return None
    own = run / "data"
    return own if own.exists() else Path(begun(run)["data"])
