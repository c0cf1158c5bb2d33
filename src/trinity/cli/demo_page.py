"""The demo's page: how the model learnt, how it compares with gzip and xz, what it says, what the audits found."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trinity.base.units import show_count, show_seconds
from trinity.report.compressors import FileBits, beside_compressors
from trinity.report.page import CodeSample, KeyFigure, Section, Table, write_page
from trinity.report.read import read_run
from trinity.report.sections import key_figures, sections_of_run


def write_demo_page(out: Path, page: Path, answers: Sequence, seconds: dict[str, float]) -> str:
    """Measure the held-out files, write the page, and return its headline in one sentence."""
    files = heldout_files(out)
    run = read_run(out / "run")
    beaten = sum(file.model < file.gzip for file in files)
    model, gzip, xz = (mean_bits(files, name) for name in ("model", "gzip", "xz"))
    headline = (
        f"{model:.3f} bits per byte on {len(files)} held-out library files; gzip -9 needs {gzip:.3f}, xz -9e {xz:.3f}; "
        f"below gzip on {beaten} of {len(files)} files."
    )
    figures = [
        KeyFigure(value=f"{model:.3f}", label="bits per byte", note=f"xz -9e {xz:.3f}, gzip -9 {gzip:.3f}"),
        *[figure for figure in key_figures(run) if "bits per byte" not in figure.label],
    ]
    told = {section.heading: section for section in sections_of_run(run, files)}
    asked = Section(
        heading="Asked through the server",
        prose="Both requests went through the OpenAI-compatible API of `trinity serve`, greedy.",
        samples=[
            CodeSample(title=f"{answer.seconds:.1f} s", prompt=answer.request, text=answer.text) for answer in answers
        ],
    )
    audits = Section(
        heading="Audits",
        prose=(
            "The same probes on the TrueBase and on the fine-tuned model. Brackets are 95% intervals. "
            "The whole reports lie in the audit folders."
        ),
        tables=audit_tables(out),
    )
    steps = step_table(seconds)
    sections = [Section(heading="What happened", prose=STORY.format(headline=headline)), told.pop("Learning"), asked]
    sections += [told.pop(heading) for heading in ("Experts", "Samples") if heading in told]
    sections += [audits, *told.values(), Section(heading="Commands", tables=[steps] if steps.rows else [])]
    write_page(page, "From raw text to a served model", sections, subtitle(run), figures)
    save_figures(out, files, headline)
    return headline


STORY = """The standard library of the Python on this machine was read, curated and tokenised; a sparse mixture of
experts learnt from it; its pre-anneal state was audited, signed and verified as a TrueBase release; the annealed model
was fine-tuned on questions made from docstrings, audited, and served.

{headline}"""


def subtitle(run: Any) -> str:
    tokens = run.last("tokens") or 0
    spent = sum(row.get("seconds", 0.0) for row in run.steps)
    return f"{show_count(int(tokens))} tokens in {show_seconds(spent)} of training, on this machine's own processor."


def heldout_files(out: Path) -> list[FileBits]:
    """Every held-out source file, whole, under the annealed model and under both compressors."""
    from trinity.ckpt.opened import open_model
    from trinity.data.tokens import TokenFolder
    from trinity.train.evaluate import score_documents

    opened = open_model(out / "run")
    split = TokenFolder.open(out / "tokens").heldout
    chosen = [i for i in range(split.num_documents) if split.kind(i) == "code"]
    documents = [([int(token) for token in split.document(i)], int(split.bytes[i])) for i in chosen]
    length = json.loads((out / "run" / "config.json").read_text())["config"]["data"]["sequence_length"]
    scores = score_documents(opened.model, documents, length)
    return [
        beside_compressors(split.sources[i], opened.tokenizer.decode(ids[1:-1]).encode(), score.bits_per_byte)
        for i, (ids, _), score in zip(chosen, documents, scores, strict=True)
    ]


def mean_bits(files: Sequence[FileBits], name: str) -> float:
    """Bits of all files over bytes of all files."""
    return sum(getattr(file, name) * file.bytes for file in files) / sum(file.bytes for file in files)


def save_figures(out: Path, files: Sequence[FileBits], headline: str) -> None:
    from dataclasses import asdict

    from trinity.base.durable import write_json

    write_json(out / "heldout_files.json", {"headline": headline, "files": [asdict(file) for file in files]})


def step_table(seconds: dict[str, float]) -> Table:
    return Table(
        header=["command", "seconds"],
        rows=[[f"trinity {name}", f"{value:.1f}"] for name, value in seconds.items()],
        caption="What was run; steps whose result was there already are left out.",
    )


def audit_tables(out: Path) -> list[Table]:
    """Bits per byte by kind, extraction by copies, and routing divergence, the two models side by side."""
    both = [json.loads((out / "audit" / name / "results.json").read_text())["results"] for name in ("truebase", "chat")]
    wanted = {
        "Bits per byte by kind of text": ("bits per byte", "kind"),
        "Training text extracted verbatim, by copies in the corpus (share of passages)": (
            "extracted verbatim",
            "copies",
        ),
        "Tokens reproduced verbatim, by copies in the corpus": ("verbatim length", "copies"),
    }
    return [
        Table(
            caption=caption,
            header=[of, "TrueBase", "fine-tuned", "n"],
            rows=[
                [str(a["of"][of]), interval(a), interval(b), str(a["n"])]
                for a, b in zip(*([r for r in results if r["name"] == name] for results in both), strict=True)
            ],
        )
        for caption, (name, of) in wanted.items()
    ]


def interval(result: dict[str, Any]) -> str:
    return f"{result['value']:.3f} [{result['low']:.3f}, {result['high']:.3f}]"
