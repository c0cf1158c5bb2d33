"""Engines in processes of their own that take turns: whoever is not in its turn is stopped.

Threads that wait awake would hold the cores, so a process is stopped (SIGSTOP) but for its turn. Each is a child of
the command itself, not of a fork server: that would outlive a command that is killed as long as a stopped child does.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from trinity.base.errors import TrinityError, out_of_memory
from trinity.bench.engines import ENGINES, seconds_of
from trinity.bench.subject import Asked, Side, random_prompt, random_requests

PROCESSES = multiprocessing.get_context("spawn")


class Worker:
    """An engine's process, asked from here. `failed` says why it has no figures, once it has none."""

    def __init__(self, side: Side, asked: Asked) -> None:
        self.side = side
        self.failed: str | None = None
        self.told: dict[str, Any] = {}  # peak memory, and the ways that it found fastest
        os.environ |= {"OMP_WAIT_POLICY": "ACTIVE" if asked.awake else "PASSIVE", "TRANSFORMERS_VERBOSITY": "error"}
        self.pipe, theirs = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=_serve, args=(theirs, side, asked), daemon=True)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to all: the command ends them
        self.process.start()
        signal.signal(signal.SIGINT, handler)
        theirs.close()
        self._answer()

    def ask(self, kind: str, *given: Any) -> Any:
        """What comes of a piece of work; None once the engine is out of the race."""
        if self.failed is not None:
            return None
        self._signal(signal.SIGCONT)
        return self._answer((kind, given))

    def _answer(self, request: tuple[str, tuple[Any, ...]] | None = None) -> Any:
        try:
            if request is not None:
                self.pipe.send(request)
            self.failed, made, self.told = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            self.failed, made = f"Its process ended with {self.process.exitcode}.", None
        self._signal(signal.SIGSTOP)
        return made

    def _signal(self, sent: signal.Signals) -> None:
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, sent)

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection, side: Side, asked: Asked) -> None:
    """The process of an engine: for each request what failed, or what was made and how much memory that took."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # with its parent: who is stopped does not see a pipe close
    torch.set_num_threads(asked.threads)
    turns = count()  # of requests: each has texts that no prefix cache has seen
    try:
        engine = ENGINES[side.engine](side, asked)
        engine.prefill(random_prompt(side.subject.config, asked.prompt))
        for batch in asked.batches:
            engine.decode(batch)
        if asked.requests:
            engine.requests(random_requests(side.subject.config, asked, next(turns)))
        made = None
        while True:
            told = {"peak_bytes": _peak_memory(asked.device), "experts_by": getattr(engine, "ways", None)}
            pipe.send((None, made, told))
            kind, given = pipe.recv()
            if kind == "prefill":
                made = given[0] / seconds_of(partial(engine.prefill, random_prompt(side.subject.config, *given)))
            elif kind == "decode":
                made = given[0] / engine.decode(*given)
            elif kind == "requests":
                requests = random_requests(side.subject.config, asked, next(turns))
                made = sum(tokens for _, tokens in requests) / engine.requests(requests)
            else:
                made = getattr(engine, kind)(*given)
    except EOFError:
        return
    except Exception as error:
        if os.environ.get("TRINITY_TRACEBACK"):
            raise
        known = out_of_memory(error) or (str(error) if isinstance(error, TrinityError) else None)
        pipe.send((known or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", None, {}))


def _peak_memory(device: str) -> int | None:
    """Bytes this process has held at most, of a GPU where it is on one; None where the system does not say."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
