"""heartbeat.json: what a run is doing right now, for monitors outside. A disk that refuses it stops nothing.

Replaced as a whole, so a reader never sees half of it, but not synced: after a power cut the metrics tell the story.
On a full disk it is written over in place instead, so that it goes on to tell, and how the run ended above all.
Its "seconds" grow old when the run hangs or was killed, which is what a monitor should look at.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trinity.base.run import HEARTBEAT

_SHORTEST = 1.0  # seconds between two of them, unless what the run is doing changed


class Heartbeat:
    def __init__(
        self, run: Path, world_size: int, say: Callable[[str], None], clock: Callable[[], float] = time.time
    ) -> None:
        self.path, self._say, self._clock = run / HEARTBEAT, say, clock
        self._fixed = {"run": run.resolve().name, "host": socket.gethostname(), "pid": os.getpid()}
        self._fixed["world_size"] = world_size
        self._values: dict[str, Any] = {"state": "running", "doing": "starting", "reason": ""}
        self._written = -_SHORTEST
        self._refused = False

    def beat(self, **values: Any) -> None:
        """Take note of `values`; write them when the last writing is a while ago or "doing" or "state" changed."""
        changed = any(values.get(key, self._values[key]) != self._values[key] for key in ("doing", "state"))
        self._values |= values
        now = self._clock()
        if not changed and 0 <= now - self._written < _SHORTEST:
            return
        self._written = now
        written = {**self._fixed, **self._values, "seconds": now, "time": _iso(now)}
        aside = self.path.with_name(f".{self.path.name}.writing-{os.getpid()}")
        text = json.dumps(written) + "\n"
        try:
            aside.write_text(text)
            os.replace(aside, self.path)
        except OSError as error:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            if not self._overwritten(text.encode()) and not self._refused:
                self._refused = True
                self._say(
                    f"The heartbeat {self.path} cannot be written ({error.strerror}); the run goes on without it."
                )

    def _overwritten(self, text: bytes) -> bool:
        """Whether the file could be written over where it lies, in one call: its own space is there on a full disk."""
        try:
            with self.path.open("r+b", buffering=0) as file:
                text = text.ljust(os.fstat(file.fileno()).st_size)
                return file.write(text) == len(text)
        except OSError:
            return False


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
