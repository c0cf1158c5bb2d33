"""`trinity train`: pretrain a recipe into a run folder.

Example:
  trinity train debug --out runs/debug
  trinity train demo --data tokens/ --out runs/demo --set train.tokens=2M --set optim.muon_lr=0.01
  trinity train demo --out runs/demo --set train.alarm_command='mail -s alarm me@example.org' --test-alarm
  trinity train docs/guides/life.toml --out runs/life
  torchrun --nproc-per-node 8 -m trinity.cli.main train lab256 --data mix/ --out runs/lab --set parallel.expert=8

Recipe debug without --data reads a small corpus made from this Python's standard library. The same command again
resumes. What decides no step's arithmetic (the guard, the cadence of saving and evaluating) may be set anew on resume.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="debug, demo, lab256, nano, mini, large or a .toml file")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--out", type=Path, metavar="RUN", help="run folder, made or resumed")
    goal.add_argument(
        "--write-recipe",
        type=Path,
        metavar="FILE.toml",
        help="train nothing; write the recipe down, setting by setting",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="token folder or mix (trinity data tokenize, mix)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        dest="settings",
        help="override one setting of the recipe",
    )
    parser.add_argument(
        "--test-alarm", action="store_true", help="send a test alarm as the run would, and end: 0 delivered, 1 not"
    )
    parser.add_argument("--json", action="store_true", help="print the final figures as JSON")
    parser.set_defaults(action=train_recipe)


def train_recipe(options: argparse.Namespace) -> None:
    config = _configured(options)
    if options.write_recipe:
        write_down(config, options.write_recipe)
        return
    if options.test_alarm:
        _ring(options.out, config, options.json)
        return
    from trinity.ckpt.folder import reached
    from trinity.parallel.mesh import joined_world
    from trinity.train.display import TrainingDisplay
    from trinity.train.loop import train
    from trinity.train.saver import peers_of
    from trinity.train.watch import tell_of_no_start

    def missed(error: Exception) -> None:
        tell_of_no_start(options.out, config.train, error, lambda sentence: print(sentence, file=sys.stderr))

    _say_while_starting("Joining {} processes.")
    with joined_world(config, reached(options.out), missed) as world:
        data = options.data or (Path(config.own_data) if config.own_data else None)
        data = data or _given_or_embedded(options, config, peers_of(world))
        with TrainingDisplay(config.horizon, world.is_first) as display:
            state = train(config, data, options.out, display.say, display.show, world)
    if not world.is_first:
        return
    result = {"run": str(options.out), "step": state.step, "tokens": state.tokens}
    if options.json:
        print(json.dumps(result))
        return
    print(f"Trained {options.out} to step {state.step}, {state.tokens:,} tokens.")
    print(f"Next: trinity generate {options.out} --prompt 'def '   |   trinity report {options.out} --out page.html")


def _say_while_starting(what: str) -> None:
    """What the first of several processes does before it has a display: many seconds, on a machine that they share."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1" and os.environ.get("RANK", "0") == "0":
        print(what.format(size), file=sys.stderr, flush=True)


def _configured(options: argparse.Namespace) -> Any:
    """The recipe with what --set changes. Of several processes all refuse what one of them cannot read."""
    from trinity.base.errors import TrinityError, UsageError
    from trinity.config.load import override
    from trinity.recipes.table import recipe

    try:
        if options.out and options.out.is_file():
            raise UsageError(f"{options.out} is a file.", "Name a folder with --out.")
        config = override(recipe(options.recipe), options.settings)
        if options.out and not options.test_alarm:
            _say_while_starting("Loading torch on {} processes.")
            _refuse_what_no_layout_holds(config, options.recipe)
        return config
    except TrinityError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        from trinity.parallel.mesh import refuse_with_all

        refuse_with_all(error)


def _refuse_what_no_layout_holds(config: Any, name: str) -> None:
    """Said before all that a layout, mixes and data could be wrong in: no setting lets a model in that is too large."""
    from trinity.base.errors import ConfigError
    from trinity.base.units import show_bytes, show_count
    from trinity.kernels.heap import available_bytes
    from trinity.parallel.mesh import device_of
    from trinity.plan.memory import training_state_bytes
    from trinity.plan.params import count_parameters

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    needed, free = training_state_bytes(config.model), available_bytes(device_of(config.parallel))
    if free is not None and needed > processes * free:
        here = show_bytes(free) + (f" on each of {processes} processes" if processes > 1 else "")
        raise ConfigError(
            f"{show_count(count_parameters(config.model).total)} parameters need {show_bytes(needed)} to be trained, "
            f"for weights, gradients and moments alone; {here} are free here.",
            f"'trinity plan {name}' finds machines that hold it; recipes debug and demo train on small ones.",
        )


def write_down(config: Any, path: Path) -> None:
    from trinity.base.errors import UsageError
    from trinity.recipes.file import write_recipe

    if path.suffix != ".toml":
        raise UsageError(f"{path} is no name of a recipe file.", "Let it end in .toml.")
    write_recipe(config, path)
    print(f"Wrote {path}. Train it: trinity train {path} --out RUN")


def _given_or_embedded(options: argparse.Namespace, config: Any, peers: Any) -> Path:
    """The data of a run that --data does not name: what it was begun with, or, for debug, the embedded corpus."""
    from trinity.base.errors import UsageError
    from trinity.data.embedded import embedded_corpus

    begun_with = peers.together(lambda: data_of(options.out))
    if begun_with is not None:
        return begun_with
    if options.recipe != "debug":
        refusal = UsageError(
            f"Recipe '{options.recipe}' needs text; the embedded corpus is for 'debug' alone.",
            "Give a token folder with --data, such as demo/tokens after `make demo`.",
        )
        refusal.alike = True
        raise refusal
    peers.first(lambda: embedded_corpus(options.out / "data", config.model.vocab_size))
    return options.out / "data"


def _ring(run: Path, config: Any, as_json: bool) -> None:
    """Send a test alarm by every configured way and say which of them delivered it."""
    from trinity.base.errors import TrinityError
    from trinity.train.watch import ring_for_test

    problems = ring_for_test(run, config.train)
    if as_json:
        print(json.dumps({way: problem or "delivered" for way, problem in problems.items()}))
    else:
        for way, problem in problems.items():
            print(f"{way}: {problem or 'delivered'}")
    failed = [way for way, problem in problems.items() if problem]
    if failed:
        raise TrinityError(f"The test alarm was not delivered by {' and '.join(failed)}.", "Mend it and test again.")


def data_of(run: Path) -> Path | None:
    """The data a run was begun with: its own folder where it has one, else the recorded path. None for a new run."""
    from trinity.base.run import CONFIG
    from trinity.train.settings import begun

    if not (run / CONFIG).exists():
        return None
    own = run / "data"
    return own if own.exists() else Path(begun(run)["data"])
