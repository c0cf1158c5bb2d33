"""Which process slows the others down. In a synchronous step all wait for the slowest, so the step's time names nobody.

Each process adds up what its steps take on its own (own_time.py) and what its data takes. Every `probe_every` steps the
sums are gathered; who is slower than `factor` times the median in several probes in a row, and by enough to hold up the
run, is named. Steps as a whole are counted and none of them is picked, so a neighbour on the same core, a quota or swap
cannot fall between two samples. What peers do, and why not that: docs/adr/0016.

A slow link makes all wait alike, so it names nobody either. It shows where steps take `factor` times as long as in the
quickest probe of the phase, and even who waits least waits longer by nearly all of the difference.
"""

import math
import socket
import statistics
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from trinity.parallel.mesh import World
from trinity.train.own_time import Meter, Own, meter_for

IN_A_ROW = 3  # probes; a single slow one is an accident
_WORTH = 0.05  # of the step's time: who is behind by less slows nobody down
_OF_THE_LINK = 0.75  # of what steps became longer; less is of processes that compute longer too


class _Probe(NamedTuple):
    """Seconds of one process between two probes: of its own, in collectives, of loading, of all."""

    own: Own
    loading: float
    stepping: float


class Stragglers:
    """Every process feeds its own and hears the same sentences. Alone there is nobody to be slower than."""

    def __init__(
        self, world: World, every: int, factor: float, meter: Meter | None = None, host: str | None = None
    ) -> None:
        self._world, self._factor = world, factor
        self._every = every if world.size > 1 else 0
        self._steps, self._loading, self._stepping = 0, 0.0, 0.0
        self._in_a_row = {"own": [0] * world.size, "loading": [0] * world.size}
        self._host, self._hosts = host or socket.gethostname(), []
        self._meter = (meter or meter_for(world.device)) if self._every else None
        self._turned, self._quickest = True, (math.inf, 0.0)  # seconds of the quickest probe of the phase, least wait
        self._long_waits = 0  # probes in a row

    def open(self) -> None:
        if self._meter:
            self._meter.open()

    def close(self) -> None:
        if self._meter:
            self._meter.close()

    def turn_phase(self) -> None:
        """Steps may take another time from here on. The probe in which that happens is no measure for those after."""
        self._turned = True

    def begin(self) -> None:
        """The data of a step is here: from now on this process computes and waits."""
        if self._meter:
            self._meter.begin()

    def observe(self, loading: float, stepping: float) -> list[str]:
        """Take one step's own seconds of loading, and of all; sentences on those found slow, mostly none."""
        if not self._meter:
            return []
        self._meter.stepped(stepping - loading)
        self._steps += 1
        self._loading += loading
        self._stepping += stepping
        if self._steps % self._every:
            return []
        self._hosts = self._hosts or self._hosts_of_all()
        probes = self._gathered(_Probe(self._meter.taken(), self._loading, self._stepping))
        self._loading = self._stepping = 0.0
        return self._slow_themselves(probes, self._meter) + self._slow_to_load(probes) + self._slow_link(probes)

    def _gathered(self, own: _Probe) -> list[_Probe]:
        table = torch.zeros(self._world.size, 6, dtype=torch.float64)
        table[self._world.rank] = torch.tensor([*own.own, own.loading, own.stepping], dtype=torch.float64)
        return [_Probe(Own(*row[:4]), *row[4:]) for row in self._world.sum(table).tolist()]

    def _hosts_of_all(self) -> list[str]:
        hosts: list[Any] = [None] * self._world.size
        dist.all_gather_object(hosts, self._host)
        return hosts

    def _slow_themselves(self, probes: list[_Probe], meter: Meter) -> list[str]:
        worth = _worth(probes) if meter.of_the_step else 0.0
        found = self._slower("own", [probe.own.seconds for probe in probes], worth)
        return [
            f"{self._named(rank, meter.verb, times)}{_spent(probes[rank].own, self._every)}" for rank, times in found
        ]

    def _slow_to_load(self, probes: list[_Probe]) -> list[str]:
        found = self._slower("loading", [probe.loading for probe in probes], _worth(probes))
        return [self._named(rank, "loads data", times) for rank, times in found]

    def _slow_link(self, probes: list[_Probe]) -> list[str]:
        seconds, wait = max(probe.stepping for probe in probes), min(probe.own.waiting for probe in probes)
        if self._turned:
            self._turned, self._quickest = False, (math.inf, 0.0)
            return []
        quickest, waited = self._quickest
        self._quickest = min(self._quickest, (seconds, wait))
        longer = seconds > self._factor * quickest and wait - waited > _OF_THE_LINK * (seconds - quickest)
        slow = longer and not _crowded(probes)
        self._long_waits = self._long_waits + 1 if slow else 0
        if self._long_waits != IN_A_ROW:
            return []
        return [
            f"a link seems slow, it is not known whose: steps take {seconds / quickest:.1f} times as long as they did, "
            f"and who waits least waits {wait / self._every:.2f} s of each instead of {waited / self._every:.2f} s, in "
            f"{IN_A_ROW} probes in a row"
        ]

    def _slower(self, what: str, seconds: list[float], worth: float) -> list[tuple[int, float]]:
        """Ranks that were slow often enough just now, and how many times slower than the median they are."""
        # The lower median: of two processes the faster one is the measure.
        median, found, row = statistics.median_low(seconds), [], self._in_a_row[what]
        for rank, own in enumerate(seconds):
            slow = own > self._factor * median and own - median > worth
            row[rank] = row[rank] + 1 if slow else 0
            if row[rank] == IN_A_ROW:  # told once, until it was fast again
                found.append((rank, own / max(median, 1e-9)))
        return found

    def _named(self, rank: int, verb: str, times: float) -> str:
        return (
            f"rank {rank} on {self._hosts[rank]} {verb} {times:.1f} times slower than the median, in {IN_A_ROW} "
            "probes in a row"
        )


def _worth(probes: list[_Probe]) -> float:
    return _WORTH * max(probe.stepping for probe in probes)


def _crowded(probes: list[_Probe]) -> bool:
    """Whether most processes lack a processor for half of their own time, so that they are late for each other."""
    ready = statistics.median_low(probe.own.ready for probe in probes)
    return ready > statistics.median_low(probe.own.seconds for probe in probes) / 2


def _spent(own: Own, steps: int) -> str:
    """Where the time of a process went that is slow by itself, as far as the system tells."""
    if math.isnan(own.ready):
        return ""
    whole = max(own.seconds, own.running + own.ready)
    running, ready = own.running / whole, own.ready / whole
    return (
        f"; of its {own.seconds / steps:.2f} s a step it had a processor for {running:.0%}, was ready without one for "
        f"{ready:.0%} and neither for {max(0.0, 1 - running - ready):.0%}"
    )
