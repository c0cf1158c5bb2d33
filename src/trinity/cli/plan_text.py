"""A plan as text: first the answer, then tables, then what was assumed."""

from typing import Any

from trinity.base.units import show_bytes, show_count, show_seconds


def as_text(found: dict[str, Any]) -> str:
    """The plan of cli/plan_figures.py, to be read in a terminal."""
    blocks = [
        _answer(found),
        [f"! {warning}" for warning in found["experts"]["warnings"]],
        _step(found),
        _memory(found),
        _wire(found),
        _others(found),
        _model(found),
        _assumptions(found),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def show_money(dollars: float) -> str:
    """12_345_678 -> '$12.3M'; cents below ten dollars."""
    return f"${dollars:.2f}" if dollars < 10 else f"${show_count(float(dollars))}"


def show_days(days: float) -> str:
    """Days, or hours and minutes of a short run."""
    return f"{days:.1f} days" if days >= 2 else show_seconds(86400 * days)


def table(header: list[str], rows: list[list[str]], title: str = "") -> list[str]:
    """Columns of text: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in [header, *rows]
    ]
    return [*([title] if title else []), *(line.rstrip() for line in lines)]


def _answer(found: dict[str, Any]) -> list[str]:
    answer, memory, cluster, training = found["answer"], found["memory"], found["cluster"], found["training"]
    layout = found["layout"]
    how = "" if cluster["asked"] else "  (chosen: give --cluster for another)"
    bound = "its roofline" if answer["bound_by_roofline"] else f"{100 * answer['efficiency']:.1f} % of the dense peak"
    return [
        f"{found['recipe']} on {cluster['name']}, {show_count(training['tokens'])} tokens{how}",
        "",
        f"  {show_days(answer['days']):<14} {show_money(answer['dollars'])}, {answer['megawatt_hours']:,.3g} MWh, "
        f"{show_count(answer['device_hours'])} device-hours, at {bound}",
        f"  fits           {show_bytes(memory['with_checkpoint_copy'])} of {show_bytes(memory['usable'])} usable on "
        "each device",
        f"  layout         replicate {layout['replicate']} x shard {layout['shard']} x context {layout['context']}, "
        f"expert {layout['expert']}, {layout['microbatches']} microbatches of {layout['microbatch_rows']} rows, "
        f"remat {layout['remat']}, {layout['precision']}",
        f"  speed          {show_count(answer['tokens_per_second'])} tokens/s, {show_seconds(answer['step_seconds'])} "
        f"a step, {answer['steps']:,} steps of {show_count(training['batch_tokens'])} tokens",
    ]  # fmt: skip


def _step(found: dict[str, Any]) -> list[str]:
    roofline, stops, answer = found["roofline"], found["stops"], found["answer"]
    names = {"arithmetic": "arithmetic at the peak", "memory": "device memory", "weights": "weights and gradients sent",
             "exchanges": "exchanges waited for", "seconds": "roofline"}  # fmt: skip
    rows = [[label, f"{roofline[name]:.3g} s"] for name, label in names.items()]
    rows += [["expected", f"{answer['step_seconds']:.3g} s"]]
    rows += [["copying a checkpoint", f"{stops['save_seconds']:.3g} s, {100 * stops['save_share']:.2f} % of the time"]]
    rows += [[f"{stops['failures']:.1f} failures", f"{100 * stops['failure_share']:.2f} % of the time"]]
    return table(["a step", ""], rows)


def _memory(found: dict[str, Any]) -> list[str]:
    memory = found["memory"]
    labels = {"moments": "optimiser moments", "gathered": "gathered layers", "backward": "layer in backward",
              "loss": "logits and head gradient", "muon": "update scratch", "process": "process and driver",
              "staging": "checkpoint copy (host)"}  # fmt: skip
    rows = [[labels.get(name, name), show_bytes(value)] for name, value in memory["parts"].items()]
    worst = max(memory["moments_of_a_step"], key=memory["moments_of_a_step"].get)
    return table(["memory of a process", ""], [*rows, [f"peak, in the {worst}", show_bytes(memory["peak"])]])


def _wire(found: dict[str, Any]) -> list[str]:
    rows = [
        [x["purpose"], x["collective"], f"{x['processes']}", "server" if x["in_one_server"] else "network",
         show_bytes(x["sent"]), f"{x['seconds']:.3g} s"]
        for x in found["wire"]
    ]  # fmt: skip
    header = ["sent by a process in a step", "collective", "processes", "over", "bytes", "at least"]
    return table(header, rows) if rows else []


def _others(found: dict[str, Any]) -> list[str]:
    rows = []
    for other in found["other_devices"]:
        smallest = f"{other['smallest']}x{other['kind']}" if other["smallest"] else "none"
        told = ["does not fit", "", "", ""]
        if "days" in other:
            told = [show_days(other["days"]), show_money(other["dollars"]), f"{other['megawatt_hours']:,.3g}",
                    show_days(other["roofline_days"])]  # fmt: skip
        rows.append([other["kind"], smallest, *told])
    count = found["cluster"]["devices"]
    return table(["device", "smallest that fits", f"on {count} of them", "money", "MWh", "roofline"], rows)


def _model(found: dict[str, Any]) -> list[str]:
    parameters, experts = found["parameters"], found["experts"]
    total = parameters["total"]
    rows = [[name.replace("_", " "), f"{n:,}", f"{100 * n / total:.2f} %"] for name, n in parameters["parts"].items()]
    rows += [["in all", f"{total:,}", ""]]
    rows += [["active for each token", f"{parameters['active']:,}", f"{100 * parameters['active'] / total:.2f} %"]]
    lines = table(["parameters", "", ""], rows)
    lines += ["", *table(
        ["context", "forward FLOPs a token", "of it attention", "training FLOPs a token", "KV cache, bfloat16"],
        [
            [f"{int(length):,}", show_count(x["forward"]), f"{100 * x['attention'] / x['forward']:.1f} %",
             show_count(x["training"]),
             show_bytes(found["kv_bytes_bfloat16"][length]) if length in found["kv_bytes_bfloat16"] else ""]
            for length, x in found["flops_per_token"].items()
        ],
    )]  # fmt: skip
    weights = found["weights_bytes"]
    lines += [
        "",
        f"  weights {show_bytes(weights['float32'])} in float32, {show_bytes(weights['bfloat16'])} in bfloat16; "
        f"training state {show_bytes(found['training']['state_bytes_float32'])}",
    ]
    if experts["rows_a_step"]:
        lines += [
            f"  one expert: {show_count(experts['rows_a_step'])} rows a step, "
            f"{show_count(experts['rows_a_microbatch'])} a microbatch, {show_count(experts['tokens'])} in the run"
        ]
    return lines


def _assumptions(found: dict[str, Any]) -> list[str]:
    lines = ["assumed (change with --price, --efficiency, --assume NAME=VALUE)"]
    source = ""
    for row in found["assumptions"]:
        told = "" if row["source"] == source else f"  [{row['source']}]"
        source = row["source"]
        lines.append(f"  {row['name']:<16} {row['value']:<9.4g} {row['meaning']}{told}")
    return lines
