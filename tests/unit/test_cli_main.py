"""The front door: help, version, unforeseen failures, a reader that goes away, and Ctrl-C."""

import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from started import starting_trinity
from trinity.base.errors import TrinityError
from trinity.base.run import read_lines
from trinity.cli import main as front
from trinity.cli.main import COMMANDS, main

SETTINGS = ["train.tokens=24576", "train.save_every_tokens=1024", "train.evaluate_bytes=0", "optim.warmup_tokens=1024",
            "optim.decay_tokens=1024"]  # fmt: skip
TRINITY = [sys.executable, "-m", "trinity.cli.main"]


def test_help_lists_every_command(capsys):
    for arguments, code in ((["--help"], 0), (["-h"], 0), (["help"], 0), ([], 2)):
        assert main(arguments) == code
        shown = capsys.readouterr()
        assert all(f"  {name} " in shown.out for name in COMMANDS) and not shown.err
        assert "example:" in shown.out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_an_example(name: str, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    shown = capsys.readouterr()
    assert ended.value.code == 0 and not shown.err
    assert shown.out.startswith(f"usage: trinity {name}")
    assert f"  trinity {name} " in shown.out.partition("Example:\n")[2]


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"trinity {version('trinity')}\n"


def failing_with(monkeypatch, error: BaseException) -> None:
    """Make `trinity plan debug` fail in its midst."""
    from trinity.cli import plan

    def configure(parser):
        def fail(options):
            raise error

        parser.set_defaults(action=fail)

    monkeypatch.setattr(plan, "configure", configure)


def test_an_unforeseen_failure_is_one_line_and_a_traceback_when_asked_for(monkeypatch, capsys):
    failing_with(monkeypatch, ZeroDivisionError("first line\nsecond  line"))
    monkeypatch.delenv("TRINITY_TRACEBACK", raising=False)
    assert main(["plan"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("trinity plan: unexpected ZeroDivisionError: first line second line. ")
    assert error.count("\n") == 1 and "TRINITY_TRACEBACK=1" in error
    monkeypatch.setenv("TRINITY_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["plan"])


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (TrinityError("It broke.", "Mend it."), 1, "trinity plan: It broke. Mend it.\n"),
        (PermissionError(13, "Permission denied", "/some/file"), 1, "trinity plan: /some/file: Permission denied. "),
        (TimeoutError("too slow"), 1, "trinity plan: too slow. Check that the other side runs "),
        (
            ConnectionRefusedError(111, "Connection refused"),
            1,
            "trinity plan: Connection refused. Check that the other",
        ),
        (MemoryError(), 1, "trinity plan: Memory ran out. Ask for less"),
        (MemoryError("Unable to allocate 7.11 PiB for an array"), 1, "trinity plan: Memory ran out: 7.11 PiB could"),
        (OSError(12, "Cannot allocate memory"), 1, "trinity plan: Memory ran out. Ask for less"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                "tried to allocate 4000000 bytes. Error code 12 (Cannot allocate memory)"
            ),
            1,
            "trinity plan: Memory ran out: 4000000 bytes could not be allocated. Ask for less",
        ),
        (KeyboardInterrupt(), 130, "\ntrinity plan: interrupted.\n"),
    ],
)
def test_foreseen_failures_are_one_line(monkeypatch, capsys, error, code, told):
    failing_with(monkeypatch, error)
    assert main(["plan"]) == code
    shown = capsys.readouterr().err
    assert shown.startswith(told) and shown.strip().count("\n") == 0 and "defect" not in shown


def test_a_command_that_cannot_be_imported_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(front.COMMANDS, "plan", ("trinity.cli.nothing", "nothing"))
    assert main(["plan"]) == 1
    assert capsys.readouterr().err.startswith("trinity plan: unexpected ModuleNotFoundError: ")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_a_reader_that_goes_away_leaves_no_traceback(arguments: list[str], unbuffered: str):
    read, write = os.pipe()
    os.close(read)  # nobody reads: the first write fails
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with os.fdopen(write, "w") as out:
        done = subprocess.run(
            [*TRINITY, *arguments], stdout=out, stderr=subprocess.PIPE, text=True, env=environment, timeout=60
        )
    assert done.stderr == "" and done.returncode in (0, 1)  # argparse itself passes over a failed write of its help
    if not unbuffered:
        line = " ".join([*TRINITY, *arguments, "|", "head", "-1"])
        piped = subprocess.run(line, shell=True, capture_output=True, text=True, env=environment, timeout=60)
        assert piped.stderr == "" and piped.stdout.startswith("usage: trinity") and piped.stdout.count("\n") == 1


def metric_lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_ctrl_c_ends_a_run_in_one_line_and_the_same_command_goes_on(debug_data: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    command = ["train", "debug", "--data", str(debug_data), "--out", str(run), *settings]
    with starting_trinity(*command) as started:
        assert started.wait_for(lambda: metric_lines(run) >= 4)
        started.send(signal.SIGINT)
        ended = started.ended()
    assert ended.returncode == 130, ended.stderr
    assert ended.stdout == "" and "Traceback" not in ended.stderr
    assert (
        ended.stderr.endswith("\ntrinity train: interrupted. What was saved stays; the same command again goes on.\n")
        and ended.stderr.count("trinity train") == 1
    )
    assert not list((run / "checkpoints").glob(".*"))
    assert main(command) == 0
    captured = capsys.readouterr()
    assert f"resuming {run} at step" in captured.err and "to step 24" in captured.out
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl") if line["kind"] == "step"]
    assert steps == list(range(1, 25)), "each step once, as if nothing had happened"


def test_a_recipe_other_than_debug_asks_for_data(tmp_path, capsys):
    """Without this a forgotten --data trains for minutes on a corpus of seconds."""
    assert main(["train", "demo", "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "needs text" in told and "--data" in told and not (tmp_path / "run").exists()
