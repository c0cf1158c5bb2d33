"""Horizontal bars, a name each and one bar a series: as inline SVG for pages, or several together as a PNG."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trinity.base.durable import write_durably
from trinity.base.units import show_count
from trinity.report.plots import SERIES, STYLE, canvas, svg_of

_PRINTED = ["#1f6f78", "#c8743b", "#8a8f98", "#7b5ea7", "#4f8f4a", "#b8475d"]  # the page's colours on light paper
_INK, _FAINT = "#23262b", "#e4e1d9"


class Bars(NamedTuple):
    """Values of each series by name, in the order of `names`."""

    title: str
    names: Sequence[str]
    series: dict[str, Sequence[float]]
    unit: str

    @property
    def height(self) -> float:
        """In CSS pixels."""
        return 80 + len(self.names) * (14 + 16 * len(self.series))


def bars_svg(bars: Bars) -> str:
    """One drawing for a page, coloured by the page."""
    with rc_context(STYLE):
        figure, axes = canvas(height=bars.height)
        draw_bars(axes, bars, SERIES)
        return svg_of(figure)


def save_picture(path: Path, title: str, drawings: Sequence[Bars]) -> None:
    """All drawings below each other in one PNG."""
    paper: dict[Any, Any] = {"axes.edgecolor": _INK, "axes.labelcolor": _INK, "text.color": _INK, "grid.color": _FAINT,
             "xtick.color": _INK, "ytick.color": _INK}  # fmt: skip
    with rc_context({**STYLE, **paper}):
        heights = [bars.height for bars in drawings]
        figure = Figure(figsize=(8, (sum(heights) + 60) / 72), dpi=150, layout="constrained")
        figure.suptitle(title)
        places = figure.subplots(len(drawings), 1, height_ratios=heights, squeeze=False)
        for axes, bars in zip(places[:, 0], drawings, strict=True):
            draw_bars(axes, bars, _PRINTED)
            axes.set_title(bars.title, loc="left", fontsize=10.5)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    write_durably(path, file.getvalue())


def draw_bars(axes: Axes, bars: Bars, colours: Sequence[str]) -> None:
    """Shorter or longer is for the caller to judge; values stand at the ends."""
    share = 0.8 / len(bars.series)
    for number, (label, values) in enumerate(bars.series.items()):
        places = [row + (number - (len(bars.series) - 1) / 2) * share for row in range(len(bars.names))]
        drawn = axes.barh(places, values, height=0.92 * share, color=colours[number % len(colours)], label=label)
        axes.bar_label(drawn, labels=[show_count(float(value)) for value in values], padding=3, fontsize=9)
    axes.set_yticks(range(len(bars.names)), bars.names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.16)
    axes.set_xlabel(bars.unit)
    if len(bars.series) > 1:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(bars.series), borderpad=0)
