"""Every training knob is alive: flipped, it changes what a short run does. The report's z-loss was 0 through a bug."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from trinity.base.run import read_lines
from trinity.config.load import override, to_dict
from trinity.config.run import RunConfig
from trinity.recipes.table import recipe
from trinity.train import loop

BASE = ["train.tokens=4K", "train.batch_tokens=1024", "train.save_every_tokens=1024", "train.sample_tokens=4",
        "train.evaluate_every_tokens=2048", "train.evaluate_bytes=2000",
        "optim.warmup_tokens=1K", "optim.decay_tokens=2K",
        "train.microbatch_rows=4", "optim.decay=cosine", "balance.sequence_loss=0.01", "balance.z_loss=0.001",
        "optim.adamw_weight_decay=0.1", "optim.clip_norm=0.5"]  # fmt: skip

# What each knob is flipped to where doubling its value will not do.
FLIPS: dict[str, str] = {
    "model.num_hidden_layers": "6", "model.num_key_value_heads": "4", "model.num_attention_heads": "8",
    "model.global_attn_every_n_layers": "2", "model.num_dense_layers": "2", "model.num_experts_per_tok": "3",
    "model.sliding_window": "16", "model.rms_norm_eps": "0.1", "model.rope_theta": "100.0",
    "optim.muon_momentum": "0.5", "optim.adamw_beta1": "0.5", "optim.adamw_beta2": "0.5", "optim.adamw_eps": "0.1",
    "optim.newton_schulz_dtype": "bfloat16", "optim.newton_schulz_steps": "3", "optim.decay": "linear",
    "optim.final_lr_fraction": "0.5", "optim.decay_tokens": "1K", "optim.clip_norm": "0.01",
    "balance.rule": "sign", "balance.smebu_beta": "0.9",
    "data.buffer_documents": "3", "data.sequence_length": "64",
    "train.seed": "1", "train.batch_tokens": "2048", "train.microbatch_rows": "8", "train.tokens": "6K",
    "train.keep_every_tokens": "2K",
    "train.sample_tokens": "0", "train.save_every_tokens": "0", "train.evaluate_bytes": "9000",
}  # fmt: skip

# Knobs that a healthy run of four steps cannot show, and where they are shown instead.
ELSEWHERE = {
    "name": "a label; it is written into lineage.json",
    "model.max_position_embeddings": "a bound: tests/unit/test_config_loading.py refuses longer rows",
    "data.intra_document_mask": "few rows of a short run hold two documents: tests/unit/test_data_loader.py",
    "balance.sign_gamma": "read by the sign rule alone: tests/unit/test_balance_rules.py",
    "train.spike_sigmas": "tests/unit/test_train_guard.py",
    "train.norm_spike_sigmas": "tests/unit/test_train_guard.py",
    "train.spike_action": "tests/unit/test_train_guard.py",
    "train.nonfinite_action": "tests/unit/test_train_guard.py",
    "train.max_incidents": "tests/unit/test_train_guard.py",
    "train.router_factor": "tests/unit/test_balance_trend.py",
    "train.router_action": "tests/unit/test_train_router.py",
    "train.probe_every": "tests/parallel/test_stragglers.py",
    "train.straggler_factor": "tests/parallel/test_stragglers.py",
    "train.hang_minutes": "tests/unit/test_train_hang.py",
    "train.hang_action": "tests/unit/test_train_hang.py",
    "train.alarm_command": "tests/unit/test_train_alarm.py",
    "train.alarm_quiet_minutes": "tests/unit/test_train_alarm.py",
    "phases": "debug has none: tests/unit/test_train_phases.py",
    **{
        f"extension.{name}": "read where extension.tokens is not 0: tests/unit/test_train_phases.py"
        for name in to_dict(recipe("debug").extension)
    },
    "parallel.replicate": "needs several processes: tests/parallel/test_equivalence.py",
    "parallel.shard": "needs several processes: tests/parallel/test_equivalence.py",
    "parallel.context": "needs several processes: tests/parallel/test_equivalence.py",
    "parallel.expert": "needs several processes: tests/parallel/test_equivalence.py",
    "parallel.remat": "changes memory alone: tests/parallel/test_remat.py",
    "parallel.compile": "changes speed alone: tests/parallel/test_compile.py",
    "parallel.precision": "tests/parallel/test_precision.py",
    "parallel.device": "there may be no GPU: tests/parallel/test_mesh.py",
}


def knobs(config: Any, where: str = "") -> list[str]:
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"{where}{field.name}"
        found += knobs(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return found


class Outcome(NamedTuple):
    """Everything a run leaves behind that does not depend on time."""

    log: list[dict[str, Any]]
    weights: list[float]
    kept: list[str]  # names of checkpoints


class Differs(Exception):
    pass


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")}
        for line in read_lines(folder / "metrics.jsonl")
        if line["kind"] != "save"  # when a save ends is a matter of time
    ]


def outcome(config: RunConfig, data: Path, folder: Path, base: Outcome | None = None) -> Outcome:
    """What a run leaves behind; it is ended by `Differs` after the first step whose log is not that of `base`."""

    def compare(_) -> None:
        log = log_of(folder)
        if base is not None and repr(log) != repr(base.log[: len(log)]):  # by text: nan is nan
            raise Differs

    state = loop.train(config, data, folder, lambda _: None, compare)
    weights = [float(tensor.double().sum()) for tensor in state.model.state_dict().values()]
    return Outcome(log_of(folder), weights, sorted(path.name for path in (folder / "checkpoints").iterdir()))


def flipped(config: RunConfig, knob: str) -> RunConfig:
    if knob in FLIPS:
        return override(config, [f"{knob}={FLIPS[knob]}"])
    value: Any = to_dict(config)
    for part in knob.split("."):
        value = value[part]
    return override(config, [f"{knob}={not value if isinstance(value, bool) else value * 2}"])


@pytest.fixture(scope="module")
def base(debug_data, tmp_path_factory) -> Outcome:
    torch.set_num_threads(1)
    return outcome(override(recipe("debug"), BASE), debug_data, tmp_path_factory.mktemp("base"))


def test_the_same_run_twice_has_the_same_outcome(base, debug_data, tmp_path):
    assert repr(outcome(override(recipe("debug"), BASE), debug_data, tmp_path, base)) == repr(base)


@pytest.mark.parametrize("knob", [knob for knob in knobs(recipe("debug")) if knob not in ELSEWHERE])
def test_a_flipped_knob_changes_the_run(knob, base, debug_data, tmp_path):
    try:
        found = outcome(flipped(override(recipe("debug"), BASE), knob), debug_data, tmp_path, base)
    except Differs:
        return
    assert repr(found) != repr(base)


def test_no_reason_outlives_its_knob():
    assert set(ELSEWHERE) | set(FLIPS) <= set(knobs(recipe("debug")))
