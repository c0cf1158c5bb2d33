"""A worker is killed, the launcher starts all of them again: the run ends in the bits of one that was not killed."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trinity.ckpt.shards import read_tensors

ROOT = Path(__file__).parents[2]
SETTINGS = ["train.tokens=20K", "train.batch_tokens=1024", "train.save_every_tokens=2048", "optim.decay_tokens=8K",
            "train.evaluate_every_tokens=8K", "train.evaluate_bytes=500", "train.sample_tokens=0"]  # fmt: skip


def launch(data: Path, run: Path, processes: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               "--max-restarts", "3", "-m", "trinity.cli.main", "train", "debug", "--data", str(data),
               "--out", str(run)]  # fmt: skip
    for setting in SETTINGS:
        command += ["--set", setting]
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def workers_of(launcher: subprocess.Popen[bytes]) -> list[int]:
    """Process numbers of the workers that a launcher started."""
    listed = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(number) for number in listed.read_text().split()] if listed.exists() else []


def wait_until(holds, launcher: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 240
    while not holds():
        assert launcher.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
        time.sleep(0.002)


def bits_of(run: Path) -> str:
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    digest = hashlib.sha256(last.name.encode())
    for part in ("model", "optimizer"):
        for name, tensor in sorted(read_tensors(last / part).items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.slow
def test_the_launcher_starts_a_killed_run_again_and_it_ends_in_the_same_bits(debug_data, tmp_path: Path):
    """Three kills of one worker each: after a first save, in the middle of one, and at a random moment."""
    chance = random.Random(1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    launcher = launch(debug_data, whole, 2)
    assert launcher.wait(timeout=240) == 0, whole.with_suffix(".log").read_text()[-2000:]
    launcher, log = launch(debug_data, killed, 2), killed.with_suffix(".log")
    checkpoints = killed / "checkpoints"

    def at_step(step: int):
        return lambda: (checkpoints / f"step-{step:08d}").exists()

    def saving():
        return any(checkpoints.glob(".step-*.writing-*")) and at_step(6)()

    try:
        for moment in (at_step(4), saving, at_step(14)):
            wait_until(moment, launcher, log)
            before = workers_of(launcher)
            os.kill(chance.choice(before), signal.SIGKILL)
            wait_until(lambda: not set(workers_of(launcher)) & set(before), launcher, log)  # noqa: B023
        assert launcher.wait(timeout=240) == 0, log.read_text()[-2000:]
    finally:
        launcher.terminate()
        launcher.wait(timeout=60)
    assert log.read_text().count("resuming") == 3
    assert bits_of(killed) == bits_of(whole)
    assert not [path.name for path in checkpoints.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_random_kills_of_any_rank_end_in_the_same_bits(tmp_path: Path):
    """TRINITY_KILLS of them; the record in records/ has 100."""
    kills = os.environ.get("TRINITY_KILLS", "8")
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "kills.py"), "--kills", kills, "--out", str(tmp_path / "kills")],
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] and found["kills"] == int(kills) == sum(found["phases"].values())
