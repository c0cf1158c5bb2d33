"""Tables become figures: inline SVG that takes its colours from the page, so light and dark mode both read well.

The only place that imports matplotlib. A figure is drawn at the width of a phone, so its labels stay readable there.
Series colours are placeholders while matplotlib draws and CSS variables afterwards.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from trinity.base.units import show_count
from trinity.report.compressors import FileBits
from trinity.report.read import RunRecord

WIDTH, HEIGHT = 420, 250  # in CSS pixels, one per point of the drawing
_INK = "#010203"
_FAINT = "#040506"
SERIES = [f"#a1000{number}" for number in range(1, 7)]
_POINTS = 600  # most points of one line: more are averaged, which no eye could tell apart
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trinity",
    "font.size": 10.5,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}

Line = tuple[str, Sequence[float], Sequence[float]]  # label, tokens, values


def lines(
    series: Sequence[Line], unit: str, *, log: bool = False, smooth: bool = False, floor: float | None = None
) -> str:
    """Values over tokens, one line a series. `smooth` draws the raw values faintly behind their running mean."""
    with rc_context(STYLE):
        figure, axes = canvas()
        for number, (label, tokens, values) in enumerate(series):
            colour = SERIES[number % len(SERIES)]
            x, y = _thinned(tokens), _thinned(values)
            if smooth and len(y) > 20:
                axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
                y = _running_mean(y)
            axes.plot(x, y, color=colour, label=label, marker="o" if len(x) < 12 else "", markersize=3.5)
        _token_axis(axes)
        axes.set_ylabel(unit)
        if log:
            axes.set_yscale("log")
        elif floor is not None:
            axes.set_ylim(bottom=floor)
        if len(series) > 1:
            axes.legend(ncols=2 if len(series) > 3 else 1)
        return svg_of(figure)


def loss_curve(runs: list[RunRecord]) -> str:
    return lines([(run.name, *run.column("loss")) for run in runs], "loss (nats per token)", smooth=True)


def bits_curve(runs: list[RunRecord]) -> str:
    return lines([(run.name, *run.column("bits_per_byte", "evaluations")) for run in runs], "bits per byte")


def learning_rates(run: RunRecord) -> str:
    named = [("Muon", *run.column("lr_muon")), ("AdamW", *run.column("lr_adamw"))]
    return lines(named, "learning rate", floor=0)


def gradient_norm(runs: list[RunRecord]) -> str:
    return lines([(run.name, *run.column("grad_norm")) for run in runs], "gradient norm", log=True, smooth=True)


def batch_het(runs: list[RunRecord]) -> str:
    return lines([(run.name, *run.column("batch_het")) for run in runs], "BatchHet (nats)", smooth=True)


def tokens_per_second(runs: list[RunRecord]) -> str:
    return lines([(run.name, *run.column("tokens_per_second")) for run in runs], "tokens per second", floor=0)


def max_violation(run: RunRecord) -> str:
    """MaxVio (most loaded expert over the even share, minus one), one line a sparse layer."""
    tokens, rows = run.layers("max_violation_by_layer")
    layers = len(rows[0]) if rows else 0
    series: list[Line] = [(f"sparse layer {i + 1}", tokens, [row[i] for row in rows]) for i in range(layers)]
    if layers > len(SERIES):
        series = [("largest of all layers", *run.column("max_violation"))]
    return lines(series, "MaxVio", smooth=True, floor=0)


def expert_load(run: RunRecord, layer: int) -> str:
    """Share of each expert of one sparse layer over time, as a multiple of the even share (1 is perfect balance)."""
    tokens, rows = run.layers("expert_load")
    shares = [row[layer] for row in rows]
    experts = len(shares[0])
    grid = [[share[expert] * experts for share in shares] for expert in range(experts)]
    with rc_context(STYLE):
        figure, axes = canvas()
        axes.grid(False)
        image = axes.imshow(
            grid,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            cmap="viridis",
            vmin=0,
            vmax=max(2.0, min(4.0, max(map(max, grid)))),
            extent=(0, tokens[-1], -0.5, experts - 0.5),
        )
        _token_axis(axes)
        axes.set_ylabel("expert")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label("times the even share")
        bar.outline.set_linewidth(0)  # type: ignore[operator]
        return svg_of(figure)


def compressor_bars(files: list[FileBits]) -> str:
    """Bits per byte of each held-out file: the model beside gzip -9 and xz -9e. Shorter is better."""
    with rc_context(STYLE):
        figure, axes = canvas(height=80 + 46 * len(files))
        names = {"model": "this model", "xz": "xz -9e", "gzip": "gzip -9"}
        for number, (field, label) in enumerate(names.items()):
            places = [row + (number - 1) * 0.26 for row in range(len(files))]
            values = [getattr(file, field) for file in files]
            bars = axes.barh(places, values, height=0.24, color=SERIES[number], label=label)
            axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
        axes.set_yticks(range(len(files)), [_shortened(file.name) for file in files])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.margins(x=0.14)
        axes.set_xlabel("bits per byte (shorter is better)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3)
        return svg_of(figure)


def canvas(height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def _token_axis(axes: Axes) -> None:
    axes.set_xlabel("tokens seen")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show_count(int(value))))
    axes.margins(x=0.02)


def _thinned(values: Sequence[float]) -> list[float]:
    """At most `_POINTS` values: means of equal stretches."""
    stretch = -(-len(values) // _POINTS) or 1
    return [sum(part) / len(part) for i in range(0, len(values), stretch) if (part := values[i : i + stretch])]


def _running_mean(values: list[float], memory: float = 0.8) -> list[float]:
    """Exponential mean, corrected for its start so that the first values are not pulled to zero."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = memory * mean + (1 - memory) * value, memory * weight + (1 - memory)
        out.append(mean / weight)
    return out


def _shortened(name: str, longest: int = 20) -> str:
    return name if len(name) <= longest else f"…{name[1 - longest :]}"


def svg_of(figure: Figure) -> str:
    """The drawing as an <svg> element without size, fonts or colours of its own: the page's CSS gives them."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)  # older and newer ways to name a font
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = svg.replace(_INK, "currentColor").replace(_FAINT, "var(--line)")
    for number, colour in enumerate(SERIES, start=1):
        svg = svg.replace(colour, f"var(--series-{number})")
    return svg
