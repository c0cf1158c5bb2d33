"""Telling a person: every alarm goes, as one JSON object, to a command of the user and to a webhook.

    kind run step tokens sentence action host rank time held_back text      ("text" alone is what chat services show)

The command is `train.alarm_command`, without a shell. The webhook's address is a secret, so it comes from the
environment variable TRINITY_ALARM_WEBHOOK and appears in no file, log or error. Both are best effort: they run in a
thread of their own, in bounded time, and a failure is said once and stops nothing.
"""

import json
import logging
import os
import queue
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from trinity.base.errors import ConfigError, UsageError

WEBHOOK = "TRINITY_ALARM_WEBHOOK"
_WAITING = 100  # alarms that wait to be sent; more are dropped


class Alarm(NamedTuple):
    kind: str  # spike, non-finite, router, replicas, straggler, hang, crash, halt, storage or test
    sentence: str
    action: str  # what the run did about it
    run: str
    step: int
    tokens: int
    host: str
    rank: int
    time: str  # UTC, ISO 8601

    def written(self, held_back: int) -> bytes:
        held = f" ({held_back} more of this kind were held back)" if held_back else ""
        text = f"[{self.kind}] {self.run}, step {self.step}: {self.sentence} -> {self.action}{held}"
        return (json.dumps({**self._asdict(), "held_back": held_back, "text": text}) + "\n").encode()


class Channel(NamedTuple):
    """A way to send. `send` returns what went wrong, or an empty text."""

    name: str
    send: Callable[[bytes], str]


def channels(command: str, environment: dict[str, str] | None = None) -> list[Channel]:
    """What is configured. A ConfigError for a command that is not there, a UsageError for an address that is none."""
    found = []
    if command.strip():
        found.append(Channel("train.alarm_command", Command(command)))
    address = (os.environ if environment is None else environment).get(WEBHOOK, "").strip()
    if address:
        found.append(Channel("the webhook", Webhook(address)))
    return found


class Command:
    def __init__(self, line: str, timeout: float = 30.0) -> None:
        try:
            self._words = shlex.split(line)
        except ValueError as error:
            raise ConfigError(
                f"train.alarm_command cannot be split into words: {error}.", "Quote it as for a shell."
            ) from error
        if not self._words or shutil.which(self._words[0]) is None:
            raise ConfigError(
                f"train.alarm_command names '{self._words[0] if self._words else ''}', which is no program here.",
                "Give a program in PATH or a path to one; a shell's words need sh -c '...'.",
            )
        self._timeout = timeout

    def __call__(self, message: bytes) -> str:
        try:
            process = subprocess.Popen(
                self._words,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # so that what it started ends with it
            )
        except OSError as error:
            return f"it cannot be started: {error.strerror}"
        try:
            process.communicate(message, timeout=self._timeout)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return f"it did not end within {self._timeout:g} s"
        return f"it ended with exit code {process.returncode}" if process.returncode else ""


class Webhook:
    def __init__(
        self, address: str, timeout: float = 10.0, attempts: int = 3, pause: Callable[[float], object] = time.sleep
    ) -> None:
        try:
            url = httpx.URL(address)
            valid = url.scheme in ("http", "https") and bool(url.host)
        except httpx.InvalidURL:
            valid = False
        if not valid:
            raise UsageError(f"{WEBHOOK} is not an http or https address.", "Set it to the whole address, or unset it.")
        self._address, self._timeout, self._attempts, self._pause = address, timeout, attempts, pause
        for name in ("httpx", "httpcore"):  # at INFO they log the address of every request
            logging.getLogger(name).setLevel(logging.WARNING)

    def __call__(self, message: bytes) -> str:
        problem = ""
        for attempt in range(self._attempts):
            if attempt:
                self._pause(2.0**attempt)
            try:
                answer = httpx.post(
                    self._address,
                    content=message,
                    headers={"Content-Type": "application/json"},
                    timeout=self._timeout,
                )
            except Exception as error:  # its text may name the address; any failure must stay here
                problem = f"it could not be reached ({type(error).__name__})"
                continue
            if answer.is_success:
                return ""
            problem = f"it answered {answer.status_code}"
            if answer.status_code < 500 and answer.status_code not in (408, 429):
                break
        return problem


class Pager:
    """Sends alarms, each kind at most once in `quiet_minutes`; those held back are counted in the next one.

    memory: a folder in which this is remembered when a launcher starts the process again.
    """

    def __init__(
        self,
        ways: list[Channel],
        quiet_minutes: float,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,  # of Linux: one for all processes since the machine was started
        memory: Path | None = None,
    ) -> None:
        self._ways, self._quiet, self._say, self._clock = ways, 60 * quiet_minutes, say, clock
        self._memory = memory and memory / "trinity-told.json"
        self._sent: dict[str, float] = {}
        self._held: dict[str, int] = {}
        if self._memory is not None:
            with suppress(OSError, ValueError):
                self._sent, self._held = json.loads(self._memory.read_text())
        self._complained: set[str] = set()
        self._lock = threading.Lock()  # a hang is told from another thread
        self._queue: queue.Queue[bytes | None] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None

    def tell(self, alarm: Alarm, at_once: bool = False) -> bool:
        """Send in the background; whether it was neither held back nor dropped because too many wait.

        at_once: never held back.
        """
        if not self._ways:
            return False
        with self._lock:
            now = self._clock()
            last = self._sent.get(alarm.kind)
            if last is not None and now - last < self._quiet and not at_once:
                self._held[alarm.kind] = self._held.get(alarm.kind, 0) + 1
                self._remember()
                return False
            self._sent[alarm.kind] = now
            message = alarm.written(self._held.pop(alarm.kind, 0))
            self._remember()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="pager", daemon=True)
                self._thread.start()
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            return False
        return True

    def close(self, seconds: float = 60.0) -> None:
        """Wait for what is under way, but not for ever."""
        if self._thread is None:
            return
        with suppress(queue.Full):
            self._queue.put(None, timeout=seconds)
        self._thread.join(timeout=seconds)
        self._thread = None

    def _remember(self) -> None:
        if self._memory is not None:
            aside = self._memory.with_name(f".{self._memory.name}.writing-{os.getpid()}")
            with suppress(OSError):
                aside.write_text(json.dumps([self._sent, self._held]))
                os.replace(aside, self._memory)

    def _work(self) -> None:
        while (message := self._queue.get()) is not None:
            for way in self._ways:
                try:
                    self._send(way, message)
                except Exception:  # say has nowhere to write, most likely; alarms to come must still go out
                    continue

    def _send(self, way: Channel, message: bytes) -> None:
        try:
            problem = way.send(message)
        except Exception as error:  # a way is foreign code; its text may hold a secret
            problem = f"it failed ({type(error).__name__})"
        if problem and way.name not in self._complained:
            self._complained.add(way.name)
            self._say(f"An alarm was not delivered by {way.name}: {problem}. The run goes on.")


def ring(alarm: Alarm, ways: list[Channel]) -> dict[str, Any]:
    """Send one alarm by every way, here and now: {name of the way: what went wrong, or ""}."""
    return {way.name: way.send(alarm.written(0)) for way in ways}
