"""What a run was begun with (config.json), and what of it a resume may change: whatever no step's arithmetic reads."""

import json
from pathlib import Path
from typing import Any

import torch

from trinity.base.durable import write_json
from trinity.base.errors import ConfigError, DataError
from trinity.base.lineage import fingerprint, write_lineage
from trinity.base.run import CONFIG
from trinity.config.load import config_fingerprint, differences, to_dict
from trinity.config.run import RunConfig
from trinity.data.loader import Loader
from trinity.parallel.mesh import World

FREE = (
    "spike_sigmas",
    "norm_spike_sigmas",
    "spike_action",
    "nonfinite_action",
    "max_incidents",
    "router_factor",
    "router_action",
    "probe_every",
    "straggler_factor",
    "hang_minutes",
    "hang_action",
    "alarm_command",
    "alarm_quiet_minutes",
    "save_every_tokens",
    "evaluate_every_tokens",
    "evaluate_bytes",
    "sample_tokens",
    "keep_checkpoints",
    "keep_every_tokens",
)  # of train


def begin(run: Path, config: RunConfig, loader: Loader, data: Path, world: World) -> None:
    """Record what a new run is made from."""
    loader.tokenizer.save(run)
    write_lineage(
        run,
        "pretraining run",
        {"data": loader.data_fingerprint, "tokenizer": loader.tokenizer.fingerprint},
        {"recipe": config.name, "config": config_fingerprint(config), "seed": config.train.seed},
    )
    known = {
        **_resolved(config),
        "data": str(data),
        "data_of_phases": _data_of_phases(loader),
        "tokenizer_fingerprint": loader.tokenizer.fingerprint,
        "begun_with": machine(world),
    }
    write_json(run / CONFIG, known)  # last: a run that has it has the two others


def changes(run: Path, config: RunConfig, loader: Loader) -> list[str]:
    """The free settings that differ from those of the run, as 'train.key: old -> new'. Writes nothing.

    Raises ConfigError when a locked setting differs, DataError when the data or the tokenizer do.
    """
    known = begun(run)
    locked = differences(_locked(known["config"]), _locked(to_dict(config)))
    if locked:
        more = f"; and {len(locked) - 5} more" if len(locked) > 5 else ""
        raise ConfigError(
            f"{run} was begun with other settings: {'; '.join(locked[:5])}{more}.",
            "Give the same settings to resume, or another --out.",
        )
    before = known["data_of_phases"]
    if before != _data_of_phases(loader):
        strange = [
            str(corpus.path)
            for place, corpus in enumerate(loader.corpora.each)
            if before[place : place + 1] != [corpus.fingerprint]
        ]
        raise DataError(
            f"{run} was begun with other data than {' and '.join(strange) or 'its phases now name'}"
            f" (then {', '.join(before)}; now {', '.join(_data_of_phases(loader))}).",
            "Give the data folders the run began with, or another --out.",
        )
    if known["tokenizer_fingerprint"] != loader.tokenizer.fingerprint:
        raise DataError(
            f"{run} was begun with another tokenizer ({known['tokenizer_fingerprint']}, now "
            f"{loader.tokenizer.fingerprint}).",
            "Give the data folders the run began with, or another --out.",
        )
    return differences(known["config"], to_dict(config))


def adopt(run: Path, config: RunConfig) -> None:
    """Make the changed free settings those of the run."""
    write_json(run / CONFIG, {**begun(run), **_resolved(config)})


def begun(run: Path) -> dict[str, Any]:
    """config.json of a run; a ConfigError where it is not one."""
    path = run / CONFIG
    try:
        known = json.loads(path.read_bytes())
        for key in ("config", "data", "data_of_phases", "tokenizer_fingerprint", "begun_with"):
            known[key]
        _locked(known["config"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} does not hold the settings of a run.", "Restore it from a copy, or give another --out."
        ) from error
    return known


def locked_fingerprint(config: RunConfig) -> str:
    """A name for all settings that a checkpoint's run must share."""
    return fingerprint(_locked(to_dict(config)))


def machine(world: World) -> dict[str, Any]:
    """What else the bits of a step depend on."""
    return {"torch": str(torch.__version__), "threads": torch.get_num_threads(), "processes": world.size}


def _data_of_phases(loader: Loader) -> list[str]:
    """What each corpus of the run holds, by name of its contents."""
    return [corpus.fingerprint for corpus in loader.corpora.each]


def _locked(config: dict[str, Any]) -> dict[str, Any]:
    """What decides the arithmetic of steps. The layout over processes is not part of it, beyond rounding.

    Of data folders the contents are locked, by fingerprint, not the places where they lie.
    """
    phases = [{**phase, "mix": bool(phase["mix"])} for phase in config["phases"]]
    return {
        **config,
        "phases": phases,
        "extension": {**config["extension"], "mix": bool(config["extension"]["mix"])},
        "train": {key: value for key, value in config["train"].items() if key not in FREE},
        "parallel": {"precision": config["parallel"]["precision"]},
    }


def _resolved(config: RunConfig) -> dict[str, Any]:
    return {"config": to_dict(config), "fingerprint": config_fingerprint(config)}
