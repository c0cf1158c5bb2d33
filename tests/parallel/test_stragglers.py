"""Two processes, one of which is slow by its own time or its data: both hear who it is. No real time is judged, except
that a process beside a busy neighbour, or one that sleeps, is slower than one that is not."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from steps import small
from worlds import in_processes

from trinity.config.train import TrainConfig
from trinity.parallel.mesh import World, layout, world_of
from trinity.recipes.table import recipe
from trinity.train.duties import Progress
from trinity.train.loop import train
from trinity.train.own_time import Own
from trinity.train.stragglers import IN_A_ROW, Stragglers
from trinity.train.watch import Watch

SIZE, EVERY = 2, 4
PHASE = recipe("debug").course[0]


def _as_rank(folder: Path, body: Callable) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=SIZE)
    try:
        world = world_of(layout(recipe("debug"), SIZE), rank, torch.device("cpu"))
        torch.save(body(world, folder), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_two(folder: Path, body: Callable) -> list:
    """What `body(world, folder)` returns on each of two processes."""
    in_processes(SIZE, _as_rank, folder, body, seconds=100)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(SIZE)]


class Given:
    """A meter that reads what it is given, one reading a probe."""

    verb, of_the_step = "computes", True

    def __init__(self, reading: Callable[[int], Own]) -> None:
        self.reading, self.probes = reading, 0

    def open(self) -> None: ...
    def close(self) -> None: ...
    def begin(self) -> None: ...
    def stepped(self, seconds: float) -> None: ...

    def taken(self) -> Own:
        self.probes += 1
        return self.reading(self.probes)


def heard(world: World, meter: Given, steps: int, stepping: Callable[[int], float] = lambda step: 1.0) -> dict:
    """What is said after each step of `stepping(step)` seconds, where anything is."""
    stragglers = Stragglers(world, EVERY, 1.5, meter, host=f"host{world.rank}")
    return {step: said for step in range(1, steps + 1) if (said := stragglers.observe(0.0, stepping(step)))}


def probed(world: World, folder: Path) -> dict:
    """Rank 1 needs 3 times as long from the third probe to the eighth, and is quick again for two."""

    def reading(probe: int) -> Own:
        slow = world.rank == 1 and (3 <= probe <= 8 or probe > 10)
        return Own(3.0, 0.9, 1.8) if slow else Own(1.0, 0.9, 0.1)

    meter = Given(reading)
    return {"heard": heard(world, meter, 56), "probes": meter.probes}


def test_a_process_that_is_slow_in_several_probes_is_named_once_on_all(tmp_path):
    first, second = on_two(tmp_path, probed)
    sentence = (
        "rank 1 on host1 computes 3.0 times slower than the median, in 3 probes in a row; of its 0.75 s a step it had "
        "a processor for 30%, was ready without one for 60% and neither for 10%"
    )
    assert first == second
    assert first["heard"] == {EVERY * (2 + IN_A_ROW): [sentence], EVERY * (10 + IN_A_ROW): [sentence]}
    assert first["probes"] == 56 // EVERY, "between probes nothing is gathered"


def behind_by_little(world: World, folder: Path) -> dict:
    return heard(world, Given(lambda probe: Own(0.3 if world.rank == 1 else 0.15)), 40)


def test_a_process_that_is_slow_in_a_small_part_of_the_step_holds_nobody_up(tmp_path):
    assert on_two(tmp_path, behind_by_little) == [{}, {}]


def with_a_slow_link(world: World, folder: Path) -> list:
    """From the fifth probe on steps are 3 times as long: by waits; by waits and work; by waits on crowded cores."""

    def reading(late: Own) -> Callable[[int], Own]:
        return lambda probe: late if probe > 4 else Own(3.0, 2.9, 0.1, 1.0 + world.rank)

    cases = (Own(3.5, 2.9, 0.1, 8.5), Own(6.0, 5.9, 0.1, 6.0), Own(3.5, 1.0, 2.5, 8.5))
    return [heard(world, Given(reading(late)), 40, lambda step: 3.0 if step > 16 else 1.0) for late in cases]


def test_a_slow_link_is_told_when_all_wait_longer_and_none_computes_longer(tmp_path):
    for link, work, crowd in on_two(tmp_path, with_a_slow_link):
        (step, (sentence,)), *more = link.items()
        assert not more and step == EVERY * (4 + IN_A_ROW)
        assert sentence.startswith("a link seems slow, it is not known whose: steps take 3.0 times as long")
        assert work == crowd == {}


def loading(world: World, folder: Path) -> list:
    """Rank 0 waits for its data; of next to nothing, and then of a fifth of the step."""
    stragglers = Stragglers(world, EVERY, 1.5, Given(lambda probe: Own(1.0)), host=f"host{world.rank}")
    little = [stragglers.observe(0.01 if world.rank == 0 else 0.001, 1.0) for _ in range(40)]
    much = [stragglers.observe(0.2 if world.rank == 0 else 0.02, 1.0) for _ in range(40)]
    return [[said for heard in part for said in heard] for part in (little, much)]


def test_a_process_whose_data_is_slow_is_named_when_it_matters(tmp_path):
    for little, much in on_two(tmp_path, loading):
        assert little == []
        assert much == ["rank 0 on host0 loads data 10.0 times slower than the median, in 3 probes in a row"]


def watched(world: World, folder: Path) -> list:
    config = TrainConfig(tokens=1, batch_tokens=1, microbatch_rows=1, probe_every=EVERY, straggler_factor=2.0)
    with Watch(folder, config, world, print, "start") as watch:
        watch.begins(PHASE, 0, 0)
        found = []
        for step in range(1, 41):
            found += watch.stepped(PHASE, step, step, 3.0, 0.5 if world.rank == 1 else 0.01, 1.0)
    return [tuple(incident[:3]) for incident in found]


def test_the_watch_of_every_process_hands_the_same_incident_to_its_log(tmp_path):
    first, second = on_two(tmp_path, watched)
    assert first == second
    slow = [incident for incident in first if "loads data" in incident[1]]
    assert len(slow) == 1 and slow[0][0] == "straggler" and slow[0][2] == "alarm" and "rank 1" in slow[0][1]
    assert (tmp_path / "heartbeat.json").exists()


def test_alone_nobody_is_a_straggler_and_nothing_is_measured():
    def never(probe: int) -> Own:
        raise AssertionError("measured")

    stragglers = Stragglers(World.alone(), 1, 1.5, Given(never))
    assert [stragglers.observe(1.0, 1.0) for _ in range(10)] == [[]] * 10


def sleeping(world: World, folder: Path) -> dict:
    """Steps that are one collective, before which rank 1 sleeps: what it holds up shows in the others' waits alone."""
    config = TrainConfig(tokens=1, batch_tokens=1, microbatch_rows=1, probe_every=EVERY, straggler_factor=2.0)
    found, untimed = [], dist.Work.wait
    with Watch(folder, config, world, print, "start") as watch:
        watch.begins(PHASE, 0, 0)
        for step in range(1, EVERY * IN_A_ROW + 1):
            started = time.perf_counter()
            watch.loaded()
            time.sleep(0.05 * world.rank)
            world.sum(torch.ones(1))
            found += watch.stepped(PHASE, step, step, 3.0, 0.0, time.perf_counter() - started)
    return {"found": [incident.what for incident in found], "as it was": dist.Work.wait is untimed}


def test_what_a_process_waits_for_others_is_not_its_own(tmp_path):
    for ended in on_two(tmp_path, sleeping):
        (sentence,) = ended["found"]
        assert sentence.startswith("rank 1 on ") and " computes " in sentence and ended["as it was"]


class Enough(Exception):
    """The run is as long as the test needs it."""


def trained(data: Path, run: Path, pinned: bool, steps: int, every: int) -> None:
    """A run of `steps` steps and one, its process on a core of its own if `pinned`."""
    if pinned:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ["RANK"])]})

    def show(progress: Progress) -> None:
        if progress.step > steps:
            raise Enough

    settings = ["train.tokens=1M", f"train.probe_every={every}", "train.evaluate_bytes=0", "train.sample_tokens=0"]
    with contextlib.suppress(Enough):
        train(small(*settings), data, run, lambda _: None, show)


def named(run: Path) -> list[str]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["what"] for line in lines if line.get("trouble") == "straggler"]


@contextlib.contextmanager
def busy(processes: int, core: int | None) -> Iterator[None]:
    """Processes that compute without end, on one core or wherever they like."""
    pin = "" if core is None else f"import os; os.sched_setaffinity(0, {{{core}}})\n"
    neighbours = [subprocess.Popen([sys.executable, "-c", pin + "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for each of two processes")
def test_a_busy_neighbour_on_the_core_of_one_process_is_found(debug_data, tmp_path):
    with busy(3, sorted(os.sched_getaffinity(0))[1]):
        in_processes(2, trained, debug_data, tmp_path, True, 20, 5)
    assert (found := named(tmp_path)) and all(what.startswith("rank 1 on ") for what in found), found
    assert " computes " in found[0]


@pytest.mark.slow
def test_neighbours_of_both_processes_name_nobody(debug_data, tmp_path):
    with busy(2, None):
        in_processes(2, trained, debug_data, tmp_path, False, 40, 10)
    assert named(tmp_path) == []
