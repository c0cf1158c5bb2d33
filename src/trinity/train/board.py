"""Events for TensorBoard. A convenience: when they cannot be written the run says so once and goes on without them.

Written here and now, not by SummaryWriter, whose own thread dies of a full disk and takes the run with it.
"""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary


class Board:
    """One event file in `folder`. After a resume at a step, viewers drop what an earlier file says of later steps."""

    def __init__(self, folder: Path | None, resume_step: int, say: Callable[[str], None]) -> None:
        """folder: None writes nothing, as the processes do that do not keep a run's log."""
        self.say = say
        self._file: BinaryIO | None = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
            self._file = (folder / name).open("wb")
        except OSError as error:
            self._give_up(error)
        self._write(Event(file_version="brain.Event:2"))
        self.purge(resume_step)

    def purge(self, step: int) -> None:
        """Let viewers drop what was said of the steps after `step`: they are run again."""
        if step:
            self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def scalar(self, name: str, value: float, step: int) -> None:
        self._write(Event(step=step, summary=summary.scalar(name, value)))

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        self._write(Event(step=step, summary=summary.histogram(name, values, bins="auto")))

    def text(self, name: str, text: str, step: int) -> None:
        self._write(Event(step=step, summary=summary.text(name, text)))

    def close(self) -> None:
        file, self._file = self._file, None
        if file:
            try:
                file.close()
            except OSError as error:
                self._give_up(error)

    def _write(self, event: Event) -> None:
        if self._file is None:
            return
        event.wall_time = time.time()
        try:
            RecordWriter(self._file).write(event.SerializeToString())
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.say(f"TensorBoard events cannot be written ({error.strerror}); the run goes on without them.")
        file, self._file = self._file, None
        if file:
            with suppress(OSError):  # closing flushes once more, and fails once more
                file.close()
