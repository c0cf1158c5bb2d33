"""What the guard does about spikes and non-finite values, on the guard alone and in a real run."""

import dataclasses
import errno
import json
import math
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trinity.base.durable import seal
from trinity.base.errors import CheckpointError, ConfigError, DataError, TrainingHalted
from trinity.base.run import MetricsLog, read_lines
from trinity.ckpt.folder import read_checkpoint
from trinity.ckpt.peers import ALONE
from trinity.config.load import override
from trinity.config.train import TrainConfig
from trinity.recipes.table import recipe
from trinity.train import loop, rollback
from trinity.train.board import Board
from trinity.train.guard import Guard
from trinity.train.settings import FREE


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"tokens": 1, "batch_tokens": 1, "microbatch_rows": 1, **changes})


def settled(guard: Guard) -> Guard:
    for step in range(20):
        assert guard.judge(3.0 + 0.01 * (step % 2), 1.0).action == "update"
    return guard


@pytest.mark.parametrize("action", ["skip", "rollback", "stop"])
def test_non_finite_values_and_spikes_lead_to_the_stated_action(action):
    for loss, norm in ((math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan)):
        assert settled(Guard(config(nonfinite_action=action))).judge(loss, norm).action == action
    guard = settled(Guard(config(spike_action=action)))
    verdict = guard.judge(9.0, 1.0)
    assert verdict.action == action and "9.000" in verdict.reason
    assert guard.judge(3.0, 1.0).action == "update", "one spike does not poison what counts as normal"


def test_early_losses_and_a_switched_off_guard_are_left_alone():
    assert Guard(config()).judge(1000.0, 1.0).action == "update"
    assert settled(Guard(config(spike_sigmas=0.0))).judge(1000.0, 1.0).action == "update"


def test_incidents_in_a_row_end_the_run():
    guard = settled(Guard(config(max_incidents=3)))
    assert [guard.judge(math.nan, 1.0).action for _ in range(3)] == ["skip", "skip", "stop"]


def test_rollbacks_to_one_checkpoint_end_the_run_though_good_steps_lie_between():
    guard = settled(Guard(config(max_incidents=3, spike_action="rollback")))
    actions = []
    for _ in range(3):
        actions.append(guard.judge(9.0, 1.0).action)
        settled(guard)
    assert actions == ["rollback", "rollback", "stop"]
    guard.saved(100)
    assert guard.judge(9.0, 1.0).action == "rollback", "a later checkpoint begins a new count"


def test_a_relapse_right_after_a_rollback_is_seen():
    guard = settled(Guard(config(spike_action="rollback")))
    checkpoint = guard.state()
    assert guard.judge(9.0, 1.0).action == "rollback"
    guard.rolled_back(checkpoint)
    assert guard.judge(9.5, 1.0).action == "rollback"


def test_a_lasting_small_rise_becomes_the_norm_and_the_guard_stays_awake():
    guard = settled(Guard(config()))
    assert [guard.judge(3.0 + rise, 1.0).action for rise in (0.14, 0.13, 0.15, 0.14)] == [
        "skip", "skip", "update", "update"]  # fmt: skip
    assert guard.judge(3.4, 1.0).action == "skip", "at the new level spikes are seen at once"


@pytest.mark.parametrize("losses", [(9.0, 9.01, 9.0, 9.0), (3.2, 3.5, 3.8, 4.1)])
def test_a_ruined_model_and_a_climbing_loss_are_no_new_level(losses):
    guard = settled(Guard(config(max_incidents=4)))
    assert [guard.judge(loss, 1.0).action for loss in losses] == ["skip", "skip", "skip", "stop"]


def test_state_survives_a_round_trip():
    guard = settled(Guard(config()))
    other = Guard(config())
    other.load_state(guard.state())
    assert other.judge(9.0, 1.0) == guard.judge(9.0, 1.0)


class Poison:
    """Makes the losses of chosen steps NaN, as a broken batch would."""

    def __init__(self, monkeypatch, calls: set[int]) -> None:
        self.count = 0
        original = loop.accumulate

        def poisoned(state, batches, run_config):
            measured = original(state, batches, run_config)
            self.count += 1
            return measured._replace(loss=math.nan) if self.count in calls else measured

        monkeypatch.setattr(loop, "accumulate", poisoned)


def run_config(*settings: str):
    common = ["model.num_hidden_layers=2", "train.microbatch_rows=8", "train.tokens=12K",
              "train.save_every_tokens=3072", "train.evaluate_bytes=500", "train.sample_tokens=0",
              "train.evaluate_every_tokens=0", "optim.decay_tokens=2K", "optim.warmup_tokens=1K"]  # fmt: skip
    return override(recipe("debug"), [*common, *settings])


def run(debug_data, folder, *settings):
    said = []
    state = loop.train(run_config(*settings), debug_data, folder, said.append, lambda _: None)
    return state, said, list(read_lines(folder / "metrics.jsonl"))


def test_a_poisoned_step_is_skipped_and_logged(debug_data, tmp_path, monkeypatch):
    Poison(monkeypatch, {5})
    state, said, lines = run(debug_data, tmp_path / "run")
    guard = [line for line in lines if line["kind"] == "guard"]
    assert [(line["step"], line["action"]) for line in guard] == [(5, "skip")]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]
    assert state.step == 12 and any("nan" in sentence for sentence in said)
    assert all(torch.isfinite(parameter).all() for parameter in state.model.parameters())


def test_a_rollback_returns_to_the_newest_checkpoint_and_never_rereads_the_data(debug_data, tmp_path, monkeypatch):
    Poison(monkeypatch, {8})
    state, said, lines = run(debug_data, tmp_path / "run", "train.nonfinite_action=rollback")
    assert any("rolled back to step 6" in sentence for sentence in said)
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 13)), "one history, not two"
    assert [(line["step"], line["action"]) for line in lines if line["kind"] == "guard"] == [(8, "rollback")]
    assert state.step == 12 and state.tokens == 12 * 1024
    served = 13 * 1024  # 12 steps and the poisoned one, plus step 7, whose update was lost with the weights
    fresh = loop.Loader(debug_data, run_config().data, 0)
    for _ in range((served + 1024) // (128 * 4)):
        fresh.next_batch(4)
    assert fresh.state() == state.loader.state()


def test_a_divergence_after_a_checkpoint_is_not_rolled_back_without_end(debug_data, tmp_path, monkeypatch):
    # Steps 1-6, then again and again: step 7 is good, step 8 is not.
    Poison(monkeypatch, set(range(8, 100, 2)))
    settings = ("train.nonfinite_action=rollback", "train.max_incidents=3")
    with pytest.raises(TrainingHalted, match="roll-back 3 without getting further"):
        run(debug_data, tmp_path / "run", *settings)
    Poison(monkeypatch, set(range(2, 100, 2)))
    with pytest.raises(TrainingHalted, match="roll-back 3 without getting further"):  # a resume replays the same
        run(debug_data, tmp_path / "run", *settings)


def test_the_pre_anneal_checkpoint_is_of_the_branch_the_run_ends_in(debug_data, tmp_path, monkeypatch):
    Poison(monkeypatch, {12})  # the rate falls from step 11 on; the newest checkpoint is of step 9
    folder = tmp_path / "run"
    state, said, _ = run(debug_data, folder, "train.nonfinite_action=rollback")
    assert sum("pre-anneal" in sentence for sentence in said) == 2
    kept = read_checkpoint(folder / "checkpoints" / "pre-anneal")
    assert kept.state["step"] == 11
    fresh = loop.Loader(debug_data, run_config().data, 0)
    for _ in range((9 + 3 + 2) * 1024 // (128 * 4)):  # 9 steps, 3 of the abandoned branch, and two of them again
        fresh.next_batch(4)
    assert kept.state["loader"] == fresh.state()


class Killed(Exception):
    pass


def test_an_incident_right_after_a_resume_is_as_in_the_unbroken_run(debug_data, tmp_path, monkeypatch):
    original = loop.accumulate
    settings = ["train.nonfinite_action=skip", "train.tokens=9K"]

    def scripted(bad: set[int], killed_at: int = 0) -> None:
        monkeypatch.setattr(loop, "accumulate", original)
        Poison(monkeypatch, bad)
        poisoned, calls = loop.accumulate, iter(range(1, 1000))

        def accumulate(*arguments):
            if next(calls) == killed_at:
                raise Killed
            return poisoned(*arguments)

        monkeypatch.setattr(loop, "accumulate", accumulate)

    scripted({4, 5})
    unbroken, _, lines = run(debug_data, tmp_path / "unbroken", *settings)
    for bad, killed_at in (({4, 5}, 6), ({1, 2}, 3)):  # the second one is a resume, and killed again
        scripted(bad, killed_at)
        with pytest.raises(Killed):
            run(debug_data, tmp_path / "killed", *settings)
    scripted({1, 2})
    state, _, killed_lines = run(debug_data, tmp_path / "killed", *settings)
    assert state.guard.state() == unbroken.guard.state() and state.loader.state() == unbroken.loader.state()
    for name, tensor in unbroken.model.state_dict().items():
        assert torch.equal(tensor, state.model.state_dict()[name]), name
    resumes = [line for line in killed_lines if line["kind"] == "resume"]
    assert [line["step"] for line in resumes] == [3, 3]
    assert all(line["torch"] == torch.__version__ and line["threads"] and line["code"] for line in resumes)
    assert untimed(killed_lines) == untimed(lines)


def untimed(lines: list[dict]) -> list[dict]:
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")}
        for line in lines
        if line["kind"] not in ("resume", "save")
    ]


class KilledOnce:
    """Kills the run before the n-th step's worth of data is trained on, once for each n that is named; what of the data
    is in `bad` has a loss that is not finite, whenever it is read, or only the first time."""

    def __init__(self, monkeypatch, bad: set[int], at: set[int], fleeting: bool = False) -> None:
        self.left: set[int | str] = set(at)
        bad = set(bad)
        original = loop.accumulate

        def accumulate(state, batches, run_config):
            read = state.loader.trace.place.rows // 8
            if read in self.left:
                self.left.discard(read)
                raise Killed
            measured = original(state, batches, run_config)
            if read not in bad:
                return measured
            if fleeting:
                bad.discard(read)
            return measured._replace(loss=math.nan)

        monkeypatch.setattr(loop, "accumulate", accumulate)

    def within(self, monkeypatch, home, name: str) -> None:
        """And once where `home.name` is about to be called."""
        original = getattr(home, name)
        self.left.add(name)

        def once(*arguments):
            if name in self.left:
                self.left.discard(name)
                raise Killed
            return original(*arguments)

        monkeypatch.setattr(home, name, once)


OFTEN_BACK = ["train.nonfinite_action=rollback", "train.save_every_tokens=2048", "train.tokens=8K"]
# Steps 1-5, back from 6 to 4; 5, back from 6 to 2, with 4 abandoned; 3, 4, saved anew; back from 5 to 4; 5-8.
BAD_READS = {6, 8, 11}


@pytest.mark.parametrize(
    ("at", "within"),
    [({7}, []), pytest.param({5, 7, 8, 9, 11, 12, 13}, ["_record", "abandon", "roll_back"], marks=pytest.mark.slow)],
)
def test_a_run_killed_after_and_within_roll_backs_ends_as_the_unbroken_one(
    debug_data, tmp_path, monkeypatch, at, within
):
    with monkeypatch.context() as patch:
        KilledOnce(patch, BAD_READS, at=set())
        unbroken, said, lines = run(debug_data, tmp_path / "unbroken", *OFTEN_BACK)
    assert [sentence for sentence in said if sentence.startswith("rolled")] == [
        f"rolled back to step {step}" for step in (4, 2, 4)
    ]
    # What fails no second time must not be needed again for the roll-back to hold, once that is recorded.
    kills = KilledOnce(monkeypatch, BAD_READS, at, fleeting=not within)
    for name in within:
        kills.within(monkeypatch, MetricsLog if name == "roll_back" else rollback, name)
    folder, resumed = tmp_path / "killed", 0
    while kills.left:
        with pytest.raises(Killed):
            run(debug_data, folder, *OFTEN_BACK)
        resumed += 1
    state, _, killed_lines = run(debug_data, folder, *OFTEN_BACK)
    assert resumed == len(at) + len(within)
    assert state.loader.state() == unbroken.loader.state() and state.guard.state() == unbroken.guard.state()
    for name, tensor in unbroken.model.state_dict().items():
        assert torch.equal(tensor, state.model.state_dict()[name]), name
    assert untimed(killed_lines) == untimed(lines)
    assert [line["step"] for line in lines if line["kind"] == "guard"] == [6, 6, 5]


def test_roll_backs_are_counted_over_kills_and_over_saves_that_are_no_progress(debug_data, tmp_path, monkeypatch):
    settings = [*OFTEN_BACK, "train.max_incidents=3"]
    kills = KilledOnce(monkeypatch, BAD_READS, at={7, 9, 11})
    while kills.left:
        with pytest.raises(Killed):
            run(debug_data, tmp_path / "run", *settings)
    with pytest.raises(TrainingHalted, match="roll-back 3 without getting further"):
        run(debug_data, tmp_path / "run", *settings)


def test_a_record_of_another_checkpoint_of_that_name_is_not_followed(debug_data, tmp_path, monkeypatch):
    KilledOnce(monkeypatch, BAD_READS, at={7})
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        run(debug_data, folder, *OFTEN_BACK)
    step_4 = folder / "checkpoints" / "step-00000004"
    assert rollback.returned_to(folder, step_4, ALONE)
    (folder / rollback.ROLLED_BACK).write_text("{")
    with pytest.raises(CheckpointError, match="reads again what a roll-back left behind"):
        rollback.returned_to(folder, step_4, ALONE)
    record = {step_4.name: {"manifest": "of another", "loader": {}, "guard": {}}}
    (folder / rollback.ROLLED_BACK).write_text(json.dumps(record))
    assert rollback.returned_to(folder, step_4, ALONE) is None


def test_another_number_of_threads_or_torch_is_said_on_resume(debug_data, tmp_path, monkeypatch):
    Poison(monkeypatch, {8})
    with pytest.raises(TrainingHalted):
        run(debug_data, tmp_path / "run", "train.nonfinite_action=stop")
    path = tmp_path / "run" / "config.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({**known, "begun_with": {"torch": "1.0", "threads": 77}}))
    _, said, _ = run(debug_data, tmp_path / "run", "train.nonfinite_action=skip")
    (sentence,) = [sentence for sentence in said if "bits may differ" in sentence]
    assert "torch 1.0" in sentence and "threads 77" in sentence


def test_a_stop_says_why_and_leaves_the_last_checkpoint_whole(debug_data, tmp_path, monkeypatch):
    Poison(monkeypatch, {8})
    with pytest.raises(TrainingHalted, match=r"step 8: loss nan"):
        run(debug_data, tmp_path / "run", "train.nonfinite_action=stop")
    said = []
    assert loop.newest_good(tmp_path / "run", said.append).name == "step-00000006" and not said


def test_a_rollback_without_a_checkpoint_stops(debug_data, tmp_path, monkeypatch):
    Poison(monkeypatch, {2})
    with pytest.raises(TrainingHalted, match="no checkpoint to roll back to"):
        run(debug_data, tmp_path / "run", "train.nonfinite_action=rollback")


def test_a_stopped_run_goes_on_with_another_guard(debug_data, tmp_path, monkeypatch):
    Poison(monkeypatch, {8})
    folder = tmp_path / "run"
    with pytest.raises(TrainingHalted, match="a resume may set"):
        run(debug_data, folder, "train.nonfinite_action=stop")
    Poison(monkeypatch, {2})
    more = ["train.keep_checkpoints=1", "train.spike_sigmas=0"]
    state, said, lines = run(debug_data, folder, "train.nonfinite_action=skip", *more)
    assert state.step == 12
    (changed,) = [line for line in lines if line["kind"] == "settings"]
    assert changed["step"] == 6 and "train.nonfinite_action: stop -> skip" in changed["changes"]
    assert any("train.spike_sigmas: 6.0 -> 0.0" in sentence for sentence in said)
    assert json.loads((folder / "config.json").read_text())["config"]["train"]["spike_sigmas"] == 0.0


def test_settings_of_the_arithmetic_stay_locked(debug_data, tmp_path):
    run(debug_data, tmp_path / "run", "train.tokens=4K")
    with pytest.raises(ConfigError, match=r"train.seed: 0 -> 1"):
        run(debug_data, tmp_path / "run", "train.tokens=4K", "train.seed=1", "train.spike_sigmas=0")


def test_every_setting_free_to_change_is_one():
    assert set(FREE) < {field.name for field in dataclasses.fields(TrainConfig)}


def test_other_data_is_refused_before_the_first_save(debug_data, tmp_path, monkeypatch):
    Poison(monkeypatch, {1})
    with pytest.raises(TrainingHalted):
        run(debug_data, tmp_path / "run", "train.nonfinite_action=stop")
    other = tmp_path / "other"
    shutil.copytree(debug_data, other)
    tokens = other / "train" / "tokens-00000.bin"
    tokens.write_bytes(bytes([tokens.read_bytes()[0] ^ 1]) + tokens.read_bytes()[1:])
    seal(other)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(DataError, match="other data"):
        run(other, tmp_path / "run", "train.nonfinite_action=stop")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


class FullDisk:
    """A file whose every write the disk refuses, at closing too."""

    def write(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    flush = close = write


def test_a_disk_full_for_tensorboard_is_said_once_and_survived(debug_data, tmp_path, monkeypatch):
    original, calls = Board.scalar, []

    def scalar(board, *values):
        calls.append(values)
        if len(calls) == 9:
            board._file.close()
            board._file = FullDisk()
        original(board, *values)

    monkeypatch.setattr(Board, "scalar", scalar)
    state, said, lines = run(debug_data, tmp_path / "run")
    assert state.step == 12 and sum(line["kind"] == "step" for line in lines) == 12
    assert [sentence for sentence in said if "TensorBoard" in sentence] == [
        "TensorBoard events cannot be written (No space left on device); the run goes on without them."
    ]


def test_tensorboard_reads_the_events(tmp_path):
    board = Board(tmp_path, 0, pytest.fail)
    for step in (1, 2, 3):
        board.scalar("train/loss", 3.0 - step, step)
    board.histogram("expert_load/layer_0", torch.tensor([0.2, 0.8]), 3)
    board.text("sample", "def ", 3)
    board.purge(1)
    board.scalar("train/loss", 9.0, 2)
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.0), (2, 9.0)]
