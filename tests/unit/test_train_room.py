"""Too little memory is said before anything is allocated, with the numbers and what to change."""

import pytest
import torch

from trinity.base.errors import ConfigError
from trinity.cli.main import main
from trinity.config.load import override
from trinity.parallel.mesh import World
from trinity.recipes.table import recipe
from trinity.train import room
from trinity.train.room import _left_by_container, available_bytes, needed_by, refuse_what_cannot_fit
from trinity.train.state import TrainState


def test_a_state_that_cannot_fit_is_refused():
    run = override(recipe("large"), ["parallel.remat=block", "parallel.expert=1", "parallel.precision=float32"])
    with pytest.raises(ConfigError) as caught:
        refuse_what_cannot_fit(run, World.alone(), pytest.fail, available=16 * 2**30)
    said = str(caught.value)
    assert "weights 1.5 TiB" in said and "16.0 GiB are free on cpu" in said
    assert "parallel.shard" in caught.value.remedy and "microbatch_rows" in caught.value.remedy


def test_a_step_that_may_not_fit_is_warned_of():
    run, said = recipe("debug"), []
    needed = needed_by(run, World.alone())
    state = needed.weights + needed.moments + needed.gradients
    refuse_what_cannot_fit(run, World.alone(), said.append, available=state + 1)
    assert len(said) == 1 and "activations" in said[0]


def test_a_run_that_fits_is_let_pass():
    refuse_what_cannot_fit(recipe("debug"), World.alone(), pytest.fail, available=2**33)


def test_nothing_is_allocated_before_a_refusal(monkeypatch, debug_data, tmp_path):
    from trinity.train import loop

    monkeypatch.setattr(room, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(TrainState, "fresh", lambda *_: pytest.fail("the model was built"))
    with pytest.raises(ConfigError, match="1000 B are free"):
        loop.train(recipe("debug"), debug_data, tmp_path / "run", lambda _: None, lambda _: None)


def test_of_a_model_that_is_too_large_its_size_is_said_before_anything_else(monkeypatch, tmp_path, capsys):
    """Its layout and its mixes are not here either, which nobody can mend who has no room for it."""
    monkeypatch.setattr(room, "available_bytes", lambda device: 32 * 2**30)
    run = tmp_path / "run"
    assert main(["train", "large", "--out", str(run)]) == 2
    told = capsys.readouterr().err
    assert "399B parameters need 4.4 TiB" in told and "32.0 GiB are free here" in told and "trinity plan large" in told
    assert not run.exists()
    assert main(["train", "large", "--write-recipe", str(tmp_path / "large.toml")]) == 0


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    whole = available_bytes(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    part = available_bytes(torch.device("cpu"))
    assert whole is not None and part is not None
    assert part == pytest.approx(whole / 4, rel=0.2)  # others on the machine allocate meanwhile


def test_limits_of_a_container_count(tmp_path):
    assert _left_by_container(tmp_path) == []
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert _left_by_container(tmp_path) == [3000]
    (tmp_path / "memory.max").write_text("max\n")
    assert _left_by_container(tmp_path) == []
