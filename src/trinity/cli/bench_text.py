"""The figures of `trinity bench decode` as tables."""

from typing import Any

from trinity.base.units import show_bytes, show_count
from trinity.cli.plan_text import aligned
from trinity.report.page import Table

DRAFTS = {
    "drafted_per_token": ("drafted a token", "{:.2f}"),
    "share_taken": ("of it taken", "{:.0%}"),
    "experts_per_token_and_layer": ("experts a token and layer", "{:.2f}"),
    "share_of_distinct_tokens": ("distinct tokens", "{:.0%}"),
}


def as_text(found: dict[str, Any]) -> str:
    head = (
        f"{found['model']}: {show_count(found['parameters'])} parameters, "
        f"{show_count(found['parameters_of_a_token'])} of them for a token; {found['device']}, {found['threads']} "
        f"threads that wait {found['threads_wait']}; memory gives {found['memory_bandwidth_GB_s']} GB/s; medians of "
        f"{found['repeats']}"
    )
    shown = tables(found)
    blocks = [[head], *(aligned(table) for table in shown if table.rows)]
    if shown[-1].rows and found["weights"].startswith("random"):
        blocks += [["Greedy answers of random weights fall into loops: more drafts are taken than a model's would be."]]
    blocks += [[f"{name} is left out: {why}"] for name, why in found["left_out"].items()]
    return "\n\n".join("\n".join(block) for block in blocks)


def tables(found: dict[str, Any]) -> list[Table]:
    """Speeds; ratios to engines of as many bits, and to transformers; what a text tells; drafts."""
    engines, text = found["engines"], found.get("text", {"tokens": 0, "engines": {}})
    speeds, ratios, quality, drafts = [], [], [], []
    for name, one in engines.items():
        cells = (show_bytes, one["peak_bytes"]), ("{:.0%}".format, one["share_of_bandwidth_at_batch_1"])
        peak, share = ("" if value is None else show(value) for show, value in cells)
        took = one["tokens_per_second"]
        speeds.append([name, *map(_speed, took.values()), peak, show_bytes(one["weight_bytes_per_token"]), share])
        for other, theirs in engines.items():
            alike = one["bits_a_weight"] == theirs["bits_a_weight"] or other.startswith("transformers")
            if name.startswith("trinity") and not other.startswith("trinity") and alike:
                times = (took[case]["median"] / theirs["tokens_per_second"][case]["median"] for case in took)
                ratios.append([f"{name} / {other}", *map("{:.2f}".format, times)])
        for case, answer in one["drafts"].items():
            shown = (form.format(answer[key]["median"]) for key, (_, form) in DRAFTS.items())
            drafts.append([f"{name}, {case}", _speed(answer["tokens_per_second"]), *shown])
    for name, one in text["engines"].items():
        beside = ["", "", ""]
        if one["beside"]:
            error, same = one["relative_error_of_logits"], one["same_likeliest_token"]
            beside = [f"{error:.2g}", f"{same:.1%}", one["beside"]]
        quality.append([name, f"{one['perplexity']:.2f}", *beside])
    cases = list(next(iter(engines.values()))["tokens_per_second"]) if engines else []
    meaning = "decode N: N sequences get a token at once; prefill N: a prompt of N tokens is read"
    if any(case.startswith("requests") for case in cases):
        meaning += "; requests N: N prompts come at once, tokens of all answers"
    header = [f"{text['tokens']} tokens of text", "perplexity", "error of logits", "same likeliest token", "beside"]
    answers = ["an answer to text that", "tokens/s", *(heading for heading, _ in DRAFTS.values())]
    return [
        Table(header=["tokens/s", *cases, "peak memory", "read a token", "of the bandwidth"], rows=speeds,
              caption=meaning),
        Table(header=["times as fast", *cases], rows=ratios),
        Table(header=header, rows=quality),
        Table(header=answers, rows=drafts),
    ]  # fmt: skip


def _speed(spread: dict[str, float]) -> str:
    """A median, and half of what the repeats span as a share of it."""
    return f"{spread['median']:.1f} ±{(spread['high'] - spread['low']) / 2 / spread['median']:3.0%}"
