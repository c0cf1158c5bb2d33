"""kill -9 at any moment, the same command again: bit-identical weights. Damaged checkpoints are named, not used."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from started import Ended, starting_trinity, trinity
from trinity.base.errors import ConfigError
from trinity.base.run import read_lines
from trinity.cli.main import main
from trinity.config.load import override
from trinity.data.loader import Loader
from trinity.recipes.table import recipe
from trinity.train import loop
from trinity.train.settings import changes

SETTINGS = ["train.tokens=24K", "train.save_every_tokens=4096", "train.evaluate_every_tokens=12288",
            "optim.decay_tokens=8K", "train.evaluate_bytes=2000", "train.sample_tokens=4", "data.sequence_length=64",
            "train.batch_tokens=1024", "train.microbatch_rows=8"]  # fmt: skip
LAST = "step-00000024"


def command(data: Path, run: Path, *more: str) -> list[str]:
    settings = [word for setting in (*SETTINGS, *more) for word in ("--set", setting)]
    return ["train", "debug", "--data", str(data), "--out", str(run), *settings]


def finish(data: Path, run: Path, *more: str) -> Ended:
    return trinity(*command(data, run, *more))


def weights_of(run: Path) -> dict[str, str]:
    """The sha256 of every file of the last checkpoint's model and optimiser."""
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    files = json.loads((last / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name != "state.json"}


def start_and_kill(data: Path, run: Path, moment) -> bool:
    """Start the command and SIGKILL it once `moment(run)` holds; False when it ended before."""
    with starting_trinity(*command(data, run)) as started:
        return started.wait_for(lambda: moment(run))


def metric_lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def after_lines(count: int):
    return lambda run: metric_lines(run) >= count


def while_saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step-*.writing-*/model/*"))


@pytest.fixture(scope="module")
def unbroken(debug_data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    done = finish(debug_data, run)
    assert done.returncode == 0, done.stderr
    return run


def test_killed_runs_end_in_the_weights_of_the_unbroken_one(debug_data, unbroken, tmp_path):
    run = tmp_path / "run"
    for moment in (after_lines(2), while_saving, after_lines(17)):
        assert start_and_kill(debug_data, run, moment), "it ended before it was killed"
    done = finish(debug_data, run)
    assert done.returncode == 0, done.stderr
    assert weights_of(run) == weights_of(unbroken)
    figures = [
        [
            {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
            for line in read_lines(r / "metrics.jsonl")
            if line["kind"] not in ("resume", "save")
        ]
        for r in (run, unbroken)
    ]
    assert figures[0] == figures[1], "the log of the killed run is that of the unbroken one"
    assert not list((run / "checkpoints").glob(".*")), "nothing half written is left behind"
    again = finish(debug_data, run)
    assert again.returncode == 0 and "nothing to do" in again.stderr


@pytest.mark.slow
def test_twenty_kills_at_random_moments(debug_data, unbroken, tmp_path):
    chance = random.Random(0)
    kills = 0
    for number in range(20):
        run = tmp_path / f"run{number % 4}"
        delay = chance.uniform(0.1, 1.2)
        started = time.monotonic()
        kills += start_and_kill(debug_data, run, lambda _: time.monotonic() - started > delay)  # noqa: B023
    assert kills >= 15, "most of them must come before the end"
    for number in range(4):
        done = finish(debug_data, tmp_path / f"run{number}")
        assert done.returncode == 0, done.stderr
        assert weights_of(tmp_path / f"run{number}") == weights_of(unbroken)


def damaged_copy(unbroken: Path, tmp_path: Path, damage) -> Path:
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    damage(run / "checkpoints" / LAST)
    return run


def truncate(folder: Path) -> None:
    os.truncate(next((folder / "model").iterdir()), 1000)


def flip_a_byte(folder: Path) -> None:
    path = next((folder / "optimizer").iterdir())
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def lose_a_file(folder: Path) -> None:
    (folder / "state.json").unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [(truncate, "model/shard-00001-model-00001-of-00001.safetensors has 1000 bytes"),
     (flip_a_byte, "optimizer/shard-00001-model-00001-of-00001.safetensors was altered"),
     (lose_a_file, "state.json is missing")],
)  # fmt: skip
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(debug_data, unbroken, tmp_path, damage, named):
    run = damaged_copy(unbroken, tmp_path, damage)
    done = finish(debug_data, run)
    assert done.returncode == 0, done.stderr
    assert named in " ".join(done.stderr.split()) and LAST in done.stderr.replace("\n", "")
    assert weights_of(run) == weights_of(unbroken)


def test_other_settings_on_the_same_folder_are_refused(debug_data, unbroken):
    done = finish(debug_data, unbroken, "optim.muon_lr=0.5")
    assert done.returncode == 2
    assert "optim.muon_lr: 0.02 -> 0.5" in done.stderr and "Traceback" not in done.stderr


def test_settings_beyond_the_first_five_that_differ_are_counted(debug_data, unbroken):
    others = [f"optim.{name}=0.5" for name in ("muon_lr", "adamw_lr", "muon_momentum")]
    others += [f"model.{name}=3" for name in ("num_experts_per_tok", "num_hidden_layers", "num_experts")]
    config = override(recipe("debug"), [*SETTINGS, *others])
    with pytest.raises(ConfigError, match=r"other settings: (.*; ){5}and 1 more\."):
        changes(unbroken, config, Loader(debug_data, config.data, config.train.seed))


def test_a_run_in_use_is_refused(debug_data, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    monkeypatch.setattr(loop, "_DYING_SECONDS", 0.3)  # that the one before may take to end
    with starting_trinity(*command(debug_data, run)) as first:
        assert first.wait_for(lambda: metric_lines(run) > 0), "it never began"
        first.send(signal.SIGSTOP)  # it holds the run, and cannot end before the second one asks
        assert main(command(debug_data, run)) == 2 and "another process" in capsys.readouterr().err


def test_data_that_changed_is_refused(debug_data, unbroken, tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(unbroken, run)
    shutil.copytree(debug_data, data)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["files"]["extra"] = {"sha256": "0" * 64, "bytes": 0}
    (data / "manifest.json").write_text(json.dumps(manifest))
    done = finish(data, run)
    assert done.returncode == 1 and "data" in done.stderr and "Traceback" not in done.stderr
