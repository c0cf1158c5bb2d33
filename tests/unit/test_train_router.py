"""A real run whose routing is made to collapse: the alarm sounds before the end, and does what it is told to."""

import pytest

from trinity.base.errors import TrainingHalted
from trinity.base.run import read_lines
from trinity.config.load import override
from trinity.recipes.table import recipe
from trinity.train import loop, step

HEALTHY = 110  # steps before the biases are pushed the wrong way
SETTINGS = ["train.tokens=40960", "train.batch_tokens=256", "train.microbatch_rows=4", "data.sequence_length=64",
            "train.evaluate_bytes=0", "train.save_every_tokens=25600", "optim.warmup_tokens=1K",
            "optim.decay_tokens=1K", "balance.smebu_lambda=0.02"]  # fmt: skip


@pytest.fixture
def wrong_way(monkeypatch):
    """A balancing rule with its sign turned, from step HEALTHY on: full experts are made fuller."""
    right, calls = step.move_biases, []

    def turned(bias, momentum, counts, config):
        calls.append(counts)
        moved, momentum = right(bias, momentum, counts, config)
        return (moved if len(calls) <= HEALTHY else 2 * bias - moved), momentum

    monkeypatch.setattr(step, "move_biases", turned)


def run(debug_data, folder, *settings):
    said = []
    loop.train(override(recipe("debug"), [*SETTINGS, *settings]), debug_data, folder, said.append, lambda _: None)
    return said, list(read_lines(folder / "metrics.jsonl"))


def router_lines(lines: list[dict]) -> list[dict]:
    return [line for line in lines if line["kind"] == "guard" and line["trouble"] == "router"]


def test_a_collapse_is_heard_before_the_end_and_the_run_goes_on(debug_data, tmp_path, wrong_way):
    said, lines = run(debug_data, tmp_path / "run")
    steps = {line["step"]: line for line in lines if line["kind"] == "step"}
    found = router_lines(lines)
    assert len(steps) == 160 and HEALTHY < found[0]["step"] < 160
    assert {line["action"] for line in found} == {"alarm"}
    assert any("MaxVio of sparse layer" in line["what"] for line in found)
    assert any("-> alarm" in sentence for sentence in said)
    assert steps[160]["averaged_violation"] > 3 * steps[HEALTHY]["averaged_violation"]


def test_a_stop_and_a_roll_back_do_not_let_it_go_on(debug_data, tmp_path, wrong_way):
    with pytest.raises(TrainingHalted, match=r"sparse layer|MaxVio"):
        run(debug_data, tmp_path / "stopped", "train.router_action=stop")
    assert router_lines(list(read_lines(tmp_path / "stopped" / "metrics.jsonl")))[-1]["action"] == "stop"


def test_a_roll_back_leaves_the_data_behind_and_gives_up_in_the_end(debug_data, tmp_path, wrong_way):
    with pytest.raises(TrainingHalted, match="without getting further|in a row"):
        run(debug_data, tmp_path / "back", "train.router_action=rollback", "train.max_incidents=2")
    first = router_lines(list(read_lines(tmp_path / "back" / "metrics.jsonl")))[0]
    assert first["action"] == "rollback"
    assert first["not_read_again"]["rows"] == [100 * 4, first["step"] * 4]


def test_the_healthy_run_is_left_alone(debug_data, tmp_path):
    _, lines = run(debug_data, tmp_path / "run", "train.router_action=stop")
    assert not router_lines(lines)
