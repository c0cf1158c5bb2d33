"""The hang alarm: a thread that notices when no step was finished for too long, and writes down where all stand.

A collective that waits for a dead neighbour, a file system that does not answer and a deadlock look alike from outside:
nothing happens, and nothing is logged. Work that takes long by its nature (opening data, the first step with its
compilation, an evaluation, a save) has `PATIENCE` times as long.
"""

import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

HANGS = "hangs"  # folder of a run
PATIENCE = 6.0
STEPPING = "stepping"
_SHORTEST_LOOK, _LONGEST_LOOK = 0.01, 5.0  # seconds


class HangAlarm:
    """`beat` says that something was finished; `told(seconds, doing, trace)` is called once a hang, from the thread."""

    def __init__(
        self,
        run: Path,
        rank: int,
        minutes: float,
        told: Callable[[float, str, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._rank, self._limit, self._told, self._clock = run / HANGS, rank, 60 * minutes, told, clock
        self._lock = threading.Lock()
        self._last, self._doing, self._spoken = clock(), "opening", False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang alarm", daemon=True)

    def start(self) -> None:
        if self._limit:
            self._thread.start()

    def close(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * _LONGEST_LOOK)

    def beat(self, doing: str) -> None:
        with self._lock:
            self._last, self._doing, self._spoken = self._clock(), doing, False

    def check(self) -> bool:
        """Whether a hang was found, and told, just now."""
        with self._lock:
            silent, doing = self._clock() - self._last, self._doing
            limit = self._limit * (1.0 if doing == STEPPING else PATIENCE)
            if self._spoken or not self._limit or silent < limit:
                return False
            self._spoken = True
        self._told(silent, doing, self._dump())
        return True

    def _watch(self) -> None:
        while not self._ended.wait(min(max(self._limit / 4, _SHORTEST_LOOK), _LONGEST_LOOK)):
            self.check()

    def _dump(self) -> str:
        """Write the stack of every thread; where to, for a sentence."""
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        path = self._folder / f"rank-{self._rank}-{moment}.txt"
        try:
            self._folder.mkdir(exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
            return f"the log ({path} was refused: {error.strerror})"
        return str(path)
