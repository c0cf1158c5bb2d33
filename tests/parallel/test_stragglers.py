"""Two processes, one of which is slow by its own probe or its data: both hear who it is. No real time is judged."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from trinity.config.train import TrainConfig
from trinity.parallel.mesh import World, layout, world_of
from trinity.recipes.table import recipe
from trinity.train.stragglers import IN_A_ROW, Probe, Stragglers
from trinity.train.watch import Watch

SIZE, EVERY = 2, 4
PHASE = recipe("debug").course[0]


def _as_rank(rank: int, folder: str, body: Callable) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=SIZE)
    try:
        world = world_of(layout(recipe("debug"), SIZE), rank, torch.device("cpu"))
        torch.save(body(world, Path(folder)), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_two(folder: Path, body: Callable) -> list:
    """What `body(world, folder)` returns on each of two processes."""
    context = processes.start_processes(_as_rank, (str(folder), body), nprocs=SIZE, join=False, start_method="spawn")
    assert context is not None
    try:
        end = time.monotonic() + 100
        while not context.join(timeout=1):
            if time.monotonic() > end:
                pytest.fail("two processes did not end in 100 s")
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(SIZE)]


def probed(world: World, folder: Path) -> dict:
    """Rank 1 needs 3 times as long for the probe from its third to its eighth, and is quick again for two."""
    calls = []

    def probe() -> float:
        calls.append(1)
        slow = world.rank == 1 and (3 <= len(calls) <= 8 or len(calls) > 10)
        return 0.03 if slow else 0.01

    stragglers = Stragglers(world, EVERY, 1.5, probe, host=f"host{world.rank}")
    heard = {step: said for step in range(1, 57) if (said := stragglers.observe(0.0, 1.0))}
    return {"heard": heard, "probes": len(calls)}


def test_a_process_whose_probe_is_slow_several_times_is_named_once_on_all(tmp_path):
    first, second = on_two(tmp_path, probed)
    sentence = "rank 1 on host1 computes 3.0 times slower than the median, in 3 probes in a row"
    assert first == second
    assert first["heard"] == {EVERY * (2 + IN_A_ROW): [sentence], EVERY * (10 + IN_A_ROW): [sentence]}
    assert first["probes"] == 56 // EVERY, "between probes nothing is measured"


def loading(world: World, folder: Path) -> list:
    """Rank 0 waits for its data; of next to nothing, and then of a fifth of the step."""
    stragglers = Stragglers(world, EVERY, 1.5, lambda: 0.01, host=f"host{world.rank}")
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


def test_alone_nobody_is_a_straggler_and_nothing_is_probed():
    def never() -> float:
        raise AssertionError("probed")

    stragglers = Stragglers(World.alone(), 1, 1.5, never)
    assert [stragglers.observe(1.0, 1.0) for _ in range(10)] == [[]] * 10


def test_the_probe_measures_work():
    assert 0 < Probe(torch.device("cpu"))() < 10
