"""Files that survive: a kill or a full disk at any system call leaves the old content or the new, never a part."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from trinity.base import durable
from trinity.base.durable import (
    MANIFEST,
    folder_aside,
    seal,
    unsealed_differences,
    verify_seal,
    write_durably,
    write_json,
)
from trinity.base.errors import StorageError, TrinityError, VerificationError
from trinity.base.run import METRICS, MetricsLog, read_lines

OLD, NEW = "old" * 1000, "new" * 2000


class Killed(BaseException):
    """Stands for a kill: nothing after it runs but the interpreter's own unwinding."""


@contextmanager
def failing_at(monkeypatch: pytest.MonkeyPatch, call: str, countdown: int, error: BaseException) -> Iterator[list[str]]:
    """Let the `countdown`-th use of os.<call> raise; the list tells whether it was reached."""
    real, seen = getattr(os, call), []

    def failing(*arguments: Any, **keywords: Any) -> Any:
        seen.append(call)
        if len(seen) == countdown:
            raise error
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, call, failing)
        yield seen


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
@pytest.mark.parametrize("countdown", [1, 2])
@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")], ids=["kill", "full"])
def test_a_file_is_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, countdown: int, error: BaseException
):
    path = tmp_path / "file.json"
    write_durably(path, OLD)
    with failing_at(monkeypatch, call, countdown, error) as seen:
        try:
            write_durably(path, NEW)
        except (Killed, StorageError) as caught:
            assert len(seen) >= countdown, caught
    assert path.read_text() in (OLD, NEW)
    write_durably(path, NEW)
    assert path.read_text() == NEW


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_durably(tmp_path / "file", OLD)
    full = OSError(errno.ENOSPC, "No space left on device")
    with failing_at(monkeypatch, "fsync", 1, full), pytest.raises(StorageError, match="The disk is full") as caught:
        write_durably(tmp_path / "file", NEW)
    assert caught.value.remedy.startswith("Nothing saved before was touched")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_refusing_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    refused = OSError(number, os.strerror(number))
    with failing_at(monkeypatch, "replace", 1, refused), pytest.raises(StorageError, match="cannot be written"):
        write_durably(tmp_path / "file", NEW)


KILL_SCRIPT = """
import os, sys
from pathlib import Path
from trinity.base.durable import write_durably
calls, target = 0, int(sys.argv[2])
def counted(real):
    def call(*arguments, **keywords):
        global calls
        calls += 1
        if calls == target:
            os.kill(os.getpid(), 9)
        return real(*arguments, **keywords)
    return call
os.fsync, os.replace = counted(os.fsync), counted(os.replace)
write_durably(Path(sys.argv[1]), "new" * 2000)
"""


@pytest.mark.parametrize("target", [1, 2, 3])
def test_a_real_kill_leaves_old_or_new(tmp_path: Path, target: int):
    path = tmp_path / "file"
    path.write_text(OLD)
    done = subprocess.run([sys.executable, "-c", KILL_SCRIPT, str(path), str(target)], check=False)
    assert done.returncode == -9
    assert path.read_text() in (OLD, NEW)


def small_disk() -> Path | None:
    """A file system small enough to fill, where the machine offers one for tests."""
    named = os.environ.get("TRINITY_SMALL_DISK")
    return Path(named) if named else None


@pytest.mark.skipif(small_disk() is None, reason="TRINITY_SMALL_DISK names no small file system (tmpfs of 1 MiB)")
def test_a_really_full_disk():
    folder = small_disk()
    assert folder is not None
    path = folder / "file"
    write_durably(path, OLD)
    with pytest.raises(StorageError, match="The disk is full"):
        write_durably(path, os.urandom(8 << 20))
    assert path.read_text() == OLD
    path.unlink()
    assert not list(folder.iterdir())


def fill(folder: Path, text: str) -> None:
    (folder / "part").mkdir()
    (folder / "a.txt").write_text(text)
    (folder / "part" / "b.txt").write_text(text)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("countdown", range(1, 7))
def test_a_folder_is_old_or_new_or_recoverable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, countdown: int
):
    final = tmp_path / "step-1"
    with folder_aside(final) as aside:
        fill(aside, OLD)
    full = OSError(errno.ENOSPC, "No space left on device")
    with failing_at(monkeypatch, call, countdown, full):
        try:
            with folder_aside(final) as aside:
                fill(aside, NEW)
        except StorageError:
            pass
    whole = [path for path in tmp_path.iterdir() if not unsealed_differences(path)]
    assert whole, "neither the old folder nor the new one is whole"
    with folder_aside(final) as aside:
        fill(aside, NEW)
    verify_seal(final)
    assert (final / "a.txt").read_text() == NEW


def test_a_folder_whose_block_fails_leaves_nothing(tmp_path: Path):
    with pytest.raises(RuntimeError), folder_aside(tmp_path / "out") as aside:
        fill(aside, NEW)
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == []


CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "a.txt").write_text("nEw" * 2000), "a.txt was altered"),
    (lambda folder: (folder / "a.txt").write_text("new"), "a.txt has 3 bytes instead of 6000"),
    (lambda folder: (folder / "part" / "b.txt").unlink(), "part/b.txt is missing"),
    (lambda folder: (folder / "c.txt").write_text(""), "c.txt is not in the manifest"),
    (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing"),
    (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json is not a manifest"),
]


@pytest.mark.parametrize(("change", "told"), CHANGES, ids=[told for _, told in CHANGES])
def test_a_broken_seal_is_named(tmp_path: Path, change: Callable[[Path], object], told: str):
    fill(tmp_path, NEW)
    seal(tmp_path)
    verify_seal(tmp_path)
    change(tmp_path)
    with pytest.raises(VerificationError, match=told):
        verify_seal(tmp_path)


def test_what_is_ignored_is_neither_promised_nor_missed(tmp_path: Path):
    fill(tmp_path, NEW)
    seal(tmp_path, ignore=("model.sig",))
    (tmp_path / "model.sig").write_text("signature")
    assert unsealed_differences(tmp_path, ignore=("model.sig",)) == []
    assert unsealed_differences(tmp_path) == ["model.sig is not in the manifest"]


def test_json_is_written_readably(tmp_path: Path):
    write_json(tmp_path / "deep" / "value.json", {"naïve": [1, 2.5, None]})
    text = (tmp_path / "deep" / "value.json").read_text()
    assert "naïve" in text and json.loads(text) == {"naïve": [1, 2.5, None]}


def test_metrics_drop_a_lost_stretch_and_a_cut_line(tmp_path: Path):
    log = MetricsLog(tmp_path, resume_step=0)
    for step in (1, 2, 3):
        log.write("step", step, loss=1 / 3)
    log.close()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"kind": "step", "st')
    assert [line["step"] for line in read_lines(tmp_path / METRICS)] == [1, 2, 3]
    log = MetricsLog(tmp_path, resume_step=2)
    log.write("step", 3, loss=0.25)
    log.close()
    assert [line["loss"] for line in read_lines(tmp_path / METRICS)] == [1 / 3, 1 / 3, 0.25]


def test_every_error_of_ours_has_a_code():
    def kinds(kind: type[TrinityError]) -> list[type[TrinityError]]:
        return [kind, *(found for child in kind.__subclasses__() for found in kinds(child))]

    assert {kind.exit_code for kind in kinds(TrinityError)} == {1, 2}
    assert str(TrinityError("It broke.", "Mend it.")) == "It broke. Mend it."
