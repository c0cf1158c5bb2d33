"""`trinity plan`: what it would cost to train a recipe: time, money, layout, memory, bytes sent; no torch, no GPU.

Without --cluster it takes one CPU machine if that needs a day at most, and else the smallest power of two of B300 GPUs
that ends within 45 days.

Example:
  trinity plan large --cluster 2048xB300 --tokens 17T
  trinity plan demo --cluster 1xCPU
  trinity plan nano --cluster 512xH200 --price 2.5 --efficiency 0.2 --assume power_usage=1.1
  trinity plan large --compare all --page plan.html --plot plan.png
  trinity plan mini --set model.num_experts_per_tok=4 --json
  trinity plan large --dry-run
  trinity plan models/chat --context 4096 32768
"""

import argparse
import sys
from typing import Any

OF_TRAINING = ("cluster", "tokens", "price", "efficiency", "assume", "set", "compare", "plot", "page", "dry_run")
FIXED = ("replicate", "shard", "context", "expert", "remat", "precision")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="debug, demo, lab256, nano, mini, large or a .toml file; of a "
                        "model folder or a run, what answers would take")  # fmt: skip
    parser.add_argument("--cluster", metavar="NxKIND", help="such as 2048xB300, 8xH100, 1xCPU")
    parser.add_argument("--tokens", metavar="N", help="tokens to train on, such as 17T (default: the recipe's)")
    parser.add_argument("--context", type=int, nargs="+", default=(), metavar="N", help="lengths of text that memory "
                        "and reads are told for (default: some up to the model's own)")  # fmt: skip
    parser.add_argument("--price", metavar="DOLLARS", help="dollars for a device and hour")
    parser.add_argument("--efficiency", metavar="SHARE", help="model FLOP/s of a step over the dense peak, such as 0.3")
    parser.add_argument("--assume", action="append", default=[], metavar="A=B", help="change a figure of the device or "
                        "an assumption, such as memory=192e9 or power_usage=1.1")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change a setting of the recipe; "
                        "parallel.* and train.microbatch_rows are searched unless set here")  # fmt: skip
    parser.add_argument("--compare", metavar="A,B", help="models to set beside it: recipes, gpt-oss-120b, AFM-4.5B, "
                        "GLM-4.5, Qwen3-235B, DeepSeek-V3, or all of these five")  # fmt: skip
    parser.add_argument("--plot", metavar="FILE.png", help="also draw the plan")
    parser.add_argument("--page", metavar="FILE.html", help="also write the plan as one self-contained page")
    parser.add_argument("--dry-run", action="store_true", help="also walk the real step of the whole layout, without "
                        "memory or other processes, and set what it takes beside the plan")  # fmt: skip
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="the process a dry run looks at (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(action=plan)


def plan(options: argparse.Namespace) -> None:
    import json
    from pathlib import Path

    from trinity.base.errors import UsageError
    from trinity.cli.plan_text import as_text
    from trinity.recipes.table import RECIPES

    for path, kind in ((options.plot, ".png"), (options.page, ".html")):
        if path and Path(path).suffix.lower() != kind:
            raise UsageError(f"'{path}' would hold a {kind[1:].upper()} file.", f"Give it a name that ends in {kind}.")
    if any(length < 1 for length in options.context):
        raise UsageError("--context takes lengths in tokens, above 0.", "Such as --context 4096 32768.")
    if options.recipe not in RECIPES and Path(options.recipe).is_dir():
        plan_of_model(options)
        return
    found = planned(options)
    if options.plot or options.page:
        from trinity.cli.plan_page import save_plan_page, save_plan_picture

        for path, save in ((options.plot, save_plan_picture), (options.page, save_plan_page)):
            if path:
                save(found, Path(path))
                print(f"Wrote {path}.", file=sys.stderr)
    print(json.dumps(found, indent=2) if options.json else as_text(found))
    if options.dry_run and not options.json:
        from trinity.cli.plan_dry import dry_text

        print(f"\n{dry_text(found['dry_run'])}")


def plan_of_model(options: argparse.Namespace) -> None:
    """What answers of a model take that is there already: its training needs no plan."""
    import json
    from pathlib import Path

    from trinity.base.errors import UsageError
    from trinity.base.units import show_count
    from trinity.ckpt.opened import shape_of
    from trinity.cli.plan_figures import model_figures
    from trinity.cli.plan_tables import inference_table
    from trinity.cli.plan_text import aligned

    given = [name for name in OF_TRAINING if getattr(options, name)]
    if given:
        raise UsageError(
            f"--{given[0].replace('_', '-')} is for training, and {options.recipe} is a model.", "Name a recipe for it."
        )
    found = model_figures(shape_of(Path(options.recipe)), options.context)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    total, active = (show_count(found["parameters"][name]) for name in ("total", "active"))
    print(f"{options.recipe}: {total} parameters, {active} of them for a token\n")
    print("\n".join(aligned(inference_table(found))))


def planned(options: argparse.Namespace) -> dict[str, Any]:
    """The whole plan that a command line asks for."""
    from trinity.cli.plan_figures import comparison, figures
    from trinity.config.load import override
    from trinity.plan.hardware import DEVICES, parse_cluster
    from trinity.plan.peers import as_peer
    from trinity.recipes.table import recipe

    run = recipe(options.recipe)
    run = override(for_tokens(run, options.tokens) if options.tokens else run, options.set)
    changes = list(options.assume)
    changes += [f"{name}={given}" for name in ("price", "efficiency") if (given := getattr(options, name)) is not None]
    devices, assumptions = assumed(list(DEVICES.values()), changes)
    cluster = parse_cluster(options.cluster) if options.cluster else None
    found = figures(
        run, cluster and (cluster.device.name, cluster.size), devices, assumptions, fixed_by(options.set, run),
        options.context,
    )  # fmt: skip
    if options.compare is not None:
        peers = compared_with(options.compare)
        found["compare"] = comparison([as_peer(run.name, run.model), *peers], devices, assumptions)
    if options.dry_run:
        from trinity.cli.plan_dry import rehearsed

        found["dry_run"] = rehearsed(run, found, options.rank)
    return found


def compared_with(text: str) -> list[Any]:
    """The models of --compare, in its order: published ones by name, `all` of them, and recipes of ours."""
    from trinity.plan.peers import PEERS, as_peer, peer
    from trinity.recipes.table import RECIPES, recipe

    found: dict[str, Any] = {}
    for name in (part.strip() for part in text.split(",")):
        if name == "all":
            found |= PEERS
        elif name in RECIPES or name.endswith(".toml"):
            run = recipe(name)
            found[name] = as_peer(run.name, run.model)
        else:
            found[name] = peer(name)
    return list(found.values())


def for_tokens(run: Any, text: str) -> Any:
    """The run over that many tokens: warm-up, decay, phases and context extension keep their shares."""
    from dataclasses import replace

    from trinity.base.errors import UsageError
    from trinity.base.units import parse_count

    tokens, optim, extension = parse_count(text), run.optim, run.extension
    if tokens < 1:
        raise UsageError("A run of no tokens costs nothing.", "Write a number such as 2T.")
    share = tokens / run.train.tokens
    return replace(
        run,
        train=replace(run.train, tokens=tokens),
        optim=replace(
            optim, warmup_tokens=int(share * optim.warmup_tokens), decay_tokens=int(share * optim.decay_tokens)
        ),
        extension=replace(
            extension,
            tokens=int(share * extension.tokens),
            warmup_tokens=int(share * extension.warmup_tokens),
        ),
        phases=tuple(replace(phase, from_tokens=int(share * phase.from_tokens)) for phase in run.phases),
    )


def assumed(devices: list[Any], changes: list[str]) -> tuple[dict[str, Any], Any]:
    """Devices and assumptions with `name=value` applied to whichever has that name. An unknown name is a UsageError."""
    from dataclasses import fields

    from trinity.base.errors import UsageError, nearest
    from trinity.config.load import override
    from trinity.plan.assumptions import Assumptions
    from trinity.plan.hardware import Device

    names = {field.name for field in fields(Device)} - {"name"}
    own = {field.name for field in fields(Assumptions)}
    for change in changes:
        name = change.partition("=")[0].strip()
        if name not in names | own:
            raise UsageError(f"'{name}' is no assumption of a plan.", nearest(name, sorted(names | own)))
    of_device = [change for change in changes if change.partition("=")[0].strip() in names]
    told = [f"{c.partition('=')[0]}_source=given" for c in of_device if c.partition("=")[0] in ("price", "efficiency")]
    return (
        {device.name: override(device, of_device + told) if of_device else device for device in devices},
        override(Assumptions(), [change for change in changes if change not in of_device]),
    )


def fixed_by(assignments: list[str], run: Any) -> dict[str, object]:
    """What --set takes out of the search for a layout."""
    named = {assignment.partition("=")[0].strip() for assignment in assignments}
    fixed = {name: getattr(run.parallel, name) for name in FIXED if f"parallel.{name}" in named}
    if "train.microbatch_rows" in named:
        fixed["microbatch_rows"] = run.train.microbatch_rows
    return {name: value for name, value in fixed.items() if (name, value) != ("shard", 0)}
