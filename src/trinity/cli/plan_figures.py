"""Every figure of a plan as one table of names and numbers: what `trinity plan --json` prints and the text shows.

Units are in the names or are tokens, parameters, bytes, seconds and dollars.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, NamedTuple

from trinity.base.errors import UsageError
from trinity.config.model import ModelConfig
from trinity.config.run import RunConfig
from trinity.plan.assumptions import REASONS, Assumptions
from trinity.plan.cost import DAY, Cost, members_in_server, run_cost, transfer_seconds
from trinity.plan.decode import decode_roofline
from trinity.plan.experts import expert_load
from trinity.plan.fit import Fit, best_fit, smallest_cluster
from trinity.plan.flops import attention_flops, forward_flops, model_flops, newton_schulz_flops
from trinity.plan.hardware import Cluster, Device
from trinity.plan.inference import KINDS, VALUE_BYTES, cache_bytes, read_bytes, values_of, weight_bytes
from trinity.plan.memory import kv_bytes, training_state_bytes
from trinity.plan.params import count_parameters
from trinity.plan.peers import Peer
from trinity.plan.stages import Stage, stages
from trinity.plan.wire import transfers

LENGTHS = (1024, 8192, 32768, 131072, 524288)
COMPARED_AT, DECODED_AT, BATCHES = (8192, 131072, 524288), 8192, (1, 256)
SUMMED = ("days", "dollars", "megawatt_hours", "device_hours", "steps")
_LONGEST_DAYS, _SHORT_DAYS = 45, 1


def figures(
    run: RunConfig,
    asked: tuple[str, int] | None,
    devices: dict[str, Device],
    assumptions: Assumptions,
    fixed: dict[str, object],
    contexts: Sequence[int] = (),
) -> dict[str, Any]:
    """The plan of a run on the cluster asked for (kind, size), or on one chosen by the time it would take."""
    cluster = Cluster(device=devices[asked[0]], size=asked[1]) if asked else chosen_cluster(run, devices, assumptions)
    planned = [_planned(stage, run, cluster, assumptions, fixed) for stage in stages(run)]
    main = max(planned, key=lambda each: each.cost.days)
    fit, cost = main.fit, main.cost
    return {
        "recipe": run.name,
        "cluster": {"name": str(cluster), "devices": cluster.size, "kind": cluster.device.name, "asked": bool(asked)},
        "answer": _answer(run, cluster, planned, main),
        "stages": [_stage(each) for each in planned],
        "layout": fit.layout._asdict() | {"microbatches": fit.layout.microbatches(main.stage.run), "tried": fit.tried},
        "memory": _memory(fit, cluster, assumptions),
        "wire": _wire(main.stage.run, fit, cluster),
        "roofline": cost.roofline._asdict() | {"seconds": cost.roofline.seconds},
        "stops": {"save_seconds": cost.save_seconds, "save_share": cost.save_share,
                  "failures": sum(each.cost.failures for each in planned),
                  "failure_share": cost.failure_share, "training_share": cost.training_share},
        "experts": _experts(planned, main, cluster),
        "other_devices": _others(run, main, planned, cluster, devices, assumptions, fixed),
        **_sizes(run, contexts),
        "assumptions": _assumptions(cluster.device, assumptions),
    }  # fmt: skip


class Planned(NamedTuple):
    stage: Stage
    fit: Fit
    cost: Cost


def _planned(
    stage: Stage, whole: RunConfig, cluster: Cluster, assumptions: Assumptions, fixed: dict[str, object]
) -> Planned:
    fit = best_fit(stage.run, cluster, assumptions, fixed, whole)
    return Planned(stage, fit, run_cost(stage.run, fit.layout, cluster, fit.memory, assumptions))


def chosen_cluster(run: RunConfig, devices: dict[str, Device], assumptions: Assumptions) -> Cluster:
    """One CPU machine for a run of a day, else the smallest power of two of B300 that holds the run and is quick."""
    flops = sum(_flops(stage.run) for stage in stages(run))
    cpu, gpu = devices["CPU"], devices["B300"]
    alone = Cluster(device=cpu, size=1)
    if flops / (cpu.float32 * cpu.efficiency) <= _SHORT_DAYS * DAY and smallest_cluster(run, cpu, assumptions, {}) == 1:
        return alone
    size = smallest_cluster(run, gpu, assumptions, {})
    if size is None:
        raise UsageError(f"{run.name} fits no number of B300.", "Use fewer layers or experts, or shorter rows.")
    while flops / (size * gpu.bfloat16 * gpu.efficiency) > _LONGEST_DAYS * DAY and size < run.train.batch_tokens:
        size *= 2
    return Cluster(device=gpu, size=size)


def _flops(run: RunConfig) -> float:
    """Model FLOPs of a whole stage."""
    return run.horizon * model_flops(run.model, run.data.sequence_length)


def _answer(run: RunConfig, cluster: Cluster, planned: list[Planned], main: Planned) -> dict[str, Any]:
    """Sums over the stages; speed and efficiency are those of the main stage while it steps."""
    part, cost = main.stage.run, main.cost
    busy = cluster.size * cluster.device.peak(main.fit.layout.precision) * cost.step_seconds
    sums = {name: sum(getattr(each.cost, name) for each in planned) for name in SUMMED}
    return sums | {
        "step_seconds": cost.step_seconds,
        "batch_tokens": part.train.batch_tokens,
        "tokens_per_second": part.train.batch_tokens / cost.step_seconds,
        "efficiency": part.train.batch_tokens * model_flops(run.model, part.data.sequence_length) / busy,
        "bound_by_roofline": cost.roofline.seconds >= cost.step_seconds,
        "model_flops": sum(_flops(each.stage.run) for each in planned),
    }


def _stage(each: Planned) -> dict[str, Any]:
    run = each.stage.run
    return {
        "name": each.stage.name, "tokens": run.horizon, "batch_tokens": run.train.batch_tokens,
        "sequence_length": run.data.sequence_length, "layout": each.fit.layout._asdict(), "days": each.cost.days,
        "dollars": each.cost.dollars,
    }  # fmt: skip


def _memory(fit: Fit, cluster: Cluster, assumptions: Assumptions) -> dict[str, Any]:
    parts = {field.name: getattr(fit.memory, field.name) for field in fields(fit.memory)}
    del parts["kept_gradients"]
    return {
        "parts": parts,
        "moments_of_a_step": fit.memory.moments_of_a_step,
        "peak": fit.memory.peak,
        "with_checkpoint_copy": fit.bytes_on(cluster.device),
        "usable": cluster.device.memory * assumptions.usable_memory,
    }


def _wire(run: RunConfig, fit: Fit, cluster: Cluster) -> list[dict[str, Any]]:
    """Bytes of one process in one step, transfer by transfer."""
    return [
        {
            **transfer._asdict(),
            "sent": transfer.sent,
            "in_one_server": transfer.processes
            <= members_in_server(transfer.group, fit.layout, cluster.device.per_server),
            "seconds": transfer_seconds(transfer, fit.layout, cluster),
        }
        for transfer in transfers(run, fit.layout)
    ]


def _experts(planned: list[Planned], main: Planned, cluster: Cluster) -> dict[str, Any]:
    """What one expert gets in the main stage, and the warnings of every stage: a ramp begins with small batches."""
    loads = [(each, expert_load(each.stage.run, each.fit.layout, cluster.device)) for each in planned]
    told = [
        f"{each.stage.name}: {warning}" if len(planned) > 1 else warning
        for each, load in loads
        for warning in load.warnings
    ]
    return next(load for each, load in loads if each is main)._asdict() | {"warnings": told}


def _others(
    run: RunConfig,
    main: Planned,
    planned: list[Planned],
    cluster: Cluster,
    devices: dict[str, Device],
    assumptions: Assumptions,
    fixed: dict[str, object],
) -> list[dict[str, Any]]:
    """The same run on as many devices of each kind, and the smallest cluster of the kind that holds all of it.

    The main stage is planned on each; other stages are taken to keep their proportion.
    """
    rows = []
    whole = sum(each.cost.days for each in planned) / main.cost.days
    for device in devices.values():
        if device.is_cpu != cluster.device.is_cpu and cluster.size > 1:
            continue
        row: dict[str, Any] = {"kind": device.name, "smallest": smallest_cluster(run, device, assumptions, fixed)}
        rows.append(row)
        if not row["smallest"] or row["smallest"] > cluster.size:
            continue
        other = Cluster(device=device, size=cluster.size)
        try:
            found = _planned(main.stage, run, other, assumptions, fixed)
        except UsageError:  # it fits fewer devices than it divides
            continue
        row |= {name: whole * getattr(found.cost, name) for name in ("days", "dollars", "megawatt_hours")}
        row |= {"roofline_days": whole * found.cost.steps * found.cost.roofline.seconds / DAY}
    return rows


def _sizes(run: RunConfig, contexts: Sequence[int]) -> dict[str, Any]:
    """What depends on the model, and on how it is trained, alone."""
    return {
        **model_figures(run.model, contexts, (run.data.sequence_length,)),
        "training": {"tokens": run.horizon, "batch_tokens": run.train.batch_tokens, "steps": run.steps,
                     "sequence_length": run.data.sequence_length,
                     "state_bytes_float32": training_state_bytes(run.model)},
        "newton_schulz_flops_per_step": sum(newton_schulz_flops(run.model, run.optim)),
    }  # fmt: skip


def model_figures(model: ModelConfig, contexts: Sequence[int], also: Sequence[int] = ()) -> dict[str, Any]:
    """What depends on the model alone, by contexts: those given, or some up to its own and `also`."""
    count, cache = count_parameters(model), kv_bytes(model)
    parts = asdict(count)
    del parts["active_experts"]  # part of the routed experts, not beside them
    context = model.max_position_embeddings
    lengths = sorted(set(contexts) or {length for length in LENGTHS if length < context} | {context, *also})
    return {
        "parameters": {"total": count.total, "active": count.active,
                       "active_without_embedding_and_head": count.active_without_embedding, "parts": parts},
        "flops_per_token": {
            str(length): {"forward": forward_flops(model, length), "attention": attention_flops(model, length),
                          "training": model_flops(model, length)}
            for length in lengths
        },
        "weights_bytes": {"float32": 4 * count.total, "bfloat16": 2 * count.total},
        "kv_bytes_bfloat16": {str(length): cache.at(length, model.sliding_window) for length in lengths},
        "inference": {
            kind: {"weights_bytes": weight_bytes(model, kind),
                   "read_bytes_per_token": {str(n): read_bytes(model, n, kind, values_of(kind)) for n in lengths}}
            for kind in KINDS
        },
        "request_bytes": {
            kv_dtype: {str(n): cache_bytes(model, n, kv_dtype) for n in lengths} for kv_dtype in VALUE_BYTES
        },
    }  # fmt: skip


def comparison(models: list[Peer], devices: dict[str, Device], assumptions: Assumptions) -> list[dict[str, Any]]:
    """Models side by side: parameters, FLOPs and cache by context, and the roofline of decoding on each kind of GPU."""
    return [
        {
            "name": model.name, "total": model.total, "active": model.active, "published": model.published,
            "source": model.source, "experts": model.experts, "chosen": model.chosen,
            "forward_flops": {str(length): model.forward_flops(length) for length in COMPARED_AT},
            "kv_bytes": {str(length): model.kv_bytes(length) for length in COMPARED_AT},
            "decode": {
                device.name: {
                    str(batch): decode_roofline(model, device, batch, DECODED_AT, assumptions.usable_memory)._asdict()
                    for batch in BATCHES
                }
                for device in devices.values()
                if not device.is_cpu
            },
        }
        for model in models
    ]  # fmt: skip


def _assumptions(device: Device, assumptions: Assumptions) -> list[dict[str, Any]]:
    """Inputs with their values, meanings and sources."""
    special = {"price": device.price_source, "efficiency": device.efficiency_source}
    rows = []
    for settings, reasons in ((device, special), (assumptions, REASONS)):
        for field in fields(settings):
            value = getattr(settings, field.name)
            if not isinstance(value, str):
                why = reasons.get(field.name, device.source)
                rows.append({"name": field.name, "value": value, "meaning": field.metadata["meaning"], "source": why})
    return rows
