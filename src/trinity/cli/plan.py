"""`trinity plan`: parameters, training state and KV cache of a recipe, from its configuration alone.

Example:
  trinity plan large
  trinity plan nano --set model.num_experts_per_tok=4 --json
"""

import argparse
from typing import Any

LENGTHS = (1024, 8192, 32768, 131072, 524288)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="debug, demo, lab256, nano, mini or large")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change a setting of the recipe")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(action=plan)


def plan(options: argparse.Namespace) -> None:
    import json

    from trinity.config.load import override
    from trinity.recipes.table import recipe

    found = figures(override(recipe(options.recipe), options.set))
    print(json.dumps(found, indent=2) if options.json else as_text(found))


def figures(run: Any) -> dict[str, Any]:
    """Every figure of the plan of a RunConfig, in parameters, tokens and bytes."""
    from dataclasses import asdict

    from trinity.plan.memory import kv_bytes, training_state_bytes
    from trinity.plan.params import count_parameters

    count, cache, window = count_parameters(run.model), kv_bytes(run.model), run.model.sliding_window
    parts = asdict(count)
    del parts["active_experts"]  # part of the routed experts, not beside them
    context = run.model.max_position_embeddings
    lengths = sorted({length for length in LENGTHS if length < context} | {context})
    return {
        "recipe": run.name,
        "parameters": {"total": count.total, "active": count.active,
                       "active_without_embedding_and_head": count.active_without_embedding, "parts": parts},
        "training": {"tokens": run.train.tokens, "batch_tokens": run.train.batch_tokens,
                     "steps": run.steps,
                     "state_bytes_float32": training_state_bytes(run.model)},
        "weights_bytes": {"float32": 4 * count.total, "bfloat16": 2 * count.total},
        "kv_bytes_bfloat16": {str(length): cache.at(length, window) for length in lengths},
    }  # fmt: skip


def as_text(found: dict[str, Any]) -> str:
    from trinity.base.units import show_bytes, show_count

    parameters, training = found["parameters"], found["training"]
    total = parameters["total"]

    def row(name: str, value: str, note: str = "") -> str:
        return f"  {name:<24}{value:>20}  {note}".rstrip()

    lines = [f"{found['recipe']}", "", "parameters"]
    lines += [
        row(name.replace("_", " "), f"{value:,}", f"{100 * value / total:.2f} %")
        for name, value in parameters["parts"].items()
    ]
    lines += [
        row("in all", f"{total:,}"),
        row("active for each token", f"{parameters['active']:,}", f"{100 * parameters['active'] / total:.2f} %"),
        "",
        "training",
        row("tokens", show_count(training["tokens"])),
        row("tokens in a step", show_count(training["batch_tokens"])),
        row("steps", f"{training['steps']:,}"),
        row(
            "state, float32",
            show_bytes(training["state_bytes_float32"]),
            "weights, gradients, optimiser; no activations",
        ),
        "",
        "weights",
        *[row(dtype, show_bytes(value)) for dtype, value in found["weights_bytes"].items()],
        "",
        "KV cache of one sequence, bfloat16",
        *[row(f"{int(length):,} tokens", show_bytes(value)) for length, value in found["kv_bytes_bfloat16"].items()],
    ]
    return "\n".join(lines)
