"""The report page in a real browser: it draws its figures, asks the network for nothing, and complains of nothing."""

import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from trinity.report.compressors import beside_compressors
from trinity.report.page import write_page
from trinity.report.read import read_run
from trinity.report.sections import key_figures, sections_of_run

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --virtual-time-budget=3000"
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

# Run in the served copy only: what a script of the page's own origin finds is written into the document.
PROBE = """<script>
addEventListener("load", () => {
  const figures = [...document.querySelectorAll("figure svg")];
  const small = figures.filter(f => f.getBoundingClientRect().width < 200 || f.getBoundingClientRect().height < 100);
  const wide = [...document.querySelectorAll("figure, section > p, .keys")]
    .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
  const found = {
    figures: figures.length, small: small.length, wide: wide.length,
    scroll: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    ink: getComputedStyle(document.body).color, paper: getComputedStyle(document.body).backgroundColor,
    fetched: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")).length,
  };
  document.documentElement.setAttribute("data-found", Object.entries(found).map(([k, v]) => k + "=" + v).join(";"));
});
</script>"""


class Served(BaseHTTPRequestHandler):
    """Serves one page at / and remembers every path that was asked for."""

    def __init__(self, page: bytes, asked: list[str], *arguments: object) -> None:
        self.page, self.asked = page, asked
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200 if self.path == "/" else 404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.page if self.path == "/" else b"")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, record_run: Callable[..., Path]) -> str:
    folder = tmp_path_factory.mktemp("page")
    run = read_run(record_run(folder / "run", 40))
    files = [beside_compressors("json/decoder.py", b"def decode(text):\n    return text\n" * 30, 1.9)]
    write_page(folder / "page.html", "A run", sections_of_run(run, files), "in a browser", key_figures(run))
    return (folder / "page.html").read_text()


def visit(page: str, profile: Path, width: int, *flags: str) -> tuple[dict[str, str], list[str], str]:
    """(what the probe found, paths asked for, console lines) of one visit."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Served, page.encode(), asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        command = [str(CHROMIUM), *FLAGS.split(), f"--user-data-dir={profile}", f"--window-size={width},900", *flags]
        done = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=90, check=True)
    finally:
        server.shutdown()
        server.server_close()
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    values = dict(pair.split("=", 1) for pair in found[1].split(";")) if found else {}
    return values, asked, "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)


def with_probe(page: str) -> str:
    """The page with a script that measures it; its own policy, which forbids scripts, is put aside for that."""
    opened = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert opened != page
    return opened.replace("</body>", f"{PROBE}</body>")


@pytest.mark.parametrize("width", [1200, 500])
def test_figures_are_visible_and_nothing_sticks_out(page: str, tmp_path: Path, width: int):
    found, asked, console = visit(with_probe(page), tmp_path, width)
    assert int(found["figures"]) == page.count("<figure") > 8
    assert (found["small"], found["wide"], found["scroll"], found["fetched"]) == ("0", "0", "0", "0")
    assert asked == ["/"] and console == ""


def test_the_dark_page_is_dark(page: str, tmp_path: Path):
    light, _, _ = visit(with_probe(page), tmp_path / "light", 800)
    dark, _, _ = visit(with_probe(page), tmp_path / "dark", 800, "--blink-settings=preferredColorScheme=0")
    assert light["paper"] == "rgb(251, 250, 247)" and dark["paper"] == "rgb(22, 24, 28)"
    assert light["ink"] != dark["ink"]


def test_the_page_as_written_breaks_no_rule_of_its_own(page: str, tmp_path: Path):
    """With its policy in force: no console message, no request but the page itself."""
    _, asked, console = visit(page, tmp_path, 1200)
    assert asked == ["/"] and console == ""
