"""One self-contained HTML page: no script, no external request, readable on a phone and in the dark.

    write_page(Path("story.html"), "A run", [Section(heading="Loss", prose="It fell.", figures=[...])])

Everything that is shown is escaped; only drawings (report/plots.py) are trusted as markup.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trinity.base.durable import write_durably


@dataclass(frozen=True, kw_only=True)
class KeyFigure:
    """One number of the page's head: '1.94', 'bits per byte', 'gzip -9 needs 2.31'."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure from report/plots.py with the sentence that says what to see in it."""

    title: str
    svg: str
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns and rows of text; a cell that reads as a number is set to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class CodeSample:
    """Text in a fixed-width face. `prompt` is what was given, `text` what was made from it."""

    text: str
    title: str = ""
    prompt: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A stretch of the page. `prose` is plain text: blank lines part paragraphs, `backticks` mark code."""

    heading: str
    prose: str = ""
    figures: Sequence[Drawing] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[CodeSample] = ()


def render_page(
    title: str, sections: Sequence[Section], subtitle: str = "", key_figures: Sequence[KeyFigure] = (), footer: str = ""
) -> str:
    """The page as HTML text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
    from markupsafe import Markup, escape

    headings = [section.heading for section in sections]
    assert len(set(headings)) == len(headings), f"two sections share a heading: {headings}"

    def paragraphs(text: str) -> Markup:
        blocks = [block.strip() for block in re.split(r"\n\s*\n", text) if block.strip()]
        marked = [re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(block))) for block in blocks]
        return Markup("".join(f"<p>{block}</p>" for block in marked))

    environment = Environment(
        loader=PackageLoader("trinity.report", ""),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "paragraphs": paragraphs,
        "anchor": lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-"),
        "drawing": lambda drawing, place: Markup(_placed(drawing.svg, place, str(escape(drawing.title)))),
        "number_class": lambda cell: "number" if re.match(r"^[-+±<>≤≥~]?\d", str(cell)) else "",
    }
    return environment.get_template("page.html.jinja").render(
        title=title, subtitle=subtitle, key_figures=key_figures, sections=sections, footer=footer
    )


def write_page(
    path: Path,
    title: str,
    sections: Sequence[Section],
    subtitle: str = "",
    key_figures: Sequence[KeyFigure] = (),
    footer: str = "",
) -> None:
    """Render a page and write it durably."""
    write_durably(path, render_page(title, sections, subtitle, key_figures, footer))


def _placed(svg: str, place: str, title: str) -> str:
    """Ids inside a drawing are made unique to its place, since all drawings share one page; readers hear the title."""
    named = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{place}-", svg)
    return named.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
