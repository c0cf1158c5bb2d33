"""Two or more runs side by side: the same curves in one drawing, the last figures in one table, and what differs."""

from collections.abc import Sequence

from trinity.base.units import show_count
from trinity.config.load import differences
from trinity.report import plots
from trinity.report.page import CodeSample, Drawing, Section, Table
from trinity.report.read import RunRecord


def comparison_rows(runs: Sequence[RunRecord]) -> list[dict[str, str | float | None]]:
    """The newest figures of each run, as plain values (None where a run has none yet)."""
    return [
        {
            "run": run.name,
            "tokens": run.last("tokens"),
            "bits_per_byte": run.last("bits_per_byte", "evaluations"),
            "loss": run.last("loss"),
            "max_violation": run.last("max_violation"),
            "dead_experts": run.last("dead_experts"),
            "tokens_per_second": run.last("tokens_per_second"),
        }
        for run in runs
    ]


def sections_of_comparison(runs: Sequence[RunRecord]) -> list[Section]:
    """Curves over each other, figures beside each other, settings that differ, and each run's newest sample."""
    runs = list(runs)
    curves = [
        Drawing(title="Training loss", svg=plots.loss_curve(runs)),
        Drawing(title="Held-out bits per byte", svg=plots.bits_curve(runs)),
        Drawing(title="Gradient norm", svg=plots.gradient_norm(runs)),
        Drawing(title="Speed", svg=plots.tokens_per_second(runs)),
        Drawing(
            title="MaxVio, largest of all layers",
            svg=plots.lines([(run.name, *run.column("max_violation")) for run in runs], "MaxVio", smooth=True, floor=0),
        ),
    ]
    samples = [
        CodeSample(
            title=run.name, prompt=str(run.samples[-1].get("prompt", "")), text=str(run.samples[-1].get("text", ""))
        )
        for run in runs
        if run.samples
    ]
    sections = [
        Section(heading="Side by side", figures=curves, tables=[_figures(runs)]),
        Section(heading="What differs", prose=_difference_prose(runs), tables=_differences(runs)),
    ]
    return sections + ([Section(heading="Samples", samples=samples)] if samples else [])


def _figures(runs: list[RunRecord]) -> Table:
    def shown(value: str | float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    rows = [
        [
            str(row["run"]),
            show_count(int(row["tokens"])) if row["tokens"] else "–",
            shown(row["bits_per_byte"], ".4f"),
            shown(row["loss"], ".4f"),
            shown(row["max_violation"], ".3f"),
            shown(row["dead_experts"], ".0f"),
            shown(row["tokens_per_second"], ",.0f"),
        ]
        for row in comparison_rows(runs)
    ]
    header = ["run", "tokens", "bits per byte", "loss (nats per token)", "MaxVio", "dead experts", "tokens per second"]
    return Table(caption="Newest figures of each run", header=header, rows=rows)


def _differences(runs: list[RunRecord]) -> list[Table]:
    tables = []
    for run in runs[1:]:
        lines = [line.partition(": ") for line in differences(runs[0].config, run.config)]
        if lines:
            rows = [[key, *change.split(" -> ", 1)] for key, _, change in lines]
            tables.append(
                Table(caption=f"{runs[0].name} and {run.name}", header=["key", runs[0].name, run.name], rows=rows)
            )
    return tables


def _difference_prose(runs: list[RunRecord]) -> str:
    return "" if _differences(runs) else "The runs have the same settings."
