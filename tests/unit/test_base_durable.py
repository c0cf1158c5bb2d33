"""Files that survive: a kill or a full disk at any system call leaves the old content or the new, never a part."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from trinity.base import durable
from trinity.base.durable import (
    MANIFEST,
    folder_aside,
    recover,
    refusing_disk,
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


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("named", ["out", "out/part/a", ".out.writing-7/a", ".", b"out/a", 5, None])
def test_a_refused_write_of_the_target_is_told_as_one(tmp_path: Path, monkeypatch, number: int, named: object):
    monkeypatch.chdir(tmp_path)
    for target in (Path("out"), tmp_path / "out"):
        with pytest.raises(StorageError, match="out cannot be written"), refusing_disk(target):
            raise OSError(number, os.strerror(number), named)


@pytest.mark.parametrize("named", ["source/a", "outer", ".outer.writing-7", "/etc/shadow", b"../out"])
def test_a_source_that_may_not_be_read_is_not_told_as_the_target(tmp_path: Path, monkeypatch, named: str | bytes):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PermissionError) as caught, folder_aside(Path("out")) as aside:
        fill(aside, NEW)
        raise PermissionError(errno.EACCES, "Permission denied", named)
    assert caught.value.filename == named and not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("exchanged", [True, False], ids=["exchange", "two steps"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("countdown", range(1, 9))
def test_a_folder_is_old_or_new_after_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, countdown: int, exchanged: bool
):
    final = tmp_path / "step-1"
    if not exchanged:
        monkeypatch.setattr(durable, "exchange", lambda a, b: False)
    with folder_aside(final) as aside:
        fill(aside, OLD)
    full = OSError(errno.ENOSPC, "No space left on device")
    with failing_at(monkeypatch, call, countdown, full), suppress(StorageError), folder_aside(final) as aside:
        fill(aside, NEW)
    verify_seal(final)
    recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


KILLED_FOLDER = """
import os, shutil, sys
from pathlib import Path
from trinity.base import durable
calls, target = 0, int(sys.argv[2])
def counted(real):
    def call(*arguments, **keywords):
        global calls
        for _ in ("before", "after"):
            calls += 1
            if calls == target:
                os.kill(os.getpid(), 9)
            found = real(*arguments, **keywords) if _ == "before" else found
        return found
    return call
swap = durable.exchange if sys.argv[3] == "exchange" else lambda a, b: False
os.fsync, os.replace, os.unlink = counted(os.fsync), counted(os.replace), counted(os.unlink)
shutil.rmtree, durable.exchange = counted(shutil.rmtree), counted(swap)
with durable.folder_aside(Path(sys.argv[1])) as aside:
    (aside / "part").mkdir()
    (aside / "a.txt").write_text("new" * 2000)
    (aside / "part" / "b.txt").write_text("new" * 2000)
"""


@pytest.mark.parametrize("way", ["exchange", "two steps"])
def test_a_folder_is_old_or_new_after_a_real_kill(tmp_path: Path, way: str):
    """Killed before and after each call that matters; only without exchange does the old folder need `recover`."""
    final, code, target, held = tmp_path / "step-1", -9, 0, []
    if way == "exchange" and not can_exchange(tmp_path):
        pytest.skip("this system cannot exchange two folders")
    while code == -9:
        target += 1
        with folder_aside(final) as aside:
            fill(aside, OLD)
        code = subprocess.run([sys.executable, "-c", KILLED_FOLDER, final, str(target), way], check=False).returncode
        if way == "two steps":
            recover(tmp_path)
        verify_seal(final)
        held.append((final / "a.txt").read_text())
        assert held[-1] in (OLD, NEW)
        recover(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["step-1"], "a kill leaves nothing beside"
    assert code == 0 and target > 20 and held == sorted(held, reverse=True) and set(held) == {OLD, NEW}


def can_exchange(folder: Path) -> bool:
    for name in ("a", "b"):
        (folder / name).mkdir()
    offered = durable.exchange(folder / "a", folder / "b")
    for name in ("a", "b"):
        (folder / name).rmdir()
    return offered


def test_an_exchange_that_fails_says_why(tmp_path: Path):
    if can_exchange(tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            durable.exchange(tmp_path / "a", tmp_path / "b")
        assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "a"), str(tmp_path / "b"))


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    living = os.getppid()
    for name in (f".a.writing-{ended.pid}", f".a.writing-{living}", f".b.retired-{living}", ".a.writing-", ".a"):
        (tmp_path / name).mkdir()
    (tmp_path / f".latest.writing-{ended.pid}").write_text("half")
    (tmp_path / f".c.retired-{ended.pid}").mkdir()
    recover(tmp_path, "a")
    assert not (tmp_path / f".a.writing-{ended.pid}").exists() and (tmp_path / f".c.retired-{ended.pid}").exists()
    recover(tmp_path)
    kept = {".a", ".a.writing-", f".a.writing-{living}", f".b.retired-{living}"}
    assert {path.name for path in tmp_path.iterdir()} == kept | {"c"}
    recover(tmp_path, alone=True)
    assert {path.name for path in tmp_path.iterdir()} == {".a", ".a.writing-", "b", "c"}
    recover(tmp_path / "nowhere")


def test_writing_a_folder_first_mends_what_a_kill_left_of_it(tmp_path: Path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with folder_aside(tmp_path / "out") as aside:
        fill(aside, OLD)
    (tmp_path / "out").rename(tmp_path / f".out.retired-{ended.pid}")
    (tmp_path / f".out.writing-{ended.pid}").mkdir()
    with pytest.raises(RuntimeError), folder_aside(tmp_path / "out") as aside:
        raise RuntimeError("halfway")
    verify_seal(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def synced_inodes(monkeypatch: pytest.MonkeyPatch, write: Callable[[], None]) -> list[int]:
    """Inodes handed to os.fsync while `write` runs, and -1 where a name moved into place."""
    events, fsync, replace = [], os.fsync, os.replace

    def recorded(handle: int) -> None:
        events.append(os.fstat(handle).st_ino)
        fsync(handle)

    def moved(*arguments: Any) -> None:
        events.append(-1)
        replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", recorded)
        patch.setattr(durable.os, "replace", moved)
        write()
    return events


def test_a_file_is_synced_before_it_moves_and_its_folder_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    events = synced_inodes(monkeypatch, lambda: write_durably(path, NEW))
    assert events == [path.stat().st_ino, -1, tmp_path.stat().st_ino]


def test_everything_in_a_folder_is_synced_before_it_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    final = tmp_path / "step-1"

    def write() -> None:
        with folder_aside(final) as aside:
            fill(aside, NEW)
            (aside / "part" / "deep").mkdir()

    events = synced_inodes(monkeypatch, write)
    moved = len(events) - 1 - events[::-1].index(-1)
    assert {path.stat().st_ino for path in (final, *final.rglob("*"))} <= set(events[:moved])
    assert events[moved + 1 :] == [tmp_path.stat().st_ino]


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


@pytest.mark.parametrize("make", ["folder", "file"])
def test_the_name_of_every_folder_made_on_the_way_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: str
):
    """A file's fsync covers neither its own name nor those of the new folders it lies in, such as RUN/checkpoints."""
    real, durable_names = os.fsync, set()

    def fsync(handle: int) -> None:
        real(handle)
        folder = Path(os.readlink(f"/proc/self/fd/{handle}"))
        durable_names.update(folder.iterdir() if folder.is_dir() else ())

    monkeypatch.setattr(durable.os, "fsync", fsync)
    final = tmp_path / "run" / "checkpoints" / "step"
    if make == "file":
        write_durably(final, NEW)
    else:
        with folder_aside(final) as aside:
            fill(aside, NEW)
    assert {final, final.parent, final.parent.parent} <= durable_names


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
