"""A process that hangs ends itself, its launcher starts all of them again, and the run is completed."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from trinity.base.run import read_lines

# Rank 1 stops in the middle of its fourth step, once: the file says that it did.
HANGS_ONCE = """
    import os, sys, time
    from pathlib import Path
    from trinity.cli.main import main
    from trinity.train import loop

    once, original, calls = Path(sys.argv.pop(1)), loop.accumulate, []

    def accumulate(*arguments):
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 4 and not once.exists():
            once.touch()
            time.sleep(1000)
        return original(*arguments)

    loop.accumulate = accumulate
    sys.exit(main(sys.argv[1:]))
"""
SETTINGS = ["train.tokens=8K", "train.batch_tokens=1024", "train.save_every_tokens=2048", "optim.decay_tokens=2K",
            "train.evaluate_bytes=0", "train.sample_tokens=0", "train.hang_minutes=0.1",
            "train.hang_action=exit"]  # fmt: skip


@pytest.mark.slow
def test_a_hang_ends_the_process_and_the_launcher_completes_the_run(debug_data, tmp_path: Path):
    script, run = tmp_path / "hangs_once.py", tmp_path / "run"
    script.write_text(textwrap.dedent(HANGS_ONCE))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--max-restarts", "1", str(script), str(tmp_path / "once"), "train", "debug", "--data",
               str(debug_data), "--out", str(run)]  # fmt: skip
    for setting in SETTINGS:
        command += ["--set", setting]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-3000:]
    assert "no step has been finished for" in ended.stderr and "ends itself" in ended.stderr
    assert any("in accumulate" in path.read_text() for path in (run / "hangs").glob("rank-1-*.txt"))
    lines = list(read_lines(run / "metrics.jsonl"))
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 9))
    assert [line["step"] for line in lines if line["kind"] == "resume"] == [2]
    beat = json.loads((run / "heartbeat.json").read_text())
    assert (beat["state"], beat["step"]) == ("finished", 8)
