"""What a process spends on its own: all of a step but its data and its waits for other processes.

In synchronous training every process has the same step time; the slow one is the one that waits least. What holds it up
(a neighbour, a quota, steal, heat, memory, swap) makes no difference: all of it is time outside collectives. On a GPU
the host's waits say nothing about the device, so there small products are timed on the device itself.
"""

import math
import statistics
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

_WIDTH = 2048  # of the products on a GPU: ~0.2 ms of a data-centre GPU a step


class Own(NamedTuple):
    """Of one process between two probes. What is not known is NaN."""

    seconds: float
    running: float = math.nan  # of these: on a processor
    ready: float = math.nan  # of these: ready to run, but without a processor
    waiting: float = math.nan  # beside these: in collectives


class Meter(Protocol):
    verb: str  # what a process does too slowly, for a sentence
    of_the_step: bool  # whether its seconds are a part of the step's time

    def open(self) -> None: ...
    def close(self) -> None: ...

    def begin(self) -> None:
        """The data of a step is here."""
        ...

    def stepped(self, seconds: float) -> None:
        """The step is done, `seconds` after its data was here."""
        ...

    def taken(self) -> Own:
        """What was measured since the last call."""
        ...


def meter_for(device: torch.device) -> Meter:
    return Products(device) if device.type == "cuda" else OwnTime()


class OwnTime:
    """Of a process that computes on CPUs: wall time outside collectives, and how much of it the system let it run.

    Every collective of a step ends in `Work.wait`, called from Python by torch.distributed and by FSDP2; while this is
    open, the waits of the thread that opened it are timed. Two looks at a clock each, beside a message to others.
    """

    verb, of_the_step = "computes", True

    def __init__(self) -> None:
        self._thread, self._waited = threading.get_ident(), 0.0
        self._began, self._sum = (0.0, 0.0, 0.0), torch.zeros(4, dtype=torch.float64)

    def open(self) -> None:
        self._untimed = untimed = dist.Work.wait

        def wait(work: dist.Work, *arguments: Any, **named: Any) -> bool:
            started = time.perf_counter()
            try:
                return untimed(work, *arguments, **named)
            finally:
                if threading.get_ident() == self._thread:  # saves wait in threads of their own, beside the steps
                    self._waited += time.perf_counter() - started

        dist.Work.wait = wait  # pyright: ignore[reportAttributeAccessIssue]

    def close(self) -> None:
        dist.Work.wait = self._untimed

    def begin(self) -> None:
        self._began = self._now()

    def stepped(self, seconds: float) -> None:
        waited, ran, ready = (now - then for now, then in zip(self._now(), self._began, strict=True))
        self._sum += torch.tensor([seconds - waited, ran, ready, waited], dtype=torch.float64)

    def taken(self) -> Own:
        taken = Own(*self._sum.tolist())
        self._sum.zero_()
        return taken

    def _now(self) -> tuple[float, float, float]:
        return self._waited, time.thread_time(), _seconds_ready()


def _seconds_ready() -> float:
    """Seconds for which this thread was ready to run and got no processor; NaN where the kernel does not count them."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return math.nan


class Products:
    """Of a GPU: the median of single products, one at the end of each step, timed by events of the device.

    At the end of a step the GPU is as hot as the step made it. The events are read a probe later, so nobody waits.
    """

    verb, of_the_step = "multiplies matrices", False

    def __init__(self, device: torch.device) -> None:
        self._matrix = torch.full((_WIDTH, _WIDTH), 1.0 / _WIDTH, device=device, dtype=torch.bfloat16)
        self._out, self._events = torch.empty_like(self._matrix), []

    def open(self) -> None: ...
    def close(self) -> None: ...
    def begin(self) -> None: ...

    def stepped(self, seconds: float) -> None:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        torch.mm(self._matrix, self._matrix, out=self._out)
        last.record()
        self._events.append((first, last))

    def taken(self) -> Own:
        self._events[-1][1].synchronize()
        milliseconds = [first.elapsed_time(last) for first, last in self._events]
        self._events.clear()
        return Own(statistics.median(milliseconds) / 1e3)
