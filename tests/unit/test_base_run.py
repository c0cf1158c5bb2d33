"""The log of a run through a disk that is full for a while: no line is lost, none is half, and one refusal is told."""

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity.base import run as run_folder
from trinity.base.durable import write_durably
from trinity.base.errors import StorageError
from trinity.base.run import METRICS, MetricsLog, read_lines


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: the system takes a part of a line, and refuses the rest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_lines(folder / METRICS)]


def test_lines_that_a_disk_refuses_follow_when_it_takes_them(tmp_path: Path):
    told: list[tuple[int, str, str]] = []
    log = MetricsLog(tmp_path, 0, refused=lambda *what: told.append(what))
    log.write("step", 1, loss=1 / 3)
    size = (tmp_path / METRICS).stat().st_size
    with full_after(size + 10):
        for step in (2, 3, 4):
            log.write("step", step, loss=1 / 3)
            assert (tmp_path / METRICS).stat().st_size == size, "no half line stays"
    assert steps(tmp_path) == [1]
    log.write("step", 5, loss=1 / 3)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    ((step, what, action),) = told
    assert step == 2 and METRICS in what and "in memory" in action
    with full_after(10):
        log.write("step", 6)
        log.close()
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert [step for step, _, _ in told] == [2, 6, 6] and "without the last lines of the log, 1 of them" in told[-1][2]


def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_folder, "WAITING", 3)
    log = MetricsLog(tmp_path, 0, refused=lambda *_: None)
    with full_after(10):
        for step in range(9):
            log.write("step", step)
    log.close()
    assert steps(tmp_path) == [6, 7, 8]


def test_a_log_that_nobody_looks_after_refuses(tmp_path: Path):
    log = MetricsLog(tmp_path, 0)
    with full_after(10), pytest.raises(OSError, match="File too large"):
        log.write("step", 1)
    log.close()
    assert steps(tmp_path) == [1]


def test_a_log_that_somebody_empties_meanwhile_has_no_hole(tmp_path: Path):
    log = MetricsLog(tmp_path, 0, refused=lambda *_: None)
    log.write("step", 1)
    with full_after(30):
        log.write("step", 2)
    (tmp_path / METRICS).write_text("")
    log.write("step", 3)
    assert (tmp_path / METRICS).read_bytes().count(b"\0") == 0 and steps(tmp_path) == [2, 3]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sampled_from(["step", "guard"])),
        st.tuples(st.just("room"), st.integers(0, 120)),
        st.tuples(st.just("room"), st.none()),
        st.tuples(st.just("take back"), st.integers(0, 3)),
    ),
    max_size=40,
)


@given(OPERATIONS)
def test_read_back_the_log_is_all_lines_in_their_order(operations: list[tuple[str, object]]):
    room: list[int | None] = [None]
    real = os.write

    def write(handle: int, data: memoryview) -> int:
        if room[0] is None:
            return real(handle, data)
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(handle, data[: room[0]])
        room[0] -= written
        return written

    def replace(path: Path, content: bytes) -> None:
        if room[0] is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_durably(path, content)

    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder.os, "write", write)
        patch.setattr(run_folder, "write_durably", replace)
        folder, step, rows, said, wanted = Path(name), 0, 0, [], []
        room[0] = None
        with closing(MetricsLog(folder, 0, refused=lambda *what: said.append(what))) as log:
            for what, value in operations:
                if what == "room":
                    room[0] = value  # type: ignore[assignment]
                elif what == "write":
                    step, rows = step + 1, rows + 1
                    log.write(str(value), step, text="naïve")
                    wanted.append({"kind": value, "step": step, "text": "naïve"})
                else:
                    step = max(0, step - int(value))  # type: ignore[call-overload]
                    marked = [line | {"left_at": line.get("left_at", rows)}
                              if line["step"] > step and line["kind"] == "guard" else line
                              for line in wanted]  # fmt: skip
                    if rows % 2:  # a roll-back marks first; what it could not mark then it marks when it drops
                        log.leave(step, rows)
                    log.roll_back(step, rows)
                    wanted = [line for line in marked if line["step"] <= step or "left_at" in line]
                written = (folder / METRICS).read_text()
                assert not written or written.endswith("\n")
                found = [json.loads(line) for line in written.splitlines()]
                assert found == wanted[: len(found)]
                assert found == wanted or room[0] is not None or what == "room"
            room[0] = None
        assert list(read_lines(folder / METRICS)) == wanted
        assert all("disk is full" in what for _, what, _ in said)


def test_an_error_at_the_end_is_one_of_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = MetricsLog(tmp_path, 0)
    monkeypatch.setattr(run_folder.os, "write", full)
    with pytest.raises(StorageError, match="The disk is full"):
        log.write("step", 1)
