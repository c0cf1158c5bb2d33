"""Data that is no longer what its manifest promises is refused before a step is made of it, by every start of a run."""

import json
import os
import shutil
from pathlib import Path

import pytest

from trinity.base.durable import MANIFEST
from trinity.data import proof
from trinity.data.proof import altered_data, read_seen


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from trinity.base.durable import seal

    place = tmp_path / "tokens"
    (place / "train").mkdir(parents=True)
    for name, content in (("train/a.bin", b"a" * 100), ("train/b.bin", b"b" * 60), ("tokens.json", b"{}")):
        (place / name).write_bytes(content)
    seal(place)
    return place


def overwrite_in_secret(path: Path) -> None:
    """Other bytes of the same number, with the time of change that the file had."""
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_every_file_is_hashed_once_and_again_when_touched(folder, monkeypatch):
    hashed = []
    real = proof.altered_files

    def noting(place, share, known, heard):
        return real(place, share, known, lambda name: (hashed.append(name), heard(name)))

    monkeypatch.setattr(proof, "altered_files", noting)
    differences, seen = altered_data([folder], {})
    assert not differences and sorted(hashed) == ["tokens.json", "train/a.bin", "train/b.bin"]
    hashed.clear()
    assert altered_data([folder], seen) == ([], {}) and not hashed
    (folder / "train" / "b.bin").touch()
    assert list(altered_data([folder], seen)[1]) == [str(folder / "train" / "b.bin")]


def test_the_same_size_and_time_hide_nothing(folder):
    seen = altered_data([folder], {})[1]
    overwrite_in_secret(folder / "train" / "a.bin")
    differences, _ = altered_data([folder], seen)
    assert differences == [f"{folder}/train/a.bin was altered (sha256 differs)"]


def test_processes_share_the_work(folder):
    parts = [altered_data([folder], {}, (rank, 2))[1] for rank in range(2)]
    assert sorted([*parts[0], *parts[1]]) == sorted(altered_data([folder], {})[1])
    assert not set(parts[0]) & set(parts[1])


@pytest.mark.parametrize("content", ["", "[1, 2]", "{", None])
def test_notes_that_cannot_be_read_mean_that_all_is_hashed(content, tmp_path):
    path = tmp_path / "data_seen.json"
    if content is not None:
        path.write_text(content)
    assert read_seen(path) == {}


def test_a_run_refuses_altered_data_at_its_start_and_when_it_goes_on(tmp_path, capsys):
    from trinity.cli.main import main

    run = tmp_path / "run"
    brief = ("train.tokens=4K", "optim.warmup_tokens=1K", "optim.decay_tokens=1K", "train.evaluate_bytes=0")
    command = ["train", "debug", "--out", str(run), *(word for setting in brief for word in ("--set", setting))]
    assert main(command) == 0
    seen = json.loads((run / "data_seen.json").read_text())
    shard = next(Path(name) for name in seen if name.endswith(".bin") and Path(name).stat().st_size)
    assert MANIFEST not in {Path(name).name for name in seen}
    capsys.readouterr()
    overwrite_in_secret(shard)
    assert main(command) == 1
    told = capsys.readouterr().err
    assert f"{shard} was altered" in told and "Traceback" not in told


def test_a_damaged_tokenizer_is_named_as_such(debug_data, tmp_path, capsys):
    """By a run that goes on too, which would else take it for another one: its name changes with any byte of it."""
    from trinity.cli.main import main
    from trinity.data.loader import Loader
    from trinity.parallel.mesh import World
    from trinity.recipes.table import recipe
    from trinity.train import settings

    data, run = Path(shutil.copytree(debug_data, tmp_path / "tokens")), tmp_path / "run"
    config = recipe("debug")
    run.mkdir()
    settings.begin(run, config, Loader(data, config.data, config.train.seed), data, World.alone())
    tokenizer = data / "tokenizer.json"
    whole = tokenizer.read_bytes()
    for damaged in (whole.replace(b'"th', b'"tx', 1), whole[:-9] + b"x" * 9):
        assert len(damaged) == len(whole) and damaged != whole
        tokenizer.write_bytes(damaged)
        assert main(["train", "debug", "--out", str(run)]) == 1
        told = capsys.readouterr().err
        assert f"{tokenizer} was altered" in told and "another tokenizer" not in told
    tokenizer.write_bytes((run / "tokenizer.json").read_bytes())
    assert Loader(data, config.data, 1).tokenizer.fingerprint, "the remedy holds"
