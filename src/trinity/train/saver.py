"""Checkpoints written while the run goes on: a short pause to copy, then a thread does the rest.

    step        copies this process's tensors to the CPU (the pause), and goes on
    thread      writes, reads back, hashes; counts the experts; moves the folder, then the pointer; prunes

All processes start a save at the same step. Their threads talk through a process group of their own, so nothing they
exchange gets between the collectives of a step. One save at a time: the next waits for the one before, and the end of
the run waits for the last.

A save that fails has touched nothing, and what failed may pass: the run goes on and saves again when it is next due.
It ends with the error when FAILURES in a row failed, and at once when the checkpoint is `needed`: one with a name, or
the last. Their moment does not come again in this run, but it does in a start from the checkpoint before.
"""

import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from trinity.base.errors import TrinityError
from trinity.ckpt.folder import Staged, point_to, prune, save_checkpoint
from trinity.ckpt.peers import ALONE, Peers
from trinity.config.run import RunConfig
from trinity.parallel.mesh import COLLECTIVE_TIMEOUT, World
from trinity.train.state import TrainState

# In a row. A full disk that somebody clears, or a file server that restarts, costs one or two; at the third the run
# would go on for nobody knows how long with nothing to come back to, and a person must look.
FAILURES = 3


class Failed(NamedTuple):
    """A save that failed, on all processes alike, in a run that goes on."""

    step: int
    checkpoint: str
    problem: str
    in_a_row: int


class Saved(NamedTuple):
    """What the log says of a finished save. `bytes` and the times are this process's."""

    step: int
    checkpoint: str
    tokens: int
    bytes: int
    pause_seconds: float  # the run stood still
    seconds: float  # from then on, beside the run


def peers_of(world: World) -> Peers:
    """The processes of a run as writers of its checkpoints, over a CPU group of their own. A collective call."""
    if world.size == 1:
        return ALONE
    group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup), "every process is of the group"
    return Peers(world.rank, world.size, group)


class Saver:
    """The saves of one run. Every method is called by all processes at the same point of the run.

    `peers` is for what the run itself reads of checkpoints; the thread has a group of its own.
    """

    def __init__(self, run: Path, config: RunConfig, world: World) -> None:
        self.run, self.config = run, config
        self.peers, self._behind = peers_of(world), peers_of(world)
        self._going: _Save | None = None
        self._failures = 0  # in a row

    def start(self, state: TrainState, name: str, newest: bool, needed: bool = False) -> None:
        """Copy the state and let the thread write it as `name`.

        newest: the pointer moves to it, and old ones go. needed: the run does not go on without it.
        """
        assert self._going is None, "wait for the save before"
        began = time.perf_counter()
        staged = state.staged(self.config)
        save = _Save(self, staged, name, newest, needed, pause=time.perf_counter() - began)
        save.start()
        self._going = save  # now that it can be waited for: Ctrl-C may come at any line

    def poll(self) -> Saved | Failed | None:
        """What the log says of the save, once it has ended on all processes. Raises what `wait` raises."""
        if self._going is None or not self._ended_everywhere(self._going):
            return None
        return self.wait()

    def wait(self) -> Saved | Failed | None:
        """Wait for the save that is going on, if any. Raises its error, on all alike, where the run must end."""
        going, self._going = self._going, None
        if going is None:
            return None
        going.join()
        if going.error is None:
            self._failures = 0
            return going.saved
        self._failures += 1
        if going.needed or self._failures >= FAILURES or not isinstance(going.error, Exception):
            raise going.error
        problem = going.error.what if isinstance(going.error, TrinityError) else str(going.error) or "no reason given"
        return Failed(going.staged.state["step"], going.checkpoint, problem.rstrip("."), self._failures)

    def _ended_everywhere(self, going: "_Save") -> bool:
        # A few bytes a step, and only while a save goes on: without this, processes would raise at different steps.
        ended = torch.tensor(int(not going.is_alive()))
        if self.peers.group is not None:
            dist.all_reduce(ended, dist.ReduceOp.MIN, group=self.peers.group)
        return bool(ended)

    def write(self, staged: Staged, name: str, newest: bool) -> None:
        """What the thread does; by itself it knows nothing of threads."""
        folder = save_checkpoint(self.run, name, staged, self._behind)
        if newest:
            self._behind.first(lambda: self._make_newest(folder))

    def _make_newest(self, folder: Path) -> None:
        point_to(self.run, folder)
        prune(self.run, folder, self.config.train.keep_checkpoints, self.config.train.keep_every_tokens)


class _Save(threading.Thread):
    """One save. A daemon: a second Ctrl-C ends the process without waiting for the disk."""

    def __init__(self, saver: Saver, staged: Staged, name: str, newest: bool, needed: bool, pause: float) -> None:
        super().__init__(name=f"save {name}", daemon=True)
        self.saver, self.staged, self.checkpoint = saver, staged, name
        self.newest, self.needed, self.pause = newest, needed, pause
        self.saved: Saved | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        began = time.perf_counter()
        try:
            self.saver.write(self.staged, self.checkpoint, self.newest)
        except BaseException as error:  # it is raised again where the run is  # noqa: BLE001
            self.error = error
            return
        state = self.staged.state
        self.saved = Saved(
            step=state["step"],
            checkpoint=self.checkpoint,
            tokens=state["tokens"],
            bytes=self.staged.bytes,
            pause_seconds=round(self.pause, 4),
            seconds=round(time.perf_counter() - began, 4),
        )
