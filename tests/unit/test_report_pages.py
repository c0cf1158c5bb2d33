"""Report pages: read a run that goes on, draw it, and write one page that asks nothing of the network."""

import gzip
import html.parser
import json
import lzma
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity.base.errors import DataError
from trinity.cli.main import main
from trinity.report import plots
from trinity.report.compressors import beside_compressors
from trinity.report.page import CodeSample, KeyFigure, Section, Table, render_page
from trinity.report.read import read_run
from trinity.report.sections import key_figures, sections_of_run

LAYERS = 3  # sparse layers of a recorded run (tests/conftest.py)

Record = Callable[..., Path]


class Reader(html.parser.HTMLParser):
    """Collects tags, ids and every attribute that could fetch something."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name.split(":")[-1] in ("src", "href", "srcset", "action", "data", "poster"):
                self.fetched.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "link"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read_html(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == [], "a tag is left open"
    return reader


def check_self_contained(page: str) -> Reader:
    reader = read_html(page)
    assert [link for link in reader.fetched if not link.startswith(("#", "data:"))] == []
    assert "script" not in reader.tags and "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert len(set(reader.ids)) == len(reader.ids), "two elements share an id"
    for link in reader.fetched:
        assert not link.startswith("#") or link[1:] in reader.ids, f"{link} leads nowhere"
    return reader


def test_a_run_becomes_tables(record_run: Record, tmp_path: Path):
    run = read_run(record_run(tmp_path / "run", 20))
    assert [len(rows) for rows in (run.steps, run.evaluations, run.samples, run.guards, run.resumes)] == [
        20,
        2,
        1,
        1,
        1,
    ]
    assert run.column("bits_per_byte", "evaluations") == ([10240, 20480], [3.5, 2.5])
    assert run.last("loss") == 5.0 and run.last("no such thing") is None
    assert len(run.layers("expert_load")[0]) == 4
    assert run.config["name"] == "debug"


def test_what_is_no_run_is_said(tmp_path: Path):
    with pytest.raises(DataError, match="no run folder"):
        read_run(tmp_path / "none")
    with pytest.raises(DataError, match="not a run"):
        read_run(tmp_path)


def test_numbers_that_are_not_finite_are_left_out(record_run: Record, tmp_path: Path):
    folder = record_run(tmp_path / "run", 3)
    with (folder / "metrics.jsonl").open("w") as file:
        for step, loss in enumerate([1.0, float("nan"), float("inf"), 2.0], start=1):
            file.write(json.dumps({"kind": "step", "step": step, "tokens": step, "loss": loss}) + "\n")
    run = read_run(folder)
    assert run.column("loss") == ([1, 4], [1.0, 2.0])
    assert "svg" in plots.loss_curve([run])


@pytest.mark.parametrize("steps", [0, 1, 2, 9, 30])
def test_a_page_can_be_made_at_any_moment(record_run: Record, tmp_path: Path, steps: int):
    run = read_run(record_run(tmp_path / "run", steps))
    check_self_contained(render_page("run", sections_of_run(run), "still going", key_figures(run)))


def test_the_page_of_a_run(record_run: Record, tmp_path: Path):
    record_run(tmp_path / "run", 30)
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    reader = check_self_contained(page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert reader.tags.count("svg") == 2 + 2 + LAYERS + 4
    text = " ".join(reader.text)
    for told in ("2.500", "nats per token", "loss spike", "resumed", "train.batch_tokens", "30.7K", "dead experts"):
        assert told in text, told


@pytest.mark.parametrize(
    ("beat", "told"),
    [
        ({"state": "running", "doing": "saving", "phase": "wide", "reason": ""}, ["running", "saving in phase 'wide'"]),
        ({"state": "halted", "doing": "", "phase": "wide", "reason": "loss <nan>"}, ["halted", "loss <nan>"]),
        ({"state": "finished", "doing": "", "reason": ""}, ["finished"]),
    ],
)
def test_the_page_of_a_run_shows_its_last_sign_of_life(record_run: Record, tmp_path: Path, beat: dict, told: list[str]):
    folder = record_run(tmp_path / "run", 3)
    assert not [figure for figure in key_figures(read_run(folder)) if figure.label == "last sign of life"]
    (folder / "heartbeat.json").write_text(json.dumps({**beat, "time": "2026-01-01T00:00:00+00:00"}))
    run = read_run(folder)
    text = " ".join(check_self_contained(render_page("run", sections_of_run(run), "", key_figures(run))).text)
    for part in ("last sign of life", "2026-01-01T00:00:00+00:00", *told):
        assert part in text, part
    (folder / "heartbeat.json").write_text("{half")
    assert read_run(folder).heartbeat == {}


def test_runs_side_by_side(record_run: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = record_run(tmp_path / "a", 20), record_run(tmp_path / "b", 25, "train.seed=3", "optim.muon_lr=0.5")
    assert main(["report", str(a), str(b), "--out", str(tmp_path / "page.html"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [row["run"] for row in rows] == ["a", "b"] and rows[1]["tokens"] == 25 * 1024
    text = " ".join(check_self_contained((tmp_path / "page.html").read_text()).text)
    assert "optim.muon_lr" in text and "0.5" in text and "adamw_beta1" not in text


def test_a_page_of_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_compressors_are_those_everybody_has(tmp_path: Path):
    content = b"def f(n):\n    return n\n" * 40
    found = beside_compressors("f.py", content, 1.5)
    assert found.gzip == pytest.approx(8 * len(gzip.compress(content, 9, mtime=0)) / len(content))
    assert found.xz == pytest.approx(8 * len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)) / len(content))
    drawing = plots.compressor_bars([found, beside_compressors("a/very/long/name/of/a/held_out_file.py", content, 2)])
    assert "gzip -9" in drawing and "xz -9e" in drawing and "held_out_file.py" in drawing
    assert beside_compressors("empty", b"", 0.0).bytes == 0


def test_drawings_take_colours_and_fonts_from_the_page(record_run: Record, tmp_path: Path):
    run = read_run(record_run(tmp_path / "run", 30))
    for drawing in (plots.loss_curve([run]), plots.expert_load(run, 0), plots.max_violation(run)):
        assert "currentColor" in drawing and "DejaVu" not in drawing
        assert "#a1000" not in drawing and "#010203" not in drawing and "<metadata" not in drawing
        assert 'viewBox="0 0 420 250"' in drawing
    assert plots.loss_curve([run]) == plots.loss_curve([run]), "equal runs have equal drawings"


@given(st.text(), st.text(), st.lists(st.lists(st.text(), min_size=2, max_size=2), max_size=3))
def test_any_text_is_shown_and_nothing_of_it_is_markup(prose: str, sample: str, rows: list[list[str]]):
    section = Section(
        heading="What was said",
        prose=prose,
        tables=[Table(header=["a", "b"], rows=rows)],
        samples=[CodeSample(text=sample, prompt=prose)],
    )
    page = render_page("<title> & co", [section], key_figures=[KeyFigure(value="<b>", label="&")])
    reader = check_self_contained(page)
    assert set(reader.tags) <= {
        "html", "head", "meta", "link", "title", "style", "body", "header", "h1", "h2", "dl", "div", "dt", "dd", "nav",
        "ul", "li", "a", "main", "section", "p", "code", "table", "thead", "tbody", "tr", "th", "td", "pre", "span",
        "footer",
    }  # fmt: skip


def test_two_sections_need_two_headings():
    with pytest.raises(AssertionError, match="share a heading"):
        render_page("t", [Section(heading="A"), Section(heading="A")])


def test_reading_a_run_loads_no_torch(record_run: Record, tmp_path: Path):
    record_run(tmp_path / "run", 20)
    code = (
        "import sys; from trinity.cli.main import main\n"
        f"main(['report', {str(tmp_path / 'run')!r}, '--out', {str(tmp_path / 'p.html')!r}])\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
