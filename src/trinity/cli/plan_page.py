"""A plan as a picture (PNG) and as one self-contained page."""

from pathlib import Path
from typing import Any

from trinity.base.units import show_bytes, show_count
from trinity.cli.plan_tables import PARTS, show_days, show_energy, show_money, tables
from trinity.cli.plan_text import answer
from trinity.report.bars import Bars, bars_svg, save_picture
from trinity.report.page import Drawing, KeyFigure, Section, Table, write_page


def save_plan_picture(found: dict[str, Any], path: Path) -> None:
    """All drawings of a plan in one PNG."""
    save_picture(path, f"{found['recipe']} on {found['cluster']['name']}", drawings(found))


def save_plan_page(found: dict[str, Any], path: Path) -> None:
    """The planner's page: answer, drawings, every table, every assumption."""
    told, memory = found["answer"], found["memory"]
    figures = [
        KeyFigure(value=show_days(told["days"]), label="to train", note=f"on {found['cluster']['name']}"),
        KeyFigure(value=show_money(told["dollars"]), label="to rent", note=f"{show_count(told['device_hours'])} hours"),
        KeyFigure(value=show_energy(told["megawatt_hours"]), label="of energy", note="servers at their largest draw"),
        KeyFigure(value=show_bytes(memory["peak"]), label="on each device", note=f"of {show_bytes(memory['usable'])}"),
    ]
    prose = "\n\n".join([*(line.strip() for line in answer(found)[2:]), *found["experts"]["warnings"]])
    drawn = [Drawing(title=bars.title, svg=bars_svg(bars)) for bars in drawings(found)]
    inputs = Table(
        header=["name", "value", "meaning", "source"],
        rows=[[row["name"], f"{row['value']:.4g}", row["meaning"], row["source"]] for row in found["assumptions"]],
    )
    sections = [
        Section(heading="The answer", prose=prose, figures=drawn),
        Section(heading="Figures", tables=tables(found)),
        Section(heading="Assumptions", prose="Every one is an input: `--assume NAME=VALUE`.", tables=[inputs]),
    ]
    title = f"What it would cost to train {found['recipe']}"
    write_page(path, title, sections, f"{show_count(found['training']['tokens'])} tokens", figures)


def drawings(found: dict[str, Any]) -> list[Bars]:
    """What a plan shows at a glance: memory, a step, other devices and, beside other models, decoding."""
    parts = {PARTS[name]: value / 2**30 for name, value in found["memory"]["parts"].items() if value}
    roofline = found["roofline"]
    step = {name: roofline[name] for name in ("arithmetic", "memory", "launches", "weights", "exchanges")}
    step |= {"roofline": roofline["seconds"], "expected": found["answer"]["step_seconds"]}
    others = {row["kind"]: row for row in found["other_devices"] if "days" in row}
    made = [
        Bars("Memory of a process", list(parts), {"": list(parts.values())}, "GiB"),
        Bars("One step", list(step), {"": list(step.values())}, "seconds"),
        Bars(
            f"The same run on {found['cluster']['devices']} devices",
            list(others),
            {"expected": [row["days"] for row in others.values()],
             "roofline": [row["roofline_days"] for row in others.values()]},
            "days",
        ),
    ]  # fmt: skip
    if compared := found.get("compare"):
        kind = next(iter(compared[0]["decode"]))
        batches = list(compared[0]["decode"][kind])
        made.append(
            Bars(
                f"Most tokens/s a {kind} could decode",
                [row["name"] for row in compared],
                {f"batch {n}": [row["decode"][kind][n]["per_device"] for row in compared] for n in batches},
                "tokens/s a device",
            )
        )
    return [bars for bars in made if bars.names]
