"""What a page tells about one run: key figures and sections, from its run folder alone."""

from collections.abc import Sequence

from trinity.base.units import show_count, show_seconds
from trinity.report import plots
from trinity.report.compressors import FileBits
from trinity.report.page import CodeSample, Drawing, KeyFigure, Section, Table
from trinity.report.read import Row, RunRecord

_BARS = 12  # most files drawn beside the compressors
_HEATMAPS = 4  # most heatmaps shown; of more layers, these are spread over the depth


def key_figures(run: RunRecord) -> list[KeyFigure]:
    """The numbers of the page's head: how far, how well, how fast, how evenly spread."""
    found = []
    if (bits := run.last("bits_per_byte", "evaluations")) is not None:
        best = min(run.column("bits_per_byte", "evaluations")[1])
        found.append(KeyFigure(value=f"{bits:.3f}", label="bits per byte, held-out", note=f"best so far {best:.3f}"))
    if (loss := run.last("loss")) is not None:
        found.append(KeyFigure(value=f"{loss:.3f}", label="training loss", note="nats per token, last step"))
    if tokens := run.last("tokens"):
        goal = run.config.get("train", {}).get("tokens")
        note = f"of {show_count(goal)} planned" if goal else ""
        found.append(KeyFigure(value=show_count(int(tokens)), label="tokens seen", note=note))
    speeds = run.column("tokens_per_second")[1]
    if speeds:
        note = f"median of {len(speeds):,} steps"
        found.append(KeyFigure(value=show_count(_median(speeds)), label="tokens per second", note=note))
    if (violation := run.last("max_violation")) is not None:
        found.append(KeyFigure(value=f"{violation:.2f}", label="MaxVio", note="0 is perfect balance"))
    if (dead := run.last("dead_experts")) is not None:
        found.append(KeyFigure(value=f"{int(dead)}", label="dead experts", note="in the last step, all layers"))
    if run.heartbeat:
        found.append(_last_sign_of_life(run.heartbeat))
    return found


def _last_sign_of_life(beat: Row) -> KeyFigure:
    """What the run was doing when it last said so, or how and why it ended."""
    state = str(beat.get("state", "unknown"))
    told = str(beat.get("doing" if state == "running" else "reason") or "")
    where = f"in phase '{beat['phase']}'" if beat.get("phase") and state == "running" else ""
    note = ", ".join(part for part in (str(beat.get("time", "")), " ".join([told, where]).strip()) if part)
    return KeyFigure(value=state, label="last sign of life", note=note)


def sections_of_run(run: RunRecord, files: Sequence[FileBits] = ()) -> list[Section]:
    """Learning, experts, steps, text written on the way, and settings; `files` adds the bars beside gzip and xz.

    Parts whose numbers the run has not written yet are left out.
    """
    told = [_learning(run, files), _experts(run), _steps(run), _samples(run), _incidents(run), _settings(run)]
    return [section for section in told if section.figures or section.tables or section.samples]


def evaluation_table(run: RunRecord, rows: int = 12) -> Table:
    """The newest evaluations, one a row."""
    return Table(
        caption="Held-out text at each evaluation",
        header=["step", "tokens", "bits per byte", "loss (nats per token)", "bytes read"],
        rows=[
            [
                f"{row.get('step', 0):,}",
                show_count(int(row.get("tokens", 0))),
                _shown(row.get("bits_per_byte"), ".4f"),
                _shown(row.get("loss"), ".4f"),
                _shown(row.get("bytes"), ",.0f"),
            ]
            for row in run.evaluations[-rows:]
        ],
    )


def compressor_table(files: Sequence[FileBits]) -> Table:
    """Bits per byte of each file in numbers, and over all bytes together."""
    rows = [[f.name, f"{f.bytes:,}", f"{f.model:.3f}", f"{f.xz:.3f}", f"{f.gzip:.3f}"] for f in files]
    if len(files) > 1:
        total = sum(file.bytes for file in files)
        means = [sum(getattr(f, name) * f.bytes for f in files) / total for name in ("model", "xz", "gzip")]
        rows.append(["all files, by bytes", f"{total:,}", *[f"{mean:.3f}" for mean in means]])
    return Table(
        caption="Bits per byte, each file compressed on its own",
        header=["held-out file", "bytes", "this model", "xz -9e", "gzip -9"],
        rows=rows,
    )


def _learning(run: RunRecord, files: Sequence[FileBits]) -> Section:
    figures, tables = [], []
    if run.steps:
        figures.append(Drawing(title="Training loss", svg=plots.loss_curve([run])))
    if run.evaluations:
        caption = "Bits the model needs for each byte of text it was never trained on. Lower is better."
        figures.append(Drawing(title="Held-out bits per byte", svg=plots.bits_curve([run]), caption=caption))
        tables.append(evaluation_table(run))
    if files:
        figures.append(
            Drawing(
                title="Beside the usual compressors",
                svg=plots.compressor_bars(sorted(files, key=lambda file: -file.bytes)[:_BARS]),
                caption="The largest held-out files under the model, xz -9e and gzip -9; the table has all of them.",
                wide=True,
            )
        )
        tables.append(compressor_table(files))
    return Section(
        heading="Learning",
        prose="A language model is a compressor: the better it foresees text, the fewer bits each byte costs.",
        figures=figures,
        tables=tables,
    )


def _experts(run: RunRecord) -> Section:
    figures = []
    if run.layers("max_violation_by_layer")[0]:
        caption = "Load of the fullest expert over the even share, minus one. 0 is perfect balance."
        figures.append(Drawing(title="MaxVio in each sparse layer", svg=plots.max_violation(run), caption=caption))
    if run.column("load_entropy")[0]:
        series = [("load entropy", *run.column("load_entropy"))]
        caption = "Entropy of the expert load over that of an even load, mean of all layers. 1 is perfect balance."
        figures.append(Drawing(title="Load entropy", svg=plots.lines(series, "share of the largest"), caption=caption))
    for layer in _spread(len(next(iter(run.layers("expert_load")[1]), []))):
        figures.append(
            Drawing(
                title=f"Expert load over time, sparse layer {layer + 1}",
                svg=plots.expert_load(run, layer),
                caption="One row an expert, time to the right. Yellow takes more than its even share, dark takes less.",
            )
        )
    prose = (
        "Every token passes through a few of many experts. Balancing keeps all of them in work: an expert that no "
        "token reaches learns nothing."
    )
    return Section(heading="Experts", prose=prose, figures=figures)


def _steps(run: RunRecord) -> Section:
    if not run.steps:
        return Section(heading="Steps")
    figures = [
        Drawing(title="Learning rate", svg=plots.learning_rates(run)),
        Drawing(title="Gradient norm", svg=plots.gradient_norm([run]), caption="Before clipping."),
        Drawing(
            title="BatchHet",
            svg=plots.batch_het([run]),
            caption="Worst microbatch of a step over the mean of all, in loss; mixing documents keeps it low.",
        ),
        Drawing(title="Speed", svg=plots.tokens_per_second([run])),
    ]
    if spent := sum(row.get("seconds", 0.0) for row in run.steps):
        return Section(heading="Steps", prose=f"{len(run.steps):,} steps in {show_seconds(spent)}.", figures=figures)
    return Section(heading="Steps", figures=figures)


def _samples(run: RunRecord) -> Section:
    chosen = [run.samples[i] for i in sorted({0, len(run.samples) // 2, len(run.samples) - 1})] if run.samples else []
    samples = [
        CodeSample(
            title=f"after {show_count(int(row.get('tokens') or _tokens_at(run, row.get('step', 0))))} tokens",
            prompt=str(row.get("prompt", "")),
            text=str(row.get("text", "")),
        )
        for row in chosen
    ]
    return Section(heading="Samples", prose="What the model wrote on the way: first, midway, last.", samples=samples)


def _incidents(run: RunRecord) -> Section:
    rows = [[f"{row['step']:,}", row.get("what", ""), row.get("action", ""), _lost(row)] for row in run.guards]
    rows += [[f"{row['step']:,}", "run resumed from a checkpoint", "resume", ""] for row in run.resumes]
    table = Table(
        header=["step", "what", "action", "data not read again"],
        rows=sorted(rows, key=lambda row: int(row[0].replace(",", ""))),
    )
    return Section(heading="Incidents", tables=[table] if rows else [])


def _lost(incident: Row) -> str:
    """The stretch of the stream that a roll-back left behind, with the first of its newest documents."""
    window = incident.get("not_read_again")
    if not window:
        return ""
    (row, end_row), (token, end_token) = window["rows"], window["tokens"]
    count = f"{'' if window['all_documents'] else 'at least '}{window['num_documents']:,} documents"
    named = ", ".join(name[:12] for name in window["documents"][:5])
    return f"rows {row:,}-{end_row - 1:,}, tokens {token:,}-{end_token - 1:,}: {count}, the newest {named}"


def _settings(run: RunRecord) -> Section:
    rows = [[name, str(value)] for name, value in flat(run.config).items()]
    return Section(heading="Settings", tables=[Table(header=["key", "value"], rows=rows)] if rows else [])


def flat(config: Row, where: str = "") -> dict[str, object]:
    """{'train': {'tokens': 5}} -> {'train.tokens': 5}."""
    found: dict[str, object] = {}
    for name, value in config.items():
        found |= flat(value, f"{where}{name}.") if isinstance(value, dict) else {f"{where}{name}": value}
    return found


def _spread(layers: int) -> list[int]:
    """At most `_HEATMAPS` layers, first and last among them."""
    if layers <= _HEATMAPS:
        return list(range(layers))
    return [round(i * (layers - 1) / (_HEATMAPS - 1)) for i in range(_HEATMAPS)]


def _tokens_at(run: RunRecord, step: int) -> int:
    return max((int(row.get("tokens", 0)) for row in run.steps if row.get("step", 0) <= step), default=0)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _shown(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "–"
