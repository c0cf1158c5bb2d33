"""A whole life in one run: a ramp, other data, the anneal, longer rows; killed anywhere, it ends in the same bits."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trinity.base.errors import CheckpointError, ConfigError, DataError
from trinity.base.run import read_lines
from trinity.ckpt.opened import open_model
from trinity.config.load import override, to_dict
from trinity.config.phases import ExtensionConfig, PhaseConfig
from trinity.config.run import RunConfig
from trinity.data.documents import Document, writing_documents
from trinity.data.tokenise import tokenise
from trinity.optim.schedule import factor_at
from trinity.recipes.table import recipe
from trinity.text.train_bpe import train_bpe
from trinity.train import loop
from trinity.train.state import TrainState

SMALL = ["model.num_hidden_layers=2", "train.tokens=8K", "train.batch_tokens=512", "train.microbatch_rows=4",
         "data.sequence_length=64", "optim.warmup_tokens=512", "optim.decay_tokens=3000", "train.evaluate_bytes=300",
         "train.evaluate_every_tokens=4096", "train.sample_tokens=2", "train.save_every_tokens=512"]  # fmt: skip
STEPS = 16  # four of 512 tokens, six of 1024; then five of 768, and one more


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three token folders of one tokenizer: web, code, long."""
    place, tokenizer = tmp_path_factory.mktemp("data"), train_bpe(iter(["words and more words, 12345\n" * 9]), 300)
    for name, count, length in (("web", 60, 12), ("code", 40, 20), ("long", 12, 300)):
        with writing_documents(place / f"{name}-text", {}, {}) as (writer, _):
            for number in range(count):
                text = f"{name} {number} " + "and words " * (length + number * 7 % 13)
                writer.write(Document(text, f"{number}", name))
        tokenise(place / f"{name}-text", tokenizer, place / name, 0.1)
    return {name: place / name for name in ("web", "code", "long")}


@pytest.fixture(scope="module")
def life(data: dict[str, Path]) -> RunConfig:
    return replace(
        override(recipe("debug"), SMALL),
        phases=(
            PhaseConfig(name="wide", from_tokens=2000, batch_tokens=1024),
            PhaseConfig(name="code", from_tokens=4096, mix=str(data["code"])),
        ),
        extension=ExtensionConfig(
            tokens=4000, sequence_length=256, batch_tokens=768, mix=str(data["long"]), warmup_tokens=1000,
            final_lr_fraction=0.05,
        ),
    )  # fmt: skip


class Killed(Exception):
    pass


def live(config: RunConfig, data: dict[str, Path], run: Path, killed_at: int = 0) -> TrainState:
    """Train to the end, or until a step is done and logged but none of its duties."""

    def show(progress) -> None:
        if progress.step == killed_at:
            raise Killed

    return loop.train(config, data["web"], run, lambda _: None, show)


def log_of(run: Path) -> list[dict]:
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")}
        for line in read_lines(run / "metrics.jsonl")
        if line["kind"] in ("step", "evaluation", "phase", "sample")
    ]


def bits_of(state: TrainState) -> dict[str, torch.Tensor]:
    moments = {
        f"{name}/{slot}": value
        for name, parameter in state.model.named_parameters()
        for optimiser in (state.optimisers.muon, state.optimisers.adamw)
        for slot, value in optimiser.state.get(parameter, {}).items()
    }
    return {**state.model.state_dict(), **moments, "bias_momentum": state.bias_momentum}


def same(one: TrainState, other: TrainState) -> bool:
    bits, others = bits_of(one), bits_of(other)
    assert bits.keys() == others.keys()
    return one.loader.state() == other.loader.state() and all(torch.equal(bits[key], others[key]) for key in bits)


@pytest.fixture(scope="module")
def unbroken(life: RunConfig, data: dict[str, Path], tmp_path_factory) -> tuple[TrainState, Path]:
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("unbroken") / "run"
    return live(life, data, run), run


def test_the_ramp_the_data_the_rates_and_the_rows_are_those_of_the_recipe(life, unbroken):
    state, run = unbroken
    lines = log_of(run)
    begun = [(line["name"], line["step"], line["batch_tokens"], line["sequence_length"], line["corpus"])
             for line in lines if line["kind"] == "phase"]  # fmt: skip
    assert begun == [("wide", 4, 1024, 64, 0), ("code", 6, 1024, 64, 1), ("extension", 10, 768, 256, 2)]
    steps = [line for line in lines if line["kind"] == "step"]
    taken = [b["tokens"] - a["tokens"] for a, b in zip([{"tokens": 0}, *steps], steps, strict=False)]
    assert taken == [512] * 4 + [1024] * 6 + [768] * 6 and state.step == len(steps) == life.steps == STEPS
    for line, size in zip(steps, taken, strict=True):
        assert line["lr_muon"] == factor_at(line["tokens"] - size / 2, life) * life.optim.muon_lr
    kinds = {state.loader.corpus.locate(document)[0].kinds[0] for document, _ in state.loader.live_documents()}
    assert "long" in kinds and "web" not in kinds, "what was begun in the first phase has been read to its end"


def test_three_checkpoints_come_out_named_and_open_as_models(life, unbroken):
    _, run = unbroken
    kept = {path.name for path in (run / "checkpoints").iterdir() if path.is_dir() and "step-" not in path.name}
    assert kept == set(life.named_checkpoints) == {"pre-anneal", "base", "context-extended"}
    tokens = {name: state_of(run, name)["tokens"] for name in kept}
    assert tokens == {"pre-anneal": 6144, "base": 8192, "context-extended": 12800}
    opened = open_model(run / "checkpoints" / "base")
    assert opened.name == "run-base"
    with pytest.raises(
        CheckpointError, match="has no checkpoint 'bse'. It has: base, context-extended, pre-anneal, step-"
    ):
        open_model(run / "checkpoints" / "bse")


def state_of(run: Path, name: str) -> dict:
    return json.loads((run / "checkpoints" / name / "state.json").read_text())


@pytest.mark.parametrize(
    "killed_at",
    [4, 10, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16))],
)
def test_killed_anywhere_it_ends_in_the_same_bits(life, data, unbroken, tmp_path, killed_at):
    with pytest.raises(Killed):
        live(life, data, tmp_path / "run", killed_at)
    state = live(life, data, tmp_path / "run")
    assert same(state, unbroken[0])
    assert log_of(tmp_path / "run") == log_of(unbroken[1]), "and in the same log"
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {
        path.name for path in (unbroken[1] / "checkpoints").iterdir()
    }


def test_a_phase_that_changes_nothing_changes_no_bit(data, tmp_path):
    plain = override(recipe("debug"), [*SMALL, "train.tokens=4K"])
    named = replace(plain, phases=(PhaseConfig(name="same", from_tokens=2048),))
    assert same(live(plain, data, tmp_path / "plain"), live(named, data, tmp_path / "named"))
    again = replace(plain, phases=(PhaseConfig(name="same", from_tokens=2048, mix=str(data["web"])),))
    one, other = live(plain, data, tmp_path / "one"), live(again, data, tmp_path / "other")
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


FLIPS = {"tokens": 3000, "sequence_length": 128, "batch_tokens": 1536, "microbatch_rows": 3, "mix": "",
         "decay": "cosine", "warmup_tokens": 0, "high_lr_fraction": 0.2, "final_lr_fraction": 0.0}  # fmt: skip


@pytest.fixture(scope="module")
def brief(life: RunConfig) -> RunConfig:
    """The same life with few steps before its extension."""
    phases = tuple(replace(phase, from_tokens=tokens) for phase, tokens in zip(life.phases, (512, 1536), strict=True))
    shorter = replace(life, phases=phases, extension=replace(life.extension, tokens=1600))
    return override(shorter, ["train.tokens=3K", "optim.decay_tokens=1K", "train.save_every_tokens=0"])


@pytest.fixture(scope="module")
def brief_log(brief, data, tmp_path_factory) -> list[dict]:
    run = tmp_path_factory.mktemp("brief") / "run"
    live(brief, data, run)
    return log_of(run)


def test_the_brief_life_twice_leaves_the_same_log(brief, brief_log, data, tmp_path):
    live(brief, data, tmp_path / "run")
    assert log_of(tmp_path / "run") == brief_log


@pytest.mark.parametrize("knob", list(to_dict(ExtensionConfig())))
def test_every_knob_of_the_extension_is_alive(brief, brief_log, data, tmp_path, knob):
    """Of microbatch_rows the log shows BatchHet."""
    live(replace(brief, extension=replace(brief.extension, **{knob: FLIPS[knob]})), data, tmp_path / "run")
    assert log_of(tmp_path / "run") != brief_log


@pytest.mark.parametrize("knob", ["from_tokens", "mix", "batch_tokens", "name", "keep"])
def test_every_knob_of_a_phase_is_alive(brief, brief_log, data, tmp_path, knob):
    flip = {"from_tokens": 1600, "mix": str(data["long"]), "batch_tokens": 512, "name": "other", "keep": "before-code"}[
        knob
    ]
    flipped = replace(brief, phases=(brief.phases[0], replace(brief.phases[1], **{knob: flip})))
    live(flipped, data, tmp_path / "run")
    if knob == "keep":
        assert state_of(tmp_path / "run", "before-code")["tokens"] == 1536
    else:
        assert log_of(tmp_path / "run") != brief_log


def test_a_missing_or_foreign_folder_of_a_late_phase_is_refused_before_the_first_step(life, data, tmp_path):
    nowhere = replace(life, extension=replace(life.extension, mix=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="nowhere is not a folder.*A later phase of this run reads it .extension.mix"):
        live(nowhere, data, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_folder_of_a_late_phase_that_changed_is_refused_and_a_moved_one_is_not(life, data, tmp_path):
    moved = {name: shutil.copytree(path, tmp_path / name) for name, path in data.items()}
    config = replace(life, extension=replace(life.extension, mix=str(moved["long"])))
    with pytest.raises(Killed):
        live(config, data, tmp_path / "run", killed_at=2)
    shutil.rmtree(moved["long"])
    shutil.copytree(data["code"], moved["long"])
    with pytest.raises(DataError, match=f"begun with other data than {moved['long']}"):
        live(config, data, tmp_path / "run")
    with pytest.raises(Killed):
        live(life, data, tmp_path / "run", killed_at=3)  # the same documents at another place
    with pytest.raises(ConfigError, match=r"phases.0.batch_tokens: 1024 -> 512"):
        live(replace(life, phases=(replace(life.phases[0], batch_tokens=512), life.phases[1])), data, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"extension.tokens: 4000 -> 0"):
        live(replace(life, extension=ExtensionConfig()), data, tmp_path / "run")


def test_a_rollback_across_a_phase_takes_the_tokens_back_and_the_data_on(life, data, tmp_path, monkeypatch):
    """Step 8 is bad, the newest checkpoint is of step 5: back into the phase before, and no row is read twice."""
    config = override(life, ["train.nonfinite_action=rollback", "train.save_every_tokens=5K"])
    original, calls = loop.accumulate, iter(range(1, 1000))

    def accumulate(state, batches, run_config):
        measured = original(state, batches, run_config)
        return measured._replace(loss=math.nan) if next(calls) == 8 else measured

    monkeypatch.setattr(loop, "accumulate", accumulate)
    state = live(config, data, tmp_path / "run")
    assert state.tokens == config.horizon and state.step == STEPS
    names = [(line["name"], line["step"]) for line in log_of(tmp_path / "run") if line["kind"] == "phase"]
    assert names == [("wide", 4), ("code", 6), ("extension", 10)]
