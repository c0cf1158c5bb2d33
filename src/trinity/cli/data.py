"""Text in, token folders out: each step reads one folder and writes the next.

Example:
  trinity data ingest stdlib --out data/documents
  trinity data curate data/documents --out data/curated
  trinity tokenizer train data/curated --vocab-size 4096 --out data/tokenizer
  trinity data tokenize data/curated --tokenizer data/tokenizer --out data/tokens
  trinity data inspect data/tokens
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trinity.base.units import show_bytes, show_count
from trinity.cli import rewrite


def configure(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    configure_ingest(
        add_step(
            steps, "ingest", "read files into a documents folder", "stdlib notes/ web.jsonl.zst --out data/documents"
        )
    )
    configure_tokenize(
        add_step(
            steps,
            "tokenize",
            "turn documents into token shards with a held-out split",
            "data/curated --tokenizer data/tokenizer --out data/tokens",
        )
    )
    curate = add_step(
        steps, "curate", "drop duplicates and repetition, with a ledger", "data/documents --out data/curated"
    )
    curate.add_argument("folder", type=Path, metavar="DOCUMENTS")
    curate.add_argument("--out", required=True, type=Path, help="documents folder to write")
    curate.set_defaults(action=run_curate)
    mix = add_step(
        steps,
        "mix",
        "read several token folders in given shares of tokens",
        "data/web=0.7 data/code=0.3 --out data/mix",
    )
    mix.add_argument(
        "shares", nargs="+", metavar="TOKENS=WEIGHT", help="a token folder and its weight, such as web=0.7"
    )
    mix.add_argument("--out", required=True, type=Path, help="mix folder to write")
    mix.set_defaults(action=run_mix)
    inspect = add_step(steps, "inspect", "show what a documents, token or mix folder holds", "data/tokens --verify")
    inspect.add_argument("folder", type=Path, metavar="DIR")
    inspect.add_argument("--verify", action="store_true", help="read and hash every byte first")
    inspect.set_defaults(action=run_inspect)
    questions = add_step(steps, "questions", "make question and answer pairs from docstrings", "--out data/questions")
    questions.add_argument("--out", required=True, type=Path, help="folder for train.jsonl and heldout.jsonl")
    questions.add_argument(
        "--heldout", type=float, default=0.02, help="share of modules held out, the same as of data tokenize (0.02)"
    )
    questions.set_defaults(action=run_questions)
    for step in steps.choices.values():
        step.add_argument("--json", action="store_true", help="print the result as JSON")
    rewrite.configure(
        steps.add_parser(
            "rewrite",
            help="condense documents with a language model",
            epilog=(rewrite.__doc__ or "").partition("\n\n")[2],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )


def add_step(steps: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    return steps.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"Example: trinity data {name} {example}",
    )


def configure_ingest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a folder, a file (.txt .md .py .jsonl[.gz|.zst] .parquet), or 'stdlib': this Python's standard library",
    )
    parser.add_argument("--out", required=True, type=Path, help="documents folder to write")
    parser.add_argument("--strict", action="store_true", help="stop at the first file or line that cannot be read")
    parser.add_argument("--text-field", default="text", help="field of JSONL and Parquet that holds the text (text)")
    parser.set_defaults(action=run_ingest)


def configure_tokenize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DOCUMENTS")
    parser.add_argument("--tokenizer", required=True, type=Path, help="tokenizer.json or a folder that holds one")
    parser.add_argument("--out", required=True, type=Path, help="token folder to write")
    parser.add_argument("--heldout", type=float, default=0.02, help="share of documents held out by hash (0.02)")
    parser.set_defaults(action=run_tokenize)


def say(summary: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    print(json.dumps(summary, indent=2, ensure_ascii=False) if as_json else "\n".join(lines))


def reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {rule}" for rule, count in sorted(counts.items()))


def run_ingest(options: argparse.Namespace) -> None:
    from trinity.base.progress import progress
    from trinity.data.ingest import ingest, source_bytes

    with progress("ingest", source_bytes(options.sources)) as advance:
        summary = ingest(options.sources, options.out, options.strict, options.text_field, advance)
    lines = [f"{summary.documents} documents, {show_bytes(summary.bytes)} of text in {summary.out}"]
    lines.append(f"by kind: {reasons(summary.documents_by_kind)}")
    if summary.skipped:
        lines.append(f"left out: {reasons(summary.skipped)} (see {options.out / 'ledger.jsonl'})")
    if summary.ignored:
        lines.append(f"files of other kinds: {reasons(summary.ignored)}")
    say(asdict(summary), options.json, lines)


def run_questions(options: argparse.Namespace) -> None:
    from trinity.data.questions import write_questions

    counts = write_questions(options.out, options.heldout)
    lines = [f"{counts['train']:,} pairs in {options.out / 'train.jsonl'}, {counts['heldout']:,} held out"]
    say({"out": str(options.out), **counts}, options.json, lines)


def run_curate(options: argparse.Namespace) -> None:
    from trinity.base.progress import progress
    from trinity.data.curate import curate
    from trinity.data.documents import num_documents

    with progress("curate", num_documents(options.folder)) as advance:
        summary = curate(options.folder, options.out, advance)
    lines = [f"{summary.documents} documents, {show_bytes(summary.bytes)} of text stay in {summary.out}"]
    if summary.dropped:
        lines.append(f"dropped: {reasons(summary.dropped)} (see {options.out / 'ledger.jsonl'})")
    say(asdict(summary), options.json, lines)


def run_tokenize(options: argparse.Namespace) -> None:
    from trinity.base.progress import progress
    from trinity.data.documents import num_documents
    from trinity.data.tokenise import tokenise
    from trinity.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(options.tokenizer)
    with progress("tokenize", num_documents(options.folder)) as advance:
        splits = tokenise(options.folder, tokenizer, options.out, options.heldout, progress=advance)
    lines = [
        f"{name}: {split.documents} documents, {show_count(split.tokens)} tokens, {show_bytes(split.bytes)}"
        + (f", {split.bytes / split.tokens:.2f} bytes a token" if split.tokens else "")
        for name, split in splits.items()
    ]
    if not splits["heldout"].documents:
        lines.append(
            "Nothing is held out, so nothing can be measured on unseen text: add documents or raise --heldout."
        )
    summary = {"out": str(options.out), "vocab_size": tokenizer.vocab_size}
    say(summary | {name: asdict(split) for name, split in splits.items()}, options.json, [*lines, f"in {options.out}"])


def run_mix(options: argparse.Namespace) -> None:
    from trinity.data.inspect import inspect_mix
    from trinity.data.mix import parse_shares, write_mix

    report = inspect_mix(write_mix(parse_shares(options.shares), options.out))
    lines = [
        f"{source['weight']:.1%} {source['path']}: {show_count(source['tokens'])} tokens, "
        f"read once in {show_count(source['epoch_mix_tokens'])} tokens of the mix"
        + (f"; {source['dropped']} documents dropped: held-out text, or related to it" if source["dropped"] else "")
        for source in report["sources"]
    ]
    say(report, options.json, [*lines, f"in {options.out}"])


def run_inspect(options: argparse.Namespace) -> None:
    from trinity.data.documents import verify_data
    from trinity.data.inspect import inspect_folder

    if options.verify:
        verify_data(options.folder)
    report = inspect_folder(options.folder)
    if options.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        show_report(report)


def show_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    plain = {key: value for key, value in report.items() if not isinstance(value, list | dict)}
    console.print(Text("  ".join(f"{key} {value}" for key, value in plain.items())))
    for name in ("sources", "kinds"):
        rows = report.get(name, [])
        if rows:
            table = Table(*(key.replace("_", " ") for key in rows[0]))
            for row in rows:
                table.add_row(*(show_cell(key, value) for key, value in row.items()))
            console.print(table)
    if report.get("dropped"):
        console.print(Text(f"left out on the way: {reasons(report['dropped'])}"))
    for sample in report.get("samples", []):
        console.print(Text(f"\n{sample['source']} ({sample['kind']})", style="bold"))
        console.print(Text(sample["text"]))


def show_cell(key: str, value: Any) -> str:
    if key == "bytes":
        return show_bytes(value)
    if key == "weight":
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int | float) else str(value)
