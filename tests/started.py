"""Real processes, forked from one that has loaded torch already and done nothing else: seconds less for each."""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORKED = multiprocessing.get_context("forkserver")
LOADED = ["torch", "trinity.cli.main", "trinity.train.loop", "trinity.train.saver"]
SECONDS = 240


@dataclass(frozen=True)
class Ended:
    returncode: int  # as subprocess has it: minus the signal of a process that was killed
    stdout: str
    stderr: str


class Started:
    """function(*arguments) in a process of its own, as main program: it ends with what the function returns.

    Killed at the end of the `with`. The function must be importable: a module's, not a test's inner one.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, **environment: str) -> None:
        FORKED.set_forkserver_preload(LOADED)
        self.said = tempfile.TemporaryDirectory(prefix="started-")
        given = (self.said.name, os.environ | environment, function, arguments)
        self.process = FORKED.Process(target=_enter, args=given)
        self.process.start()

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.said.cleanup()

    def runs(self) -> bool:
        return self.process.is_alive()

    def send(self, sent: signal.Signals) -> None:
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, sent)

    def wait_for(self, moment: Callable[[], bool], seconds: float = SECONDS) -> bool:
        """Whether the moment came while it ran."""
        end = time.monotonic() + seconds
        while self.runs():
            if moment():
                return True
            assert time.monotonic() < end, f"nothing came within {seconds} s"
            time.sleep(0.001)
        return False

    def ended(self, seconds: float = SECONDS) -> Ended:
        """Wait for its end."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"it did not end within {seconds} s"
        return Ended(self.process.exitcode, *(Path(self.said.name, name).read_text() for name in ("out", "err")))


def trinity(*arguments: str, **environment: str) -> Ended:
    """`trinity arguments`, to its end."""
    with starting_trinity(*arguments, **environment) as command:
        return command.ended()


def starting_trinity(*arguments: str, **environment: str) -> Started:
    return Started(_trinity, arguments, **environment)


def _trinity(arguments: tuple[str, ...]) -> int:
    from trinity.cli.main import main

    return main(list(arguments))


def _enter(said: str, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    for name, number in (("out", 1), ("err", 2)):
        with Path(said, name).open("a") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()  # the server knows the environment it was started in
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job may ignore
    sys.argv = ["trinity"]
    sys.exit(function(*arguments))
