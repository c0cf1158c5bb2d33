"""The tables of a plan, for the terminal and for the page alike."""

from typing import Any

from trinity.base.units import show_bytes, show_count, show_seconds
from trinity.report.page import Table

PARTS = {
    "weights": "weights",
    "moments": "optimiser moments",
    "gradients": "gradients",
    "activations": "activations",
    "recomputed": "block computed again",
    "passing": "block in forward",
    "head": "gathered head",
    "layer": "gathered layer",
    "backward": "gradients in backward",
    "prefetched": "layers on their way",
    "loss": "logits and head gradient",
    "muon": "update scratch",
    "process": "process and driver",
    "allocator": "kept by malloc",
    "staging": "checkpoint copy (host)",
}


def show_money(dollars: float) -> str:
    """12_345_678 -> '$12.3M'; cents below ten dollars."""
    return f"${dollars:.2f}" if dollars < 10 else f"${show_count(float(dollars))}"


def show_days(days: float) -> str:
    """Days, or hours and minutes of a short run."""
    return f"{days:.1f} days" if days >= 2 else show_seconds(86400 * days)


def show_energy(megawatt_hours: float) -> str:
    """Watt-hours with the prefix that reads best."""
    for power, unit in ((1e3, "GWh"), (1.0, "MWh"), (1e-3, "kWh")):
        if megawatt_hours >= power:
            return f"{megawatt_hours / power:.3g} {unit}"
    return f"{megawatt_hours * 1e6:.3g} Wh"


def tables(found: dict[str, Any]) -> list[Table]:
    """All tables of a plan in the order of reading; those without rows are left out."""
    made = [
        stage_table(found),
        step_table(found),
        memory_table(found),
        wire_table(found),
        device_table(found),
        parameter_table(found),
        context_table(found),
        inference_table(found),
        *comparison_tables(found),
    ]
    return [table for table in made if table.rows]


def stage_table(found: dict[str, Any]) -> Table:
    """Where batch or row length change; nothing for a run of one stage."""
    rows = [
        [stage["name"], show_count(stage["tokens"]), f"{stage['sequence_length']:,}", show_count(stage["batch_tokens"]),
         " x ".join(str(stage["layout"][name]) for name in ("replicate", "shard", "context")),
         str(stage["layout"]["expert"]), show_days(stage["days"]), show_money(stage["dollars"])]
        for stage in found["stages"]
    ]  # fmt: skip
    header = ["stage", "tokens", "row", "step", "replicate x shard x context", "expert", "time", "money"]
    return Table(header=header, rows=rows if len(rows) > 1 else [])


def step_table(found: dict[str, Any]) -> Table:
    roofline, stops, answer = found["roofline"], found["stops"], found["answer"]
    names = {
        "arithmetic": "arithmetic at the peak",
        "memory": "device memory",
        "launches": "starting kernels",
        "weights": "weights and gradients sent",
        "exchanges": "exchanges waited for",
        "seconds": "roofline",
    }
    rows = [[label, f"{roofline[name]:.3g} s", ""] for name, label in names.items()]
    rows += [["expected", f"{answer['step_seconds']:.3g} s", f"{100 * stops['training_share']:.2f} %"]]
    rows += [["copying a checkpoint", f"{stops['save_seconds']:.3g} s", f"{100 * stops['save_share']:.2f} %"]]
    rows += [[f"failures: {stops['failures']:.1f}", "", f"{100 * stops['failure_share']:.2f} %"]]
    return Table(header=["a step", "seconds", "of the time"], rows=rows)


def memory_table(found: dict[str, Any]) -> Table:
    memory = found["memory"]
    rows = [[PARTS[name], show_bytes(value)] for name, value in memory["parts"].items() if value]
    worst = max(memory["moments_of_a_step"], key=memory["moments_of_a_step"].get)
    return Table(
        header=["memory of a process", "bytes"], rows=[*rows, [f"peak, in the {worst}", show_bytes(memory["peak"])]]
    )


def wire_table(found: dict[str, Any]) -> Table:
    return Table(
        header=["sent by a process in a step", "collective", "processes", "over", "bytes", "at least"],
        rows=[
            [
                transfer["purpose"],
                transfer["collective"],
                str(transfer["processes"]),
                "server" if transfer["in_one_server"] else "network",
                show_bytes(transfer["sent"]),
                f"{transfer['seconds']:.3g} s",
            ]
            for transfer in found["wire"]
        ],
    )


def device_table(found: dict[str, Any]) -> Table:
    rows = []
    for other in found["other_devices"]:
        told = ["not possible" if other["smallest"] else "does not fit", "", "", ""]
        if "days" in other:
            told = [
                show_days(other["days"]),
                show_money(other["dollars"]),
                show_energy(other["megawatt_hours"]),
                show_days(other["roofline_days"]),
            ]
        rows.append([other["kind"], f"{other['smallest']}x{other['kind']}" if other["smallest"] else "none", *told])
    count = found["cluster"]["devices"]
    return Table(
        header=["device", "smallest that fits", f"on {count} of them", "money", "energy", "roofline"], rows=rows
    )


def parameter_table(found: dict[str, Any]) -> Table:
    parameters = found["parameters"]
    total = parameters["total"]
    rows = [[name.replace("_", " "), f"{n:,}", f"{100 * n / total:.2f} %"] for name, n in parameters["parts"].items()]
    rows += [["in all", f"{total:,}", ""]]
    rows += [["active for each token", f"{parameters['active']:,}", f"{100 * parameters['active'] / total:.2f} %"]]
    return Table(header=["parameters", "number", "share"], rows=rows)


def context_table(found: dict[str, Any]) -> Table:
    caches = found["kv_bytes_bfloat16"]
    return Table(
        header=["context", "forward FLOPs a token", "of it attention", "training FLOPs a token", "KV cache, bfloat16"],
        rows=[
            [
                f"{int(length):,}",
                show_count(flops["forward"]),
                f"{100 * flops['attention'] / flops['forward']:.1f} %",
                show_count(flops["training"]),
                show_bytes(caches[length]),
            ]
            for length, flops in found["flops_per_token"].items()
        ],
    )


def inference_table(found: dict[str, Any]) -> Table:
    """Memory of a request by context, and what each token of it reads with weights of each kind."""
    kinds, requests = found["inference"], found["request_bytes"]
    rows = [["weights", "", "", *(show_bytes(kind["weights_bytes"]) for kind in kinds.values())]]
    rows += [
        [f"{int(length):,}", *(show_bytes(held[length]) for held in requests.values()),
         *(show_bytes(kind["read_bytes_per_token"][length]) for kind in kinds.values())]
        for length in requests["bfloat16"]
    ]  # fmt: skip
    header = ["a request of", *(f"KV {name}" for name in requests), *(f"token reads, {name}" for name in kinds)]
    caption = (
        "as the engine holds them: whole pages and a ring of window and step for a request, weights in panels of 64; "
        "read with keys and values in bfloat16, beside float32 in float32"
    )
    return Table(header=header, rows=rows, caption=caption)


def comparison_tables(found: dict[str, Any]) -> list[Table]:
    """Beside other models: sizes, and the most that each kind of device could decode."""
    rows = found.get("compare", [])
    if not rows:
        return []
    lengths = list(rows[0]["forward_flops"])
    sizes = Table(
        header=["model", "parameters", "active", "share", "experts",
                *(f"FLOPs {int(n) // 1024}k" for n in lengths),
                *(f"KV {int(n) // 1024}k" for n in lengths)],
        rows=[
            [row["name"], show_count(row["total"]), show_count(row["active"]),
             f"{100 * row['active'] / row['total']:.1f} %",
             f"{row['chosen']} of {row['experts']}" if row["experts"] else "dense",
             *(show_count(row["forward_flops"][n]) for n in lengths),
             *(show_bytes(row["kv_bytes"][n] / int(n)) for n in lengths)]
            for row in rows
        ],
        caption="FLOPs of a token's forward pass, and bytes of cache a token, by context",
    )  # fmt: skip
    kinds = list(rows[0]["decode"])
    batches = list(rows[0]["decode"][kinds[0]])
    most = [
        Table(
            header=[f"most tokens/s, batch {batch}, context 8k", *kinds],
            rows=[
                [row["name"], *(_decoded(row["decode"][kind][batch], alone=batch == "1") for kind in kinds)]
                for row in rows
            ],
            caption="of the sequence (devices needed)" if batch == "1" else "a device (devices needed)",
        )
        for batch in batches
    ]
    return [sizes, *most]


def _decoded(bound: dict[str, float], alone: bool) -> str:
    return f"{show_count(bound['per_sequence' if alone else 'per_device'])} ({int(bound['devices'])})"
