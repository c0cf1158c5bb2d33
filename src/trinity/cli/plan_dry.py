"""The dry run of a plan: the real step of its layout walked without values (train/dryrun.py), beside the formulas."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

from trinity.base.units import show_bytes, show_seconds
from trinity.cli.plan_text import aligned
from trinity.config.run import RunConfig
from trinity.plan.layout import Layout
from trinity.plan.stages import stages
from trinity.report.page import Table

WITHIN = 0.02  # share by which plan and dry run may differ
_PARTS = 1000  # of the whole, for progress


def rehearsed(run: RunConfig, plan: dict[str, Any], rank: int) -> dict[str, Any]:
    """Walk a step of the longest stage of a plan (cli/plan_figures.py) as process `rank`; figures beside the plan's."""
    from trinity.base.progress import progress
    from trinity.config.load import override
    from trinity.train.dryrun import rehearse

    main = max(plan["stages"], key=lambda stage: stage["days"])["name"]
    run = next(stage.run for stage in stages(run) if stage.name == main)
    layout = Layout(**{name: plan["layout"][name] for name in Layout._fields})
    placed = ("replicate", "shard", "context", "expert", "remat", "precision")
    settings = [f"parallel.{name}={getattr(layout, name)}" for name in placed]
    run = override(run, [*settings, f"train.microbatch_rows={layout.microbatch_rows}", "parallel.device=cpu"])
    with progress(f"dry run of {run.name}", _PARTS) as advance:
        shown = 0

        def show(share: float) -> None:
            nonlocal shown
            advance(round(_PARTS * share) - shown)
            shown = round(_PARTS * share)

        found = rehearse(run, layout.size, rank, show)
    return compared(run, layout, found)


def compared(run: RunConfig, layout: Layout, found: Any) -> dict[str, Any]:
    """A rehearsal (train/dryrun.py) and the formulas, line by line. Bytes of one process, in one step."""
    from trinity.plan.memory import rank_memory
    from trinity.plan.wire import transfers

    by_purpose: dict[tuple[str, str], float] = defaultdict(float)
    by_collective: dict[str, float] = defaultdict(float)
    walked: dict[str, float] = defaultdict(float)
    for transfer in transfers(run, layout, found.rank):
        collective = "all-to-all" if transfer.collective == "halo" else transfer.collective
        by_purpose[transfer.purpose, collective] += transfer.sent
        by_collective[collective] += transfer.sent
    for kind, sent in found.sent.items():
        walked[kind.collective] += sent.bytes
    # A rehearsal has the shapes of a CPU in float32, and in bfloat16 of a GPU, but for an update in float32; no process
    # around it, no freed memory that cannot be used, and no layer fetched ahead.
    plan, on_cpu = (rank_memory(run, layout, host) for host in (layout.precision == "float32", True))
    plan = replace(plan, muon=on_cpu.muon, process=0, allocator=0, prefetched=0)
    moments = plan.moments_of_a_step
    peaks = {name: peak.bytes for name, peak in found.peaks.items()}
    memory = {
        **{name: (found.held[name], getattr(plan, name)) for name in ("weights", "moments", "gradients")},
        "forward and loss": (
            max(peaks.get("forward", 0), peaks.get("loss", 0)),
            max(moments["forward"], moments["loss"]),
        ),
        "backward": (peaks.get("backward", 0), moments["backward"]),
        "update": (peaks.get("update", 0), moments["update"]),
        "peak": (max(peaks.values()), max(moments.values())),
    }
    found_by = {(kind.purpose, kind.collective): sent.bytes for kind, sent in found.sent.items()}
    purposes = sorted({*by_purpose, *found_by}, key=lambda kind: -by_purpose[kind])
    return {
        "rank": found.rank,
        "processes": found.processes,
        "microbatches": found.microbatches,
        "walked": found.walked,
        "seconds": found.seconds,
        "sent": [_line(name, walked[name], by_collective[name]) for name in sorted({*walked, *by_collective})],
        "purposes": [
            _line(kind[0], found_by.get(kind, 0.0), by_purpose[kind]) | {"collective": kind[1]} for kind in purposes
        ],
        "memory": [_line(name, *pair) for name, pair in memory.items()],
        "peak_parts": max(found.peaks.values(), key=lambda peak: peak.bytes).parts,
    }  # fmt: skip


def _line(name: str, walked: float, planned: float) -> dict[str, Any]:
    """difference: of the plan from the dry run, as a share of the dry run."""
    difference = planned / walked - 1 if walked else float(planned > 0)
    return {"name": name, "dry_run": walked, "plan": planned, "difference": difference}


def outside(found: dict[str, Any]) -> list[str]:
    """The lines of the comparison that differ by more than WITHIN: bytes by collective, and the peak of memory."""
    lines = found["sent"] + [line for line in found["memory"] if line["name"] == "peak"]
    return [line["name"] for line in lines if abs(line["difference"]) > WITHIN]


def dry_text(found: dict[str, Any]) -> str:
    """The comparison as tables."""
    more = f", {found['walked']} walked" if found["walked"] < found["microbatches"] else ""
    head = (
        f"dry run: rank {found['rank']} of {found['processes']:,}, {found['microbatches']} microbatches{more}, "
        f"{show_seconds(found['seconds'])}"
    )
    columns = ["dry run", "plan", "difference"]
    blocks = [[head]]
    blocks.append(aligned(Table(header=["sent in a step", *columns], rows=[_cells(line) for line in found["sent"]])))
    blocks.append(aligned(Table(header=["of it", *columns], rows=[_cells(line) for line in found["purposes"]])))
    left_out = "without what no rehearsal has: the process itself, layers on their way, freed memory"
    memory = Table(header=["memory", *columns], rows=[_cells(line) for line in found["memory"]], caption=left_out)
    blocks.append(aligned(memory))
    wrong = outside(found)
    verdict = f"! plan and dry run differ by more than {WITHIN:.0%} in: {', '.join(wrong)}" if wrong else (
        f"bytes by collective and the peak of memory agree within {WITHIN:.0%}"
    )  # fmt: skip
    return "\n\n".join("\n".join(block) for block in [*blocks, [verdict]])


def _cells(line: dict[str, Any]) -> list[str]:
    return [line["name"], show_bytes(line["dry_run"]), show_bytes(line["plan"]), f"{line['difference']:+.2%}"]
