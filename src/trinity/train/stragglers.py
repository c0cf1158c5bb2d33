"""Which process slows the others down. In a synchronous step all wait for the slowest, so the step's time names nobody.

Every `probe_every` steps each process times work of its own that needs no other: the same small matrix products on its
device, and what its data loading took since the last probe. The times are gathered; who is slower than `factor` times
the median in several probes in a row is named. A clock throttled by heat, a neighbour on the same core or a sick disk
shows so, at no cost between probes. What peers do, and why not that: docs/adr/0016.
"""

import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from trinity.parallel.mesh import World

IN_A_ROW = 3  # probes; a single slow one is an accident
_LEAST_LOADING = 0.05  # of the step's time: loading that takes less slows nobody down
_REPEATS = 5  # the fastest counts: it is the machine's own speed
_WIDTHS = {"cpu": 192, "cuda": 2048}  # ~0.2 ms on one core, ~0.1 ms on a data-centre GPU: next to no share of 50 steps


class Probe:
    """Seconds that the same products take on this device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        width = _WIDTHS.get(device.type, 192)
        self._matrix = torch.full((width, width), 1.0 / width, device=device)
        self._out = torch.empty_like(self._matrix)

    def __call__(self) -> float:
        return min(self._once() for _ in range(_REPEATS))

    def _once(self) -> float:
        self._wait()
        started = time.perf_counter()
        torch.mm(self._matrix, self._matrix, out=self._out)
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Stragglers:
    """Every process feeds its own and hears the same sentences. Alone there is nobody to be slower than."""

    def __init__(
        self, world: World, every: int, factor: float, probe: Callable[[], float] | None = None, host: str | None = None
    ) -> None:
        self._world, self._factor = world, factor
        self._every = every if world.size > 1 else 0
        self._steps, self._loading, self._stepping = 0, 0.0, 0.0
        self._in_a_row = {"computes": [0] * world.size, "loads data": [0] * world.size}
        self._host, self._hosts = host or socket.gethostname(), []
        if self._every:
            self._probe = probe or Probe(world.device)

    def observe(self, loading: float, stepping: float) -> list[str]:
        """Take one step's own seconds of loading, and of all; sentences on those found slow, mostly none."""
        if not self._every:
            return []
        self._steps += 1
        self._loading += loading
        self._stepping += stepping
        if self._steps % self._every:
            return []
        self._hosts = self._hosts or self._hosts_of_all()
        times = torch.zeros(self._world.size, 3, dtype=torch.float64)
        times[self._world.rank] = torch.tensor([self._probe(), self._loading, self._stepping], dtype=torch.float64)
        self._world.sum(times)
        self._loading = self._stepping = 0.0
        worth = _LEAST_LOADING * float(times[:, 2].max())
        return self._judge("computes", times[:, 0].tolist(), 0.0) + self._judge(
            "loads data", times[:, 1].tolist(), worth
        )

    def _hosts_of_all(self) -> list[str]:
        hosts: list[Any] = [None] * self._world.size
        dist.all_gather_object(hosts, self._host)
        return hosts

    def _judge(self, what: str, seconds: list[float], worth: float) -> list[str]:
        # The lower median: of two processes the faster one is the measure.
        median, found, row = statistics.median_low(seconds), [], self._in_a_row[what]
        for rank, own in enumerate(seconds):
            slow = own > self._factor * median and own > worth
            row[rank] = row[rank] + 1 if slow else 0
            if row[rank] == IN_A_ROW:  # told once, until it was fast again
                found.append(
                    f"rank {rank} on {self._hosts[rank]} {what} {own / max(median, 1e-9):.1f} times slower than the "
                    f"median, in {IN_A_ROW} probes in a row"
                )
        return found
