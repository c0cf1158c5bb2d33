"""Measure what a model learnt, leaks and routes, each number with an interval.

Example:
  trinity audit runs/demo --suite base --data tokens/ --out audits/demo/
  trinity audit runs/demo --suite base --data tokens/ --out audits/quick/ --set documents_per_kind=10
"""

import argparse
import json
import shlex
from pathlib import Path

from trinity.base.errors import UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder or a run folder")
    parser.add_argument("--suite", default="base", metavar="NAME", help="which probes to run (default: base)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the token or mix folder it was trained on")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where results.json and report.md go")
    parser.add_argument("--context", type=int, metavar="N", help="tokens read at once (default: the model's limit)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
                        help="change a setting of the audit, such as prompts_per_stratum=100")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print results.json")
    parser.set_defaults(action=audit)


def audit(options: argparse.Namespace) -> None:
    from trinity.config.audit import AuditConfig
    from trinity.config.load import override

    config = override(AuditConfig(), options.settings)
    data = options.data or Path(options.model) / "data"  # a run on the embedded text holds it
    if options.data is None and not data.is_dir():
        raise UsageError(
            f"Suite '{options.suite}' compares training text with held-out text and was given neither.",
            "Name the token folder the model was trained on with --data.",
        )

    from trinity.audit.report import extraction_table, shown, table
    from trinity.audit.suite import refuse_other_folder, run_suite, write_audit
    from trinity.ckpt.opened import open_model
    from trinity.data.mix import open_corpus

    refuse_other_folder(options.out)
    corpus = open_corpus(data)
    opened = open_model(options.model)
    command = shlex.join(["trinity", "audit", options.model, "--suite", options.suite, "--data", str(data),
                          *(f"--context={n}" for n in [options.context] if n), "--out", str(options.out),
                          *(part for setting in options.settings for part in ("--set", setting))])  # fmt: skip
    with Watching() as watching:
        found = run_suite(
            options.suite, opened, corpus, config, command=command, watch=watching.watch, context=options.context
        )
    write_audit(options.out, found)
    printed = found.as_json()
    if options.json:
        print(json.dumps(printed, indent=2, ensure_ascii=False))
        return
    results = printed["results"]
    kinds = [r for r in results if r["probe"] == "bits_per_byte"]
    print(table(["kind", "bits per byte", "documents"], [[r["of"]["kind"], shown(r), str(r["n"])] for r in kinds]))
    print()
    print(extraction_table(results))
    print(f"\nExpert use and the rest: {options.out / 'report.md'}")


class Watching:
    """Progress of an audit: one bar or line of `trinity.base.progress` for each thing being done."""

    def __init__(self) -> None:
        from contextlib import ExitStack

        self._open = ExitStack()
        self._label = ""
        self._done = 0

    def __enter__(self) -> "Watching":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def watch(self, label: str, done: int, total: int) -> None:
        from trinity.base.progress import progress

        if label != self._label:
            self._open.close()
            self._label, self._done = label, 0
            self._advance = self._open.enter_context(progress(label, total))
        self._advance(done - self._done)
        self._done = done
