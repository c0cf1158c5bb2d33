"""`trinity report`: one self-contained page about one or more runs; it can be made while a run goes on.

Example:
  trinity report runs/debug --out page.html
  trinity report runs/a runs/b --out compare.html
"""

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders; several are shown side by side")
    parser.add_argument("--out", type=Path, required=True, help="the page to write (HTML)")
    parser.add_argument("--title", help="title of the page; the names of the runs by default")
    parser.add_argument("--json", action="store_true", help="print the newest figures of each run as JSON")
    parser.set_defaults(action=report)


def report(options: argparse.Namespace) -> None:
    import json

    from trinity.report.compare import comparison_rows, sections_of_comparison
    from trinity.report.page import write_page
    from trinity.report.read import read_run
    from trinity.report.sections import key_figures, sections_of_run

    runs = [read_run(path) for path in options.runs]
    title = options.title or " and ".join(run.name for run in runs)
    if len(runs) == 1:
        recipe = runs[0].config.get("name", "")
        subtitle = f"A pretraining run of recipe {recipe}." if recipe else "A run."
        write_page(options.out, title, sections_of_run(runs[0]), subtitle, key_figures(runs[0]))
    else:
        write_page(options.out, title, sections_of_comparison(runs), f"{len(runs)} runs side by side.")
    if options.json:
        print(json.dumps({"page": str(options.out), "runs": comparison_rows(runs)}, indent=2))
    else:
        print(f"{options.out} ({options.out.stat().st_size / 1024:.0f} KiB)")
