"""A mistake on one process alone: told once, with its process, by the first. Nobody waits; nobody blames trinity."""

import contextlib
import fcntl
import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from worlds import free_port, in_processes

from trinity.base import lineage
from trinity.base.errors import ConfigError, DataError, StorageError, TrainingHalted, TrinityError, common_failure, told
from trinity.base.run import MetricsLog
from trinity.cli.main import main
from trinity.data import loader
from trinity.parallel.lost import noticing_lost_peers
from trinity.parallel.rendezvous import _invite, room_of_this_start
from trinity.train import loop

SETTINGS = ["train.tokens=4096", "train.batch_tokens=1024", "train.save_every_tokens=2048", "optim.decay_tokens=1K",
            "optim.warmup_tokens=1K", "train.evaluate_bytes=0", "train.sample_tokens=0"]  # fmt: skip


def command(data: Path | str, run: Path, *settings: str, recipe: str = "debug") -> list[str]:
    words = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    return ["train", recipe, "--data", str(data), "--out", str(run), *words]


def meet(out: Path, name: str, port: int, line: list[str]) -> None:
    """Carry out one command line on this process; what it said and how it ended lie in `out`."""
    os.environ["MASTER_PORT"] = str(port)
    with (out / f"{name}-{os.environ['RANK']}").open("w") as file, contextlib.redirect_stderr(file):
        code = main(line)
        file.write(f"\nexit {code}")


def one_is_mistaken(data: Path, out: Path, ports: list[int]) -> None:
    second, next_port = os.environ["RANK"] == "1", iter(ports)

    def scene(name: str, *settings: str, recipe: str = "debug", where: Path | str = data) -> None:
        meet(out, name, next(next_port), command(where, out / f"{name}-run", *settings, recipe=recipe))

    (out / "bin").mkdir(exist_ok=True)
    (out / "bin" / "our-pager").write_text("#!/bin/sh\n")
    (out / "bin" / "our-pager").chmod(0o755)
    path = os.environ["PATH"]
    os.environ["PATH"] = path if second else f"{path}:{out / 'bin'}"
    scene("pager", "train.alarm_command=our-pager")
    os.environ["PATH"] = path
    scene("gpu", f"parallel.device={'cuda' if second else 'cpu'}")
    scene("recipe", recipe=str(out / "nothing.toml") if second else "debug")
    scene("typo", "train.toknes=3")
    scene("data", where=out / "nothing" if second else data)

    held = out / "lock-run"
    held.mkdir(exist_ok=True)
    with (held / ".lock").open("a") as lock, pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_DYING_SECONDS", 0.3)  # that the one before may take to end
        if not second:
            fcntl.flock(lock, fcntl.LOCK_EX)
        scene("lock")

    files = lineage.source_files()
    edited = {**files, "model/attend.py": "0" * 64} if second else files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trinity.parallel.mesh.source_files", lambda: edited)
        scene("code")
    with pytest.MonkeyPatch.context() as patch:
        if second:
            patch.setattr(loader.Corpora, "__init__", broken)
        scene("defect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "write", full_disk)
        scene("log")


def broken(self: object, first: object, later: object) -> None:
    raise ZeroDivisionError("of ours")


def full_disk(self: MetricsLog, kind: str, step: int, **values: object) -> None:
    if step == 2:
        raise StorageError("The disk is full.", "Free some space.")


@pytest.fixture(scope="module")
def said(debug_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """{scene: [what each of two processes said, and its exit code]}."""
    out = tmp_path_factory.mktemp("mistakes")
    in_processes(2, one_is_mistaken, debug_data, out, [free_port() for _ in range(9)], seconds=150)
    names = sorted(path.name[:-2] for path in out.glob("*-0"))
    return {name: [(out / f"{name}-{rank}").read_text() for rank in range(2)] for name in names}


@pytest.mark.parametrize(
    ("scene", "told", "code"),
    [
        ("pager", "On process 1 on HOST: train.alarm_command names 'our-pager', which is no program here.", 2),
        ("gpu", "On process 1 on HOST: There is no GPU that torch can use.", 2),
        ("recipe", "On process 1 on HOST: There is no recipe file ", 2),
        ("typo", "Unknown key 'train.toknes'. Did you mean 'tokens'?", 2),
        ("data", "On process 1 on HOST: ", 1),
        ("lock", "is being trained by another process", 2),
        ("code", "rank 1 has model/attend.py 00000000 instead of ", 2),
    ],
)
def test_a_mistake_of_one_process_is_told_once(said, scene: str, told: str, code: int):
    first, second = said[scene]
    assert first.count("trinity train: ") == 1 and told.replace("HOST", socket.gethostname()) in first
    assert first.endswith(f"\nexit {code}")
    assert second == f"\nexit {code}"


def test_a_defect_is_told_as_one_where_it_happened_and_its_process_named(said):
    first, second = said["defect"]
    assert first.startswith("Loading torch on 2 processes.\nJoining 2 processes.\n"), "a sign of life"
    assert f"On process 1 on {socket.gethostname()}: ZeroDivisionError: of ours." in first and "a defect" not in first
    assert "unexpected ZeroDivisionError: of ours" in second and "This is a defect of trinity" in second


def test_what_the_first_meets_later_is_no_defect_for_the_others(said):
    first, second = said["log"]
    assert "trinity train: The disk is full. Free some space." in first and first.endswith("\nexit 1")
    assert f"(process 1 on {socket.gethostname()}): Another process of this run ended. See its" in second
    assert "defect" not in second and second.endswith("\nexit 1")


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.7]:61187",
        "[1] is setting up NCCL communicator ... Failed to recv, got 0 bytes. Connection was likely closed. Did the "
        "remote server shutdown or crash?",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    ],
)
def test_the_loss_of_another_process_is_no_defect(text: str):
    with pytest.raises(TrainingHalted.__base__, match="Another process of this run ended"), noticing_lost_peers():
        raise RuntimeError(text)


def exchange_with_nobody(out: Path) -> None:
    """Rank 1 joins and then takes part in nothing until rank 0 has given up on it, twice."""
    short = timedelta(seconds=1)
    dist.init_process_group("gloo", timeout=short)
    if os.environ["RANK"] == "1":
        while not (out / "given up").exists():
            time.sleep(0.05)
        return
    for number, work in enumerate((lambda: dist.all_reduce(torch.ones(3)), lambda: dist.new_group(timeout=short))):
        try:
            with noticing_lost_peers():
                work()
        except TrinityError as error:
            (out / f"told-{number}").write_text(str(error))
    (out / "given up").touch()


def test_a_process_that_does_not_answer_is_no_defect(tmp_path: Path):
    in_processes(2, exchange_with_nobody, tmp_path)
    collective, group = ((tmp_path / f"told-{number}").read_text() for number in range(2))
    assert "did not answer in time: " in collective and "Timed out waiting 1000ms for recv" in collective
    assert "did not all meet: wait timeout after 1000ms" in group
    assert "goes on from the last checkpoint" in collective and "MASTER_ADDR" in group


@pytest.mark.parametrize(
    ("rank", "taken", "told"),
    [
        ("0", False, "The processes of this run did not all meet: Timed out after .* 1/2 clients joined"),
        ("1", False, "The processes of this run did not all meet: The client socket has timed out"),
        ("0", True, "The port at which the processes of this run are to meet is taken: "),
    ],
)
def test_a_meeting_that_fails_is_no_defect(monkeypatch, rank: str, taken: bool, told: str):
    with socket.socket() as other:
        port = free_port()
        if taken:
            other.bind(("", port))
            other.listen()
        for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(TrinityError, match=told) as caught:
            room_of_this_start(timedelta(seconds=1))
    assert "MASTER_PORT" in caught.value.remedy


def test_a_process_that_found_the_store_but_never_asked_is_named():
    with pytest.raises(TrinityError, match=r"did not all meet: processes \[1, 2\] did not come within 0:00:00"):
        _invite(dist.HashStore(), 3, timedelta())


def test_nccl_that_times_out_is_no_defect():
    """As its watchdog says it (torch 2.13); there is no GPU here."""
    with pytest.raises(TrinityError, match="did not answer in time"), noticing_lost_peers():
        raise dist.DistBackendError(
            "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, "
            "Timeout(ms)=1800000) ran for 1800033 milliseconds before timing out."
        )


def test_other_failures_are_what_they_are():
    with pytest.raises(RuntimeError, match="mat1"), noticing_lost_peers():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_one_error_for_all():
    disk, typed = told(OSError(5, "I/O error", "/x"), 3), told(ConfigError("No.", "Yes."), 1)
    assert common_failure([None, None]) is None
    alike = common_failure([typed, typed])
    assert isinstance(alike, ConfigError) and str(alike) == "No. Yes." and alike.alike
    named = common_failure([None, typed])
    assert isinstance(named, ConfigError) and str(named) == f"On process 1 on {socket.gethostname()}: No. Yes."
    first = common_failure([None, disk, told(DataError("Gone."), 4)])
    assert isinstance(first, StorageError) and "process 3" in first.what and "/x" in first.what
    assert not ConfigError("another").alike
