"""torchrun starts processes again that failed: what would fail again for sure ends the launch, and is told once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trinity.base import launch

SETTINGS = ["train.tokens=24K", "train.batch_tokens=256", "train.microbatch_rows=1", "train.save_every_tokens=4096",
            "train.evaluate_bytes=0", "train.sample_tokens=0", "train.probe_every=0",
            "optim.decay_tokens=2K"]  # fmt: skip
STOPS = ["train.norm_spike_sigmas=0.01", "train.spike_action=stop"]
PAGER = "import pathlib, sys; pathlib.Path(sys.argv[1]).open('a').write(sys.stdin.read())"


def launched(data: Path, run: Path, *settings: str, restarts: int = 3) -> tuple[subprocess.CompletedProcess, list]:
    """What a launch of two processes ended in, and the alarms that were sent."""
    pager, alarms = run.with_suffix(".py"), run.with_suffix(".alarms")
    pager.write_text(PAGER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--max-restarts", str(restarts), "-m", "trinity.cli.main", "train", "debug", "--data", str(data),
               "--out", str(run)]  # fmt: skip
    for setting in (*SETTINGS, f"train.alarm_command={sys.executable} {pager} {alarms}", *settings):
        command += ["--set", setting]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    return ended, [json.loads(line) for line in alarms.read_text().splitlines()] if alarms.exists() else []


@pytest.mark.slow
def test_a_stop_of_the_guard_ends_the_launch_and_a_person_may_go_on(debug_data, tmp_path):
    run = tmp_path / "run"
    ended, alarms = launched(debug_data, run, *STOPS)
    assert ended.returncode == 1, "the scheduler must see a failure"
    said = [line for line in ended.stderr.splitlines() if "trinity train: Training stopped at step" in line]
    assert len(said) in (2, 3), "by the first process, and by the launcher as what one or both died of"
    assert sum(line.startswith("trinity train:") for line in said) == 1
    assert "resuming" not in ended.stdout + ended.stderr
    (alarm,) = alarms
    assert (alarm["kind"], alarm["action"]) == ("halt", "the run has ended")
    beat = json.loads((run / "heartbeat.json").read_text())
    assert beat["state"] == "halted" and "Training stopped" in beat["reason"]
    again, alarms = launched(debug_data, run, "train.spike_action=skip", "train.norm_spike_sigmas=0")
    assert again.returncode == 0, again.stderr[-3000:]
    assert len(alarms) == 1 and json.loads((run / "heartbeat.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_a_refusal_is_said_once_and_not_tried_again(debug_data, tmp_path):
    ended, alarms = launched(debug_data, tmp_path / "run", "parallel.expert=3")
    assert ended.returncode == 1
    refused = [line for line in ended.stderr.splitlines() if line.startswith("trinity train:")]
    assert len(refused) == 1 and "parallel.expert" in refused[0]
    assert [(alarm["kind"], alarm["action"]) for alarm in alarms] == [("halt", "the run has ended")]
    assert not (tmp_path / "run").exists(), "a command that is refused writes nothing"


@pytest.mark.slow
def test_a_phase_that_needs_another_layout_ends_the_launch_with_what_came_before_saved(debug_data, tmp_path):
    longer = ["extension.tokens=4096", "extension.sequence_length=256", "extension.batch_tokens=256",
              "optim.warmup_tokens=1K", "train.tokens=4096"]  # fmt: skip
    ended, alarms = launched(debug_data, tmp_path / "run", *longer)
    assert ended.returncode == 1 and "extension" in ended.stderr
    assert "resuming" not in ended.stdout + ended.stderr
    assert (tmp_path / "run" / "checkpoints" / "base").is_dir()
    assert [alarm["kind"] for alarm in alarms] == ["halt"]


def test_what_a_launch_is_told_holds_for_all_its_starts(tmp_path, monkeypatch):
    def start(number: int) -> Path:
        reply = tmp_path / "none_x" / f"attempt_{number}" / "0" / "error.json"
        reply.parent.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(reply))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
        return reply

    assert not launch.has_ended() and not launch.starts_again(), "no launcher"
    launch.note_end("nobody reads this")
    start(0)
    assert not launch.has_ended() and launch.starts_again()
    launch.note_end("It stopped.")
    reply = start(1)
    assert launch.has_ended() and not launch.starts_again()
    assert json.loads(reply.read_text())["message"] == "It stopped."
    for elsewhere in ("", os.devnull, str(tmp_path / "error.json")):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", elsewhere)
        assert launch.folder() is None
