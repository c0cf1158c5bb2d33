"""What a run does when a save fails, and when what it would save is not finite."""

import errno
import math
import os
import resource
import threading

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from trinity.base.errors import CheckpointError, StorageError, TrainingHalted
from trinity.base.run import WAITING, read_lines
from trinity.ckpt.folder import newest_good, read_checkpoint, save_checkpoint, shapes_of
from trinity.ckpt.shards import Piece
from trinity.config.load import override, to_dict
from trinity.recipes.table import recipe
from trinity.train import loop
from trinity.train.state import TrainState

UNREAD = "model.vocab_size=520"  # the tokenizer has 512 entries: the last rows of the embedding are never read
EVERY_THIRD = ("train.save_every_tokens=3072",)


def run(debug_data, folder, *settings, told: list[str] | None = None):
    """Twelve steps, a save after every third; the rate falls from step 11 on."""
    common = ["model.num_hidden_layers=2", "train.microbatch_rows=8", "train.tokens=12K", *EVERY_THIRD,
              "train.evaluate_bytes=500", "train.sample_tokens=0", "train.evaluate_every_tokens=0",
              "optim.decay_tokens=2K", "optim.warmup_tokens=1K"]  # fmt: skip
    said = [] if told is None else told
    config = override(recipe("debug"), [*common, *settings])
    state = loop.train(config, debug_data, folder, said.append, lambda _: None)
    return state, said, list(read_lines(folder / "metrics.jsonl"))


def incidents(lines, trouble: str) -> list[tuple[int, str]]:
    return [(line["step"], line["action"]) for line in lines if line["kind"] == "guard" and line["trouble"] == trouble]


def names(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def finite(folder) -> bool:
    found = read_checkpoint(folder)
    return all(tensor.isfinite().all() for part in (found.model, found.optimizer) for tensor in part.values())


class Disk:
    """Refuses to open the files of chosen saves, counted from 1; a save opens two."""

    def __init__(self, monkeypatch, refused: set[int], number: int = errno.ENOSPC) -> None:
        self.names: list[str] = []
        original = FileSystem.create_stream

        def create(system, path, mode):
            name = str(path).split("/checkpoints/.")[1].split(".writing")[0]
            if not self.names or self.names[-1] != name:
                self.names.append(name)
            if len(self.names) in refused:
                raise OSError(number, os.strerror(number), str(path))
            return original(system, path, mode)

        monkeypatch.setattr(FileSystem, "create_stream", create)


@pytest.mark.parametrize(
    ("number", "problem"),
    [
        (errno.EIO, "disk failed"),
        pytest.param(errno.ENOSPC, "disk is full", marks=pytest.mark.slow),
        pytest.param(errno.ESTALE, "Stale file", marks=pytest.mark.slow),
    ],
)
def test_a_save_that_fails_is_told_and_the_next_one_stands(debug_data, tmp_path, monkeypatch, number, problem):
    disk, folder = Disk(monkeypatch, {2}, number), tmp_path / "run"
    state, said, lines = run(debug_data, folder)
    assert disk.names[:3] == ["step-00000003", "step-00000006", "step-00000009"]
    assert state.step == 12 and names(folder) == [
        "base", "latest", "pre-anneal", "step-00000009", "step-00000012"]  # fmt: skip
    ((step, action),) = incidents(lines, "storage")
    assert step == 6 and action.startswith("save again when next due (failure 1 in a row")
    (sentence,) = [sentence for sentence in said if "was not saved" in sentence]
    assert problem in sentence and "step-00000006" in sentence
    assert [line["checkpoint"] for line in lines if line["kind"] == "save"][:2] == ["step-00000003", "step-00000009"]


def test_a_disk_that_stays_full_ends_the_run_at_the_third_save(debug_data, tmp_path, monkeypatch):
    folder, every = tmp_path / "run", "train.save_every_tokens=2048"
    with monkeypatch.context() as patch:
        disk = Disk(patch, set(range(2, 99)))
        with pytest.raises(StorageError, match="disk is full: writing .*step-00000008") as caught:
            run(debug_data, folder, every)
    assert disk.names == [f"step-{step:08d}" for step in (2, 4, 6, 8)] and caught.value.remedy
    assert names(folder) == ["latest", "step-00000002"], "the first checkpoint is whole, nothing half written is left"
    assert len(incidents(list(read_lines(folder / "metrics.jsonl")), "storage")) == 2
    state, said, _ = run(debug_data, folder, every)
    assert state.step == 12 and any("resuming" in sentence and "step 2" in sentence for sentence in said)


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_a_disk_that_is_full_between_saves_costs_no_line(debug_data, tmp_path, monkeypatch, action):
    """From step 5 to 7 the system lets no file grow beyond the size of the log; to be rolled back, step 7 is NaN."""
    folder, original, calls = tmp_path / "run", loop.accumulate, []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*arguments):
        calls.append(len(calls) + 1)
        if calls[-1] == 5:
            saves = [thread for thread in threading.enumerate() if thread.name.startswith("save ")]
            for save in saves:
                save.join()
            size = (folder / "metrics.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, before[1]))
        if calls[-1] == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        measured = original(*arguments)
        return measured._replace(loss=math.nan) if action == "rollback" and calls[-1] == 7 else measured

    monkeypatch.setattr(loop, "accumulate", limited)
    told: list[str] = []
    try:
        state, _, lines = run(debug_data, folder, "train.save_every_tokens=4096", f"train.nonfinite_action={action}",
                              told=told)  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert state.step == 12 and [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 13))
    unrecorded = [(4, "go on; a kill before the next save undoes it")] if action == "rollback" else []
    assert incidents(lines, "storage") == [
        (5, f"keep the newest {WAITING:,} lines in memory until the disk takes them"), *unrecorded
    ]  # fmt: skip
    assert sum("metrics.jsonl" in sentence for sentence in told) == 1
    assert (folder / "metrics.jsonl").read_bytes().count(b"\n") == len(lines)
    assert incidents(lines, "non-finite") == ([(7, "rollback")] if action == "rollback" else [])


def test_successes_between_failures_begin_a_new_count(debug_data, tmp_path, monkeypatch):
    Disk(monkeypatch, {2, 3, 5, 6})
    state, _, lines = run(debug_data, tmp_path / "run", "train.save_every_tokens=1024", "optim.decay_tokens=1K")
    assert state.step == 12
    assert [step for step, _ in incidents(lines, "storage")] == [2, 3, 5, 6]


@pytest.mark.parametrize(
    ("save", "name"), [(4, "pre-anneal"), pytest.param(5, "base", marks=pytest.mark.slow), (6, "step-00000012")]
)
def test_a_named_or_last_save_that_fails_ends_the_run_at_once(debug_data, tmp_path, monkeypatch, save, name):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        disk = Disk(patch, {save})
        told: list[str] = []
        with pytest.raises(StorageError, match=f"disk is full: writing .*{name}"):
            run(debug_data, folder, told=told)
        assert disk.names[-1] == name
        assert not [sentence for sentence in told if f"{name} checkpoint kept" in sentence], "it is not"
    state, said, _ = run(debug_data, folder)
    assert state.step == 12 and {"base", "pre-anneal", "step-00000012"} <= set(names(folder))
    assert sum("base checkpoint kept" in sentence for sentence in said) == 1


class Spoiler:
    """Writes a value into a tensor right after the update of chosen steps; each time once, or always."""

    def __init__(self, monkeypatch, steps: dict[int, str], value: float = math.nan, always: bool = False) -> None:
        original, left = loop.apply_update, dict(steps)

        def spoiling(state: TrainState, *arguments):
            original(state, *arguments)
            name = left.get(state.step) if always else left.pop(state.step, None)
            if name:
                tensors = {**state.model.state_dict(), **state._optimizer_tensors()}
                tensors[name].view(-1)[-1] = value

        monkeypatch.setattr(loop, "apply_update", spoiling)


def name_of(part: str) -> str:
    """The full name of a tensor of the debug model."""
    (found,) = [name for name in shapes_of(to_dict(recipe("debug").model)) if name.endswith(part)]
    return found


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("lm_head.weight", math.nan),
        ("embed_tokens.weight", math.inf),
        pytest.param("adamw exp_avg_sq", -math.inf, marks=pytest.mark.slow),
    ],
)
def test_what_is_not_finite_is_not_saved_and_rolled_back(debug_data, tmp_path, monkeypatch, tensor, value):
    """In the very update of a step that saves, and of the embedding in a row that no loss ever shows."""
    name = f"adamw/{name_of('lm_head.weight')}/exp_avg_sq" if " " in tensor else name_of(tensor)
    Spoiler(monkeypatch, {6: name}, value)
    folder = tmp_path / "run"
    state, said, lines = run(debug_data, folder, "train.keep_checkpoints=9", UNREAD)
    assert incidents(lines, "non-finite") == [(6, "rollback")]
    assert any(f"{name} not finite, not saved" in sentence for sentence in said)
    assert any("rolled back to step 3" in sentence for sentence in said) and state.step == 12
    assert len(names(folder)) == 7
    for checkpoint in names(folder):
        assert checkpoint == "latest" or finite(folder / "checkpoints" / checkpoint), checkpoint


def test_a_row_that_is_never_read_comes_into_neither_the_last_nor_a_named_checkpoint(debug_data, tmp_path, monkeypatch):
    """Spoilt at step 10, between saves: the pre-anneal checkpoint of step 11 is refused; then at the very end."""
    folder, name = tmp_path / "run", name_of("embed_tokens.weight")
    Spoiler(monkeypatch, {10: name, 12: name})
    state, _, lines = run(debug_data, folder, UNREAD)
    assert incidents(lines, "non-finite") == [(11, "rollback"), (12, "rollback")]
    assert state.step == 12
    for checkpoint in ("pre-anneal", "base", "step-00000012"):
        assert finite(folder / "checkpoints" / checkpoint), checkpoint


def test_a_run_that_cannot_go_on_ends_with_an_error_and_keeps_what_is_clean(debug_data, tmp_path, monkeypatch):
    folder, name = tmp_path / "run", name_of("lm_head.weight")
    Spoiler(monkeypatch, {12: name}, always=True)
    with pytest.raises(TrainingHalted, match="not finite, not saved; .*in a row|without getting further") as caught:
        run(debug_data, folder, "train.max_incidents=3")
    assert caught.value.exit_code == 1
    assert "base" not in names(folder) and "step-00000012" not in names(folder)
    newest = newest_good(folder, pytest.fail)
    assert newest is not None and finite(newest)


def test_what_is_not_finite_before_the_first_save_stops_the_run(debug_data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    Spoiler(monkeypatch, {2: name_of("embed_tokens.weight")})
    with pytest.raises(TrainingHalted, match="not finite, not saved. There is no checkpoint to roll back to"):
        run(debug_data, folder, UNREAD)
    assert not (folder / "checkpoints").exists() or not names(folder)
    Spoiler(monkeypatch, {5: name_of("embed_tokens.weight")})
    with pytest.raises(TrainingHalted, match="step 6: .*not finite, not saved"):
        run(debug_data, tmp_path / "other", UNREAD, "train.nonfinite_action=stop")
    assert names(tmp_path / "other") == ["latest", "step-00000003"]


def test_the_second_roll_back_to_one_checkpoint_takes_the_one_before_it(debug_data, tmp_path, monkeypatch):
    """Step 6 was sealed unlooked at: what goes on from it fails, what goes on from 3 does not."""
    folder = tmp_path / "run"
    healthy, spoilt = TrainState.not_finite, []
    monkeypatch.setattr(
        TrainState, "not_finite", lambda state: [] if state.step == 6 and not spoilt else healthy(state)
    )
    Spoiler(monkeypatch, {6: name_of("lm_head.weight")})
    original = loop.RollBack.__call__

    def counted(*arguments):
        spoilt.append(names(folder))
        original(*arguments)

    monkeypatch.setattr(loop.RollBack, "__call__", counted)
    state, said, lines = run(debug_data, folder, "train.nonfinite_action=rollback")
    assert [sentence for sentence in said if sentence.startswith("rolled back")] == [
        "rolled back to step 6", "rolled back to step 3"]  # fmt: skip
    assert incidents(lines, "non-finite") == [(7, "rollback"), (7, "rollback")]
    assert any("a second time after step-00000006, so step-00000003 is taken instead" in sentence for sentence in said)
    assert state.step == 12 and names(folder) == ["base", "latest", "pre-anneal", "step-00000009", "step-00000012"]
    assert all(finite(folder / "checkpoints" / name) for name in names(folder) if name != "latest")


def test_a_kill_after_such_a_roll_back_does_not_lead_back_to_the_suspect(debug_data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    Spoiler(monkeypatch, {7: name_of("lm_head.weight")}, always=True)
    restored, original = [], TrainState.restore

    def restore(state, checkpoint, *arguments, **named):
        original(state, checkpoint, *arguments, **named)
        restored.append(checkpoint.name)

    monkeypatch.setattr(TrainState, "restore", restore)

    class Killed(BaseException):
        pass

    original_accumulate = loop.accumulate

    def killed(state, *arguments):
        if len(restored) == 2:
            raise Killed
        return original_accumulate(state, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "accumulate", killed)
        with pytest.raises(Killed):
            run(debug_data, folder, "train.nonfinite_action=rollback")
    assert restored == ["step-00000006", "step-00000003"]
    assert names(folder) == ["abandoned-step-00000006", "latest", "step-00000003"]
    assert (folder / "checkpoints" / "latest").read_text() == "step-00000003\n"
    with pytest.raises(TrainingHalted):
        run(debug_data, folder, "train.nonfinite_action=rollback", "train.max_incidents=1")
    assert restored[2] == "step-00000003"


def dropped(moments):
    return {name: piece for name, piece in moments.items() if name != "bias_momentum"}


def renamed(moments):
    return {name.replace("lm_head", "tail"): piece for name, piece in moments.items()}


def of_another_shape(moments):
    piece = Piece(torch.zeros(3), torch.Size([3]), torch.Size([0]))
    return {name: piece if name.endswith("lm_head.weight/exp_avg") else held for name, held in moments.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [(dropped, "holds nothing where bias_momentum"), (renamed, "which is no state of this optimiser"),
     (of_another_shape, r"lm_head.weight/exp_avg of shape \[3\], which is no state")],
)  # fmt: skip
def test_a_strange_optimiser_part_is_refused_before_anything_changes(debug_data, tmp_path, change, said):
    config = override(recipe("debug"), ["train.batch_tokens=1024", "train.microbatch_rows=2"])

    def trained(seed: int, steps: int) -> TrainState:
        torch.manual_seed(seed)
        state = TrainState.fresh(config, loop.Loader(debug_data, config.data, seed))
        for _ in range(steps):
            batches = loop.next_microbatches(state.loader, config.phase_at(0), state.world)
            measured = loop.accumulate(state, batches, config)
            state.step, state.tokens = state.step + 1, state.tokens + 1024
            loop.apply_update(state, measured, config, (0.01, 0.01))
        return state

    def tensors(state: TrainState) -> dict[str, torch.Tensor]:
        return {
            name: tensor.detach().clone()
            for name, tensor in {**state.model.state_dict(), **state._optimizer_tensors()}.items()
        }

    whole = trained(0, 2).staged(config)
    strange = save_checkpoint(tmp_path, "step-00000002", whole._replace(optimizer=change(whole.optimizer)))
    state = trained(0, 1)
    before, counters = tensors(state), (state.step, state.tokens, state.loader.state())
    with pytest.raises(CheckpointError, match=said) as caught:
        state.restore(strange, config)
    after = tensors(state)
    assert caught.value.remedy and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert counters == (state.step, state.tokens, state.loader.state())
