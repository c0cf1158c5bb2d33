"""A plan as text: first the answer, then tables, then what was assumed."""

from typing import Any

from trinity.base.units import show_bytes, show_count, show_seconds
from trinity.cli.plan_tables import show_days, show_energy, show_money, tables
from trinity.report.page import Table


def as_text(found: dict[str, Any]) -> str:
    """The plan of cli/plan_figures.py, to be read in a terminal."""
    warnings = [f"! {warning}" for warning in found["experts"]["warnings"]]
    blocks = [answer(found), warnings, *(aligned(table) for table in tables(found)), notes(found), assumptions(found)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def aligned(table: Table) -> list[str]:
    """Columns of text: the first to the left, the others to the right."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
    shown = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return [f"  {line}" for line in [*shown, *([table.caption] if table.caption else [])]]


def answer(found: dict[str, Any]) -> list[str]:
    """The first lines: time, money, energy, whether it fits, layout, speed."""
    told, memory, cluster, training, layout = (
        found[name] for name in ("answer", "memory", "cluster", "training", "layout")
    )
    how = "" if cluster["asked"] else "  (chosen: give --cluster for another)"
    limit = ", the roofline of this layout" if told["bound_by_roofline"] else ""
    return [
        f"{found['recipe']} on {cluster['name']}, {show_count(training['tokens'])} tokens{how}",
        "",
        f"  {show_days(told['days']):<14} {show_money(told['dollars'])}, {show_energy(told['megawatt_hours'])}, "
        f"{show_count(told['device_hours'])} device-hours, at {100 * told['efficiency']:.1f} % of the peak{limit}",
        f"  fits           {show_bytes(memory['with_checkpoint_copy'])} of {show_bytes(memory['usable'])} usable on "
        "each device",
        f"  layout         replicate {layout['replicate']} x shard {layout['shard']} x context {layout['context']}, "
        f"expert {layout['expert']}, {layout['microbatches']} microbatches of {layout['microbatch_rows']} rows, "
        f"remat {layout['remat']}, {layout['precision']}",
        f"  speed          {show_count(told['tokens_per_second'])} tokens/s, {show_seconds(told['step_seconds'])} a "
        f"step, {told['steps']:,} steps of {show_count(told['batch_tokens'])} tokens",
    ]


def notes(found: dict[str, Any]) -> list[str]:
    """Weights, and what one expert gets."""
    weights, experts = found["weights_bytes"], found["experts"]
    lines = [
        f"  weights {show_bytes(weights['float32'])} in float32, {show_bytes(weights['bfloat16'])} in bfloat16; "
        f"training state {show_bytes(found['training']['state_bytes_float32'])}",
    ]
    if experts["rows_a_step"]:
        lines += [
            f"  one expert: {show_count(experts['rows_a_step'])} rows a step, "
            f"{show_count(experts['rows_a_microbatch'])} a microbatch, {show_count(experts['tokens'])} in the run"
        ]
    return lines


def assumptions(found: dict[str, Any]) -> list[str]:
    """Inputs with their sources, a source once where it speaks for several."""
    lines, source = ["assumed (change with --price, --efficiency, --assume NAME=VALUE)"], ""
    for row in found["assumptions"]:
        told = "" if row["source"] == source else f"  [{row['source']}]"
        source = row["source"]
        lines.append(f"  {row['name']:<16} {row['value']:<9.4g} {row['meaning']}{told}")
    return lines
