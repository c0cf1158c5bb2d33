"""Too little memory is said before anything is allocated, with the numbers and what to change."""

import json
from dataclasses import replace

import pytest
import torch

from trinity.base.errors import TakenError, TrinityError
from trinity.base.memory import left_by_container
from trinity.base.units import show_bytes
from trinity.cli.main import main
from trinity.config.load import override
from trinity.config.phases import PhaseConfig
from trinity.kernels.heap import available_bytes
from trinity.parallel.mesh import World
from trinity.plan.layout import Layout
from trinity.plan.memory import rank_memory
from trinity.plan.stages import stages
from trinity.recipes.table import recipe
from trinity.train import loop, room
from trinity.train.room import explaining_memory, needed_by, refuse_what_cannot_fit
from trinity.train.state import TrainState


def test_a_state_that_cannot_fit_is_refused():
    run = override(recipe("large"), ["parallel.remat=block", "parallel.expert=1", "parallel.precision=float32"])
    with pytest.raises(TakenError) as caught:
        refuse_what_cannot_fit(run, World.alone(), pytest.fail, available=16 * 2**30)
    said = str(caught.value)
    assert "weights 1.5 TiB" in said and "16.0 GiB are free on cpu" in said
    assert "parallel.shard" in caught.value.remedy and "microbatch_rows" in caught.value.remedy


def test_a_step_that_may_not_fit_is_warned_of():
    run, said = recipe("debug"), []
    ((_, needed),) = needed_by(run, World.alone())
    step = needed.peak - needed.process - needed.allocator
    refuse_what_cannot_fit(run, World.alone(), said.append, available=round(step / 1.05))
    assert len(said) == 1 and "activations" in said[0]


def test_a_step_that_cannot_fit_is_refused():
    """The state alone would fit many times."""
    run = override(recipe("debug"), ["train.microbatch_rows=512", "train.batch_tokens=65536"])
    ((_, needed),) = needed_by(run, World.alone())
    step = needed.peak - needed.process - needed.allocator
    assert step > 10 * (needed.weights + needed.moments + needed.staging)
    with pytest.raises(TakenError, match="at the peak of a step.*lower train.microbatch_rows"):
        refuse_what_cannot_fit(run, World.alone(), pytest.fail, available=round(step / 1.2))


def test_the_copy_that_a_save_makes_counts_where_it_lies_in_the_same_memory():
    run, said = recipe("debug"), []
    ((_, needed),) = needed_by(run, World.alone())
    with pytest.raises(TakenError, match="copy for a checkpoint"):
        refuse_what_cannot_fit(run, World.alone(), pytest.fail, available=needed.weights + 2 * needed.moments)
    refuse_what_cannot_fit(run, World.alone(), said.append, available=needed.peak - needed.process + needed.staging - 1)
    assert len(said) == 1
    refuse_what_cannot_fit(run, World.alone(), pytest.fail, available=needed.peak - needed.process + needed.staging)
    gpu = World(rank=0, size=1, device=torch.device("cuda"))
    ((_, needed),) = needed_by(run, gpu)
    refuse_what_cannot_fit(run, gpu, pytest.fail, available=needed.peak)


LONG = ["extension.tokens=1M", "extension.sequence_length=262144", "extension.batch_tokens=1048576",
        "extension.microbatch_rows=4", "parallel.remat=block"]  # fmt: skip


def test_a_later_phase_that_may_not_fit_is_told_of_until_it_lies_behind():
    """Its rows are a thousand times those of the beginning: it is its own shape that counts."""
    config, said = override(recipe("demo"), LONG), []
    refuse_what_cannot_fit(config, World.alone(), said.append, available=2**35)
    (_, extension) = stages(config)
    layout = Layout(microbatch_rows=4, remat="block")
    planned = rank_memory(extension.run, layout, in_host_memory=True)
    assert planned.peak > 2**35
    (sentence,) = said
    assert sentence.startswith("later: A step of phase 'extension' may need about ")
    assert show_bytes(planned.peak + planned.staging) in sentence and "32.0 GiB are free on cpu" in sentence
    assert "parallel.context" in sentence
    said.clear()
    refuse_what_cannot_fit(config, World.alone(), said.append, config.base_end, available=2**35)
    assert len(said) == 1 and said[0].startswith("A step may need about ")
    assert [name for name, _ in needed_by(config, World.alone(), config.horizon)] == ["extension"]


def test_phases_that_need_no_more_are_not_told_of_again():
    config = replace(
        override(recipe("debug"), ["train.batch_tokens=512", "train.microbatch_rows=1"]),
        phases=(PhaseConfig(name="wide", from_tokens=8192, batch_tokens=1024),),
    )
    ((_, first), (_, wide)), said = needed_by(config, World.alone()), []
    assert first.peak == wide.peak
    refuse_what_cannot_fit(config, World.alone(), said.append, available=first.peak - first.process)
    assert len(said) == 1


def test_a_run_that_fits_is_let_pass():
    refuse_what_cannot_fit(recipe("debug"), World.alone(), pytest.fail, available=2**33)


def test_nothing_is_allocated_before_a_refusal(monkeypatch, debug_data, tmp_path):

    monkeypatch.setattr(room, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(TrainState, "fresh", lambda *_: pytest.fail("the model was built"))
    with pytest.raises(TakenError, match="1000 B are free"):
        loop.train(recipe("debug"), debug_data, tmp_path / "run", lambda _: None, lambda _: None)


def test_of_a_model_that_is_too_large_its_size_is_said_before_anything_else(monkeypatch, tmp_path, capsys):
    """Its layout and its mixes are not here either, which nobody can mend who has no room for it."""
    monkeypatch.setattr("trinity.kernels.heap.available_bytes", lambda device: 32 * 2**30)
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


def test_what_torch_keeps_of_freed_tensors_on_a_gpu_is_free(monkeypatch):
    """The room of the engine before, say: the one that follows would have had half of it, and then half of that."""
    gpu = {"free": 10, "kept": 50}
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: gpu.update(free=60, kept=0))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (gpu["free"], 80))
    assert available_bytes(torch.device("cuda", 0)) == 60


def test_limits_of_a_container_count(tmp_path):
    assert left_by_container(tmp_path) == []
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert left_by_container(tmp_path) == [3000]
    (tmp_path / "memory.max").write_text("max\n")
    assert left_by_container(tmp_path) == []


def test_memory_that_runs_out_in_a_step_is_told_with_figures(monkeypatch, debug_data, tmp_path, capsys):
    """A real refusal of torch's allocator; the heartbeat says the same sentence."""
    monkeypatch.setattr(loop, "accumulate", lambda *_: torch.empty(10**15))
    run = tmp_path / "run"
    assert (
        main(["train", "debug", "--data", str(debug_data), "--out", str(run), "--set", "train.evaluate_bytes=0"]) == 1
    )
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trinity train")]
    assert "Memory ran out: 4000000000000000 bytes could not be allocated on cpu of process 0." in told
    assert "are free now" in told and "weights " in told and "train.microbatch_rows" in told and "defect" not in told
    beat = json.loads((run / "heartbeat.json").read_text())
    assert beat["state"] == "failed" and beat["reason"] in told


def test_memory_of_a_gpu_that_runs_out_is_told_and_other_errors_pass():
    with (
        pytest.raises(TrinityError, match=r"20\.00 MiB could not be allocated"),
        explaining_memory(recipe("debug"), World.alone()),
    ):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB"
        )
    with pytest.raises(RuntimeError, match="mat1"), explaining_memory(recipe("debug"), World.alone()):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
