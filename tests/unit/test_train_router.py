"""A real run whose routing is made to collapse: the alarm sounds before the end, and does what it is told to."""

import shutil
from pathlib import Path

import pytest

from trinity.base.errors import TrainingHalted
from trinity.base.run import read_lines
from trinity.config.load import override
from trinity.recipes.table import recipe
from trinity.train import loop, step

BEGUN, HEALTHY = 100, 110  # steps: what all runs here have in common; when the biases begin to be pushed the wrong way
SETTINGS = ["model.num_hidden_layers=3", "train.tokens=40960", "train.batch_tokens=256", "train.microbatch_rows=4",
            "data.sequence_length=64", "train.evaluate_bytes=0", "train.save_every_tokens=25600",
            "optim.warmup_tokens=1K", "optim.decay_tokens=1K", "balance.smebu_lambda=0.02"]  # fmt: skip


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def begun(debug_data, tmp_path_factory) -> Path:
    """A run killed at the step after its save of step BEGUN."""
    folder = tmp_path_factory.mktemp("begun") / "run"

    def kill(progress):
        if progress.step > BEGUN:
            raise Killed

    with pytest.raises(Killed):
        loop.train(override(recipe("debug"), SETTINGS), debug_data, folder, lambda _: None, kill)
    return folder


@pytest.fixture
def wrong_way(monkeypatch):
    """A balancing rule with its sign turned, from step HEALTHY on: full experts are made fuller."""
    right, calls = step.move_biases, []

    def turned(bias, momentum, counts, config):
        calls.append(counts)
        moved, momentum = right(bias, momentum, counts, config)
        return (moved if BEGUN + len(calls) <= HEALTHY else 2 * bias - moved), momentum

    monkeypatch.setattr(step, "move_biases", turned)


@pytest.fixture
def run(begun, debug_data, tmp_path):
    def go_on(*settings):
        said, folder = [], shutil.copytree(begun, tmp_path / "run")
        loop.train(override(recipe("debug"), [*SETTINGS, *settings]), debug_data, folder, said.append, lambda _: None)
        return said, log_of(tmp_path)

    return go_on


def log_of(place: Path) -> list[dict]:
    return list(read_lines(place / "run" / "metrics.jsonl"))


def router_lines(lines: list[dict]) -> list[dict]:
    return [line for line in lines if line["kind"] == "guard" and line["trouble"] == "router"]


def test_a_collapse_is_heard_before_the_end_and_the_run_goes_on(run, wrong_way):
    said, lines = run()
    steps = {line["step"]: line for line in lines if line["kind"] == "step"}
    found = router_lines(lines)
    assert len(steps) == 160 and HEALTHY < found[0]["step"] < 160
    assert {line["action"] for line in found} == {"alarm"}
    assert any("MaxVio of sparse layer" in line["what"] for line in found)
    assert any("-> alarm" in sentence for sentence in said)
    assert steps[160]["averaged_violation"] > 3 * steps[HEALTHY]["averaged_violation"]


def test_a_stop_and_a_roll_back_do_not_let_it_go_on(run, tmp_path, wrong_way):
    with pytest.raises(TrainingHalted, match=r"sparse layer|MaxVio"):
        run("train.router_action=stop")
    assert router_lines(log_of(tmp_path))[-1]["action"] == "stop"


def test_a_roll_back_leaves_the_data_behind_and_gives_up_in_the_end(run, tmp_path, wrong_way):
    with pytest.raises(TrainingHalted, match="without getting further|in a row"):
        run("train.router_action=rollback", "train.max_incidents=2")
    first = router_lines(log_of(tmp_path))[0]
    assert first["action"] == "rollback"
    assert first["not_read_again"]["rows"] == [BEGUN * 4, first["step"] * 4]


def test_the_healthy_run_is_left_alone(run):
    _, lines = run("train.router_action=stop")
    assert not router_lines(lines)
