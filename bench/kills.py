"""Kill a run of several processes again and again, at any moment, saving included; it must end in the same bits.

    python bench/kills.py --kills 100 --processes 2 --out /tmp/kills

First one unbroken run; then runs that are killed (SIGKILL to one random rank, SIGTERM to the others, as torchrun does)
and started again with the same command, until `--kills` kills are done and the last run has ended. Half of the kills
come at a random moment of a run's life, start-up included; the others wait for a random phase of a save, read from the
run folder. Prints how many kills met which phase, and the hash of weights and optimiser state at the end of every run;
exit code 1 when one differs from the unbroken run's.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

SETTINGS = ["train.tokens=48K", "train.batch_tokens=1024", "train.microbatch_rows=2", "train.save_every_tokens=2048",
            "train.evaluate_every_tokens=16K", "train.evaluate_bytes=500", "train.sample_tokens=0",
            "optim.decay_tokens=8K", "optim.warmup_tokens=4K", "data.sequence_length=64"]  # fmt: skip
KEPT = 2  # train.keep_checkpoints of debug
LONGEST = 300.0  # seconds that one life of a run may take before something must be wrong
AIMED = ("writing", "proving", "sealing", "moving", "pointing", "pruning")
_STARTED = multiprocessing.get_context("forkserver")


class Life:
    """One start of the command with all its processes, until it ends or is killed."""

    def __init__(self, data: Path, run: Path, processes: int) -> None:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            port = listening.getsockname()[1]
        command = ["train", "debug", "--data", str(data), "--out", str(run)]
        for setting in SETTINGS:
            command += ["--set", setting]
        place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.run, self.lines, self.log = run, _lines(run), run.with_suffix(".log")
        self.found = {path.name for path in (run / "checkpoints").glob("step-*")}
        self.ranks = [
            _STARTED.Process(
                target=carry_out, args=(command, place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, self.log)
            )
            for rank in range(processes)
        ]
        for process in self.ranks:
            process.start()
        self.began = time.monotonic()

    def goes_on(self) -> bool:
        if time.monotonic() - self.began > LONGEST:
            raise SystemExit(f"{self.run} neither ends nor is killed; see {self.log}")
        return all(process.is_alive() for process in self.ranks)

    def phase(self) -> str:
        """What the run is doing, as its folder shows it."""
        checkpoints = self.run / "checkpoints"
        names = os.listdir(checkpoints) if checkpoints.is_dir() else []
        if any(name.startswith(".latest.writing-") for name in names):
            return "pointing"
        aside = [name for name in names if ".writing-" in name]
        if aside:
            try:
                held = {path.name + path.parent.name for path in (checkpoints / aside[0]).rglob("*")}
            except FileNotFoundError:  # it took its name while we looked
                return "moving"
            if any(name.startswith(("manifest.json", "state.json")) for name in held):
                return "sealing"
            files = sum(".safetensors" in name for name in held)
            return "proving" if files == 2 * len(self.ranks) else "writing"
        steps = {name for name in names if name.startswith("step-")}
        if len(steps) > KEPT and steps - self.found:  # a kill while pruning leaves too many for the next life to find
            return "pruning"
        return "stepping" if _lines(self.run) > self.lines else "starting"

    def kill(self, rank: int) -> None:
        """SIGKILL to one process; the others are asked to go, as torchrun does, and made to after a while."""
        pids = [process.pid for process in self.ranks]
        for number, pid in sorted(enumerate(pids), key=lambda place: place[0] != rank):
            with suppress(ProcessLookupError):  # it ended by itself this very moment
                os.kill(pid, signal.SIGKILL if number == rank else signal.SIGTERM)
        self.end()

    def end(self) -> list[int]:
        """Wait for all processes; their exit codes."""
        for process in self.ranks:
            process.join(timeout=60)
            process.kill()
            process.join()
        return [process.exitcode for process in self.ranks]


def carry_out(command: list[str], place: dict[str, str], log: Path) -> None:
    """One process of the command, as a launcher starts it. It is forked from one that has torch loaded already."""
    os.environ.update(place)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from trinity.cli.main import main

    sys.exit(main(command))


def _lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def kill_once(life: Life, chance: random.Random) -> str | None:
    """Kill a life at a random moment, or in a random phase of a save; the phase it was in, None when it ended first."""
    aim = chance.choice(AIMED) if chance.random() < 0.5 else None
    early = chance.random() < 0.15
    began = None if aim is not None or not early else time.monotonic()
    delay = chance.uniform(0, 6)
    while life.goes_on():
        phase = life.phase()
        if aim is None:
            if began is None and phase != "starting":
                began = time.monotonic()  # the clock of most kills starts with the first step
            if began is not None and time.monotonic() - began > delay * (1 if early else 0.5):
                life.kill(chance.randrange(len(life.ranks)))
                return phase
        elif phase == aim:
            life.kill(chance.randrange(len(life.ranks)))
            return phase
        time.sleep(0.0005)
    return None


def fingerprint_of(run: Path) -> str:
    """sha256 over weights and optimiser state of the last checkpoint, by name."""
    from trinity.ckpt.folder import newest_good, read_checkpoint

    newest = newest_good(run, print)
    assert newest is not None
    found, digest = read_checkpoint(newest), hashlib.sha256(newest.name.encode())
    for tensors in (found.model, found.optimizer):
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def run_to_its_end(data: Path, run: Path, processes: int) -> None:
    life = Life(data, run, processes)
    while life.goes_on():
        time.sleep(0.05)
    codes = life.end()
    if any(codes):
        raise SystemExit(f"{run} ended with exit codes {codes}; see {life.log}")


def main() -> None:
    _STARTED.set_forkserver_preload(["trinity.train.loop", "trinity.train.display", "trinity.cli.train"])
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder for the runs")
    options = parser.parse_args()
    from trinity.data.embedded import embedded_corpus

    options.out.mkdir(parents=True, exist_ok=True)
    data = embedded_corpus(options.out / "tokens", 512)
    run_to_its_end(data, options.out / "unbroken", options.processes)
    wanted = fingerprint_of(options.out / "unbroken")
    print(f"unbroken  {wanted}", flush=True)
    chance, met, number, same = random.Random(options.seed), Counter(), 0, True
    while met.total() < options.kills:
        run, before = options.out / f"killed-{number}", met.total()
        while met.total() < options.kills:
            life = Life(data, run, options.processes)
            phase = kill_once(life, chance)
            if phase is None:
                codes = life.end()
                if any(codes):
                    raise SystemExit(f"{run} failed by itself with exit codes {codes}; see {life.log}")
                break
            met[phase] += 1
        run_to_its_end(data, run, options.processes)
        left = [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
        found = fingerprint_of(run)
        same = same and found == wanted and not left
        print(f"{run.name}  {found}  after {met.total() - before} kills  {left or ''}", flush=True)
        number += 1
    result = {"kills": met.total(), "runs": number, "phases": dict(met), "hash": wanted, "same": same}
    print(json.dumps(result))
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
