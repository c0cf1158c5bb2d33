"""report.md: the numbers of an audit as tables a person can read."""

from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]
OTHER_DATA: dict[bool | None, list[str]] = {
    False: [
        "**The model's lineage names other training data than this.** What is called training text below may be text "
        "it never saw, and what is called held-out may be text it was trained on."
    ],
    None: ["The model's lineage does not say what it was trained on; that it is this data is taken on trust."],
}


def render(audit: dict[str, Any], load_shares: list[dict[str, Any]]) -> str:
    """The whole report from the content of results.json and load_shares.json."""
    results: list[Result] = audit["results"]
    config = audit["config"]
    parts = [
        f"# Audit of {audit['model']}",
        f"Suite `{audit['suite']}`, data `{audit['data']}`, context {audit['context']} tokens, seed {config['seed']}, "
        f"{audit['seconds']} s. Brackets are {config['confidence']:.0%} intervals over documents.",
        f"```\n{audit['command']}\n```",
        *OTHER_DATA.get(audit["trained_on_data"], []),
        "## Bits per byte on held-out text",
        "Lower is better. `all` weighs the kinds as they were read here, not as they occur in the corpus.",
        table(["kind", "bits per byte", "documents"], [
            [r["of"]["kind"], shown(r), str(r["n"])] for r in results if r["probe"] == "bits_per_byte"
        ]),
        "## Verbatim extraction of training text",
        f"Given {config['prefix_tokens']} tokens of a passage, does greedy decoding reproduce the next "
        f"{config['suffix_tokens']}? Held-out passages show what is merely predictable; only the excess over them "
        "speaks of memory. Copies are exact occurrences in the corpus, those included that curation dropped.",
        extraction_table(results),
        *routing_parts(results, load_shares),
        "## What this does not show",
        "Bits per byte say nothing about truth, safety or usefulness. Extraction tries a sample of passages with one "
        "kind of prompt: a text that was not extracted here may be extractable otherwise. A divergence of routing "
        "shows that kinds use experts differently, not what an expert knows.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def extraction_table(results: Sequence[Result]) -> str:
    found: dict[str, dict[str, Result]] = {}
    for r in results:
        if r["probe"] == "memorisation":
            found.setdefault(r["of"]["copies"], {})[r["name"]] = r
    if not found:
        return "No document is long enough for a passage of this length."
    rows = [
        [copies, *(shown(named.get(name)) for name in
         ("extracted verbatim", "extracted beyond control", "verbatim length", "verbatim length beyond control")),
         str(named["extracted verbatim"]["n"])]
        for copies, named in found.items()
    ]  # fmt: skip
    headings = ["copies", "extracted (share)", "beyond control", "verbatim tokens", "beyond control", "passages"]
    return table(headings, rows)


def routing_parts(results: Sequence[Result], load_shares: Sequence[dict[str, Any]]) -> list[str]:
    parts = ["## Expert use by kind of text"]
    mine = [r for r in results if r["probe"] == "routing"]
    if not mine:
        return [*parts, "The model has no sparse layer."]
    by_part: dict[tuple[str, int], dict[str, Result]] = {}
    for r in mine:
        if "kind" in r["of"]:
            by_part.setdefault((r["of"]["kind"], r["of"]["layer"]), {})[r["name"]] = r
    names = ("load entropy", "effective experts", "MaxVio", "dead experts")
    top = {(entry["kind"], entry["layer"]): entry["top"] for entry in load_shares}
    rows = [
        [kind, str(layer), *(shown(named[name]) for name in names), top_experts(top.get((kind, layer), []))]
        for (kind, layer), named in by_part.items()
    ]
    parts.append(
        "Layers count sparse layers from 0. The last column names experts and how often an even load they read."
    )
    parts.append(table(["kind", "layer", *names, "busiest experts"], rows))
    pairs = [r for r in mine if r["name"] == "divergence"]
    if pairs:
        parts.append(
            "Jensen-Shannon divergence between kinds, in bits: 0 when two kinds use the experts alike, at most 1."
        )
        parts.append(
            table(["kinds", "layer", "divergence"],
                  [[r["of"]["kinds"].replace("|", "and"), str(r["of"]["layer"]), shown(r)] for r in pairs])
        )  # fmt: skip
    return parts


def top_experts(top: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{entry['expert']} ({entry['times_even']:.1f}x)" for entry in top)


def shown(result: Result | None) -> str:
    if result is None:
        return ""
    return f"{result['value']:.3f} [{result['low']:.3f}, {result['high']:.3f}]"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
