"""One process at a time writes into a run folder; who has it is said, and what to do."""

import errno
import fcntl
import os
import socket
from pathlib import Path

import pytest

from trinity.base.errors import UsageError
from trinity.cli.main import main
from trinity.train import loop
from trinity.train.loop import only_user_of


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_DYING_SECONDS", 0.0)


def test_a_second_user_hears_who_the_first_is_and_the_lock_ends_with_it(tmp_path: Path):
    with only_user_of(tmp_path), pytest.raises(UsageError) as caught, only_user_of(tmp_path):
        pass
    assert f"another process ({os.getpid()} on {socket.gethostname()})" in caught.value.what
    assert caught.value.remedy == "Wait for it, or use another --out."
    with only_user_of(tmp_path):
        pass


def test_a_refusal_leaves_no_folder_and_a_run_that_wrote_keeps_its_own(tmp_path: Path, capsys):
    run = tmp_path / "run"
    assert main(["train", "debug", "--out", str(run), "--data", str(tmp_path / "nowhere")]) == 1
    assert "Make one: trinity data tokenize DOCUMENTS" in capsys.readouterr().err
    assert not run.exists()
    with pytest.raises(KeyError), only_user_of(run):
        (run / "config.json").write_text("{}")
        raise KeyError
    assert sorted(path.name for path in run.iterdir()) == [".lock", "config.json"]


def test_a_lock_whose_file_was_taken_away_is_no_lock(tmp_path: Path):
    """Who waits for a folder that its user removes must not take the removed file's lock for that of the folder."""
    waiting = (tmp_path / ".lock").open("a+")
    with waiting:
        (tmp_path / ".lock").unlink()
        assert not loop._locked(waiting, tmp_path)
        (tmp_path / ".lock").touch()
        assert not loop._locked(waiting, tmp_path)
    with only_user_of(tmp_path):
        pass


def test_of_another_host_it_is_said_when_its_lock_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with only_user_of(tmp_path):
        (tmp_path / ".lock").write_text("7 elsewhere\n")
        with pytest.raises(UsageError, match="7 on elsewhere") as caught, only_user_of(tmp_path):
            pass
    assert "If elsewhere is gone" in caught.value.remedy


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def refuse(file: object, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UsageError, match="cannot lock a file") as caught, only_user_of(tmp_path):
        pass
    assert os.strerror(number) in caught.value.what and "--out" in caught.value.remedy
