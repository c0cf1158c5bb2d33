"""What tests of several processes stand on: a death is told with its stacks, and a second start is in the report."""

import os
import signal
from pathlib import Path

import pytest
import worlds
from torch.multiprocessing import ProcessExitedException
from worlds import in_processes


def die(mark: Path, times: int) -> None:
    """Die of a segmentation fault, the first so many times."""
    before = len(list(mark.iterdir()))
    if before < times:
        (mark / str(before)).touch()
        os.kill(os.getpid(), signal.SIGSEGV)


def test_a_world_that_dies_once_is_started_again_and_told(tmp_path: Path):
    in_processes(1, die, tmp_path, 1)
    (told,) = worlds.started_again
    worlds.started_again.clear()  # on purpose: nothing for the report
    assert told.startswith("die: ") and "SIGSEGV" in told
    assert "test_worlds.py" in told and " in die" in told, "where Python stood"


def test_a_world_that_dies_again_fails_with_its_stacks(tmp_path: Path):
    with pytest.raises(ProcessExitedException) as caught:
        in_processes(1, die, tmp_path, 2)
    worlds.started_again.clear()
    assert "Segmentation fault" in caught.value.__notes__[0] and " in die" in caught.value.__notes__[0]
