"""Which process does what: ranks laid out as a mesh, once at the start of a run.

    rank = (replicate index x shard + shard index) x context + context index

    rows of a batch       are split over replicate x shard (`data_rank` of `data_size`)
    positions of a row    are split over context
    dense weights         are split over shard x context, "fsdp"; every replica holds the same
    experts               are split over "expert" first, neighbouring ranks, then over the rest of fsdp ("expert_shard")

One process alone has no mesh and no process group: `World.alone()`. Launched by torchrun, or anything else that sets
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trinity.base.errors import ConfigError, TrinityError
from trinity.base.lineage import fingerprint, source_files
from trinity.config.load import config_fingerprint
from trinity.config.parallel import ParallelConfig
from trinity.config.phases import Phase
from trinity.config.run import RunConfig
from trinity.parallel.agree import agree
from trinity.parallel.lost import noticing_lost_peers
from trinity.parallel.rendezvous import Room, let_the_first_tell, room_of_this_start, settle

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # a save or an evaluation may keep others waiting; hangs alarm earlier


@dataclass(frozen=True)
class World:
    """One process's place. The meshes are views of one: all None when there is one process."""

    rank: int
    size: int
    device: torch.device
    data_rank: int = 0
    data_size: int = 1
    context_rank: int = 0
    context_size: int = 1
    dense: DeviceMesh | None = None  # [replicate, fsdp]
    sparse: DeviceMesh | None = None  # [replicate, expert_shard, expert]
    by_row: DeviceMesh | None = None  # [data, context]

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> "World":
        return cls(0, 1, torch.device(device))

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once: logs, settings, the pointer."""
        return self.rank == 0

    @property
    def expert_size(self) -> int:
        return 1 if self.sparse is None else self.sparse["expert"].size()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.dense is not None:
            dist.all_reduce(values)
        return values

    def sum_over_shards(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the processes of one replica, in place."""
        if self.dense is not None:
            dist.all_reduce(values, group=self.dense["fsdp"].get_group())
        return values

    def largest_of_replicas(self, value: torch.Tensor) -> torch.Tensor:
        """The largest of the replicas' values of one scalar; a NaN, which a maximum might drop, counts as infinite."""
        if self.dense is None or self.dense["replicate"].size() == 1:
            return value
        value = value.nan_to_num(nan=math.inf, posinf=math.inf)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.dense["replicate"].get_group())
        return value

    def sum_over_context(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the processes that share rows, in place."""
        if self.context_size > 1:
            dist.all_reduce(values, group=self.context_group)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.dense is not None:
            dist.barrier()

    @property
    def context_group(self) -> dist.ProcessGroup:
        assert self.by_row is not None
        return self.by_row["context"].get_group()

    @property
    def expert_group(self) -> dist.ProcessGroup:
        assert self.sparse is not None
        return self.sparse["expert"].get_group()


class Layout(NamedTuple):
    """Processes in each role; replicate x shard x context = replicate x expert_shard x expert = all of them."""

    replicate: int
    shard: int
    context: int
    expert: int
    expert_shard: int


def layout(config: RunConfig, size: int, tokens: int = 0) -> Layout:
    """Check a layout against the number of processes and the run; a ConfigError says which numbers do not divide.

    tokens: what the run has behind it. Rows are those of the phase it is in; of a complete run none are read any more.
    """
    parallel, model = config.parallel, config.model
    fixed = parallel.replicate * parallel.context
    shard = parallel.shard or size // fixed
    if parallel.replicate * shard * parallel.context != size:
        raise ConfigError(
            f"{size} processes cannot be laid out as {parallel.replicate} replicas x "
            f"{parallel.shard or 'the rest of'} shards x {parallel.context} context ranks.",
            "Make parallel.replicate x parallel.shard x parallel.context the number of processes; "
            "parallel.shard=0 takes what is left.",
        )
    fsdp = shard * parallel.context
    if fsdp % parallel.expert:
        raise ConfigError(
            f"Expert parallelism over {parallel.expert} processes does not divide the {fsdp} of one replica "
            f"({shard} shards x {parallel.context} context ranks).",
            "Choose parallel.expert as a divisor of it.",
        )
    if parallel.expert > 1 and model.num_experts % parallel.expert:
        raise ConfigError(
            f"{model.num_experts} experts cannot be spread evenly over {parallel.expert} processes.",
            "Choose parallel.expert as a divisor of model.num_experts.",
        )
    if model.num_attention_heads % parallel.context:
        raise ConfigError(
            f"{model.num_attention_heads} query heads cannot be split over {parallel.context} context ranks, as global "
            "layers need.",
            "Choose parallel.context as a divisor of model.num_attention_heads.",
        )
    if tokens < config.horizon:
        check_rows(config.phase_at(tokens), parallel.context, parallel.replicate * shard)
    return Layout(
        replicate=parallel.replicate,
        shard=shard,
        context=parallel.context,
        expert=parallel.expert,
        expert_shard=fsdp // parallel.expert,
    )


def misfits(config: RunConfig, world: World, tokens: int = 0) -> list[str]:
    """What is wrong with the phases that a run of so many tokens has yet to begin, under this layout: it may reach them
    under another (longer rows, say)."""
    found = []
    for phase in (phase for phase in config.course if phase.begin > tokens):
        try:
            check_rows(phase, world.context_size, world.data_size)
        except ConfigError as error:
            found.append(error.what)
    return found


def check_rows(phase: Phase, context: int, readers: int) -> None:
    """A ConfigError where `readers` processes, or the `context` ranks of a row, cannot share a phase's rows evenly."""
    if phase.sequence_length % context:
        raise ConfigError(
            f"Rows of {phase.sequence_length} tokens (phase '{phase.name}') cannot be cut evenly for {context} context "
            "ranks.",
            "Choose parallel.context as a divisor of the tokens of a row.",
        )
    phase.microbatches(readers)


@contextmanager
def joined_world(
    config: RunConfig, tokens: int = 0, missed: Callable[[Exception], None] = lambda _: None
) -> Iterator[World]:
    """This process's place among those of the launcher; the process group lives as long as the block.

    What one process cannot do is refused by all, before they wait for each other.
    tokens: those that a run to be resumed has behind it (ckpt/folder.py, `reached`). missed: is told why the processes
    did not come together, while the launcher still lets them all live.
    """
    size, room, joined = int(os.environ.get("WORLD_SIZE", "1")), None, False
    try:
        if size == 1 and config.parallel.precision == "float32":
            layout(config, 1, tokens)
            device, joined = device_of(config.parallel), True
            yield World.alone(device)
            return
        # One process too: FSDP2 keeps the float32 master weights of a bfloat16 run.
        room = Room(HashStore(), 0, 1) if size == 1 else room_of_this_start(COLLECTIVE_TIMEOUT)
        with noticing_lost_peers():
            found, device = settle(room, lambda: _place(config, size, tokens))
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                timeout=COLLECTIVE_TIMEOUT,
                store=room.store,
                rank=room.rank,
                world_size=size,
            )
            agree_on_start(config)  # before the meshes: they already take the same layout for granted
            world = world_of(found, room.rank, device)
            joined = True
            yield world
    except Exception as error:
        if not joined:
            missed(error)
        if room is not None and getattr(error, "alike", False):
            let_the_first_tell(room)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def refuse_with_all(error: TrinityError) -> NoReturn:
    """Raise what this one of several processes refuses before it joins the others; they wait for it, and raise it."""
    room = room_of_this_start(COLLECTIVE_TIMEOUT)

    def refuse() -> NoReturn:
        raise error

    try:
        settle(room, refuse)
    except TrinityError:
        let_the_first_tell(room)
        raise
    raise AssertionError("settle raises what was refused")


def _place(config: RunConfig, size: int, tokens: int) -> tuple[tuple[Layout, torch.device], dict[str, str]]:
    found, device = layout(config, size, tokens), device_of(config.parallel)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return (found, device), {"device": device.type}


def agree_on_start(config: RunConfig) -> None:
    """Refuse what every process of a run must have alike and has not. Another code is named file by file."""
    files = source_files()
    facts = {"torch": torch.__version__, "config": config_fingerprint(config), "code": fingerprint(files)}
    try:
        agree(facts)
    except ConfigError:
        agree({f"{name}": sha256[:8] for name, sha256 in files.items()})
        raise


def world_of(found: Layout, rank: int, device: torch.device) -> World:
    """The place of `rank` in a layout, over a process group that is already there (gloo, nccl or fake)."""
    size = found.replicate * found.shard * found.context
    ranks = init_device_mesh(device.type, (size,), mesh_dim_names=("world",))
    fsdp = found.shard * found.context
    return World(
        rank=rank,
        size=size,
        device=device,
        data_rank=rank // found.context,
        data_size=found.replicate * found.shard,
        context_rank=rank % found.context,
        context_size=found.context,
        dense=ranks._unflatten(0, (found.replicate, fsdp), ("replicate", "fsdp")),
        sparse=ranks._unflatten(
            0, (found.replicate, found.expert_shard, found.expert), ("replicate", "expert_shard", "expert")
        ),
        by_row=ranks._unflatten(0, (found.replicate * found.shard, found.context), ("data", "context")),
    )


def device_of(parallel: ParallelConfig) -> torch.device:
    """Where this process computes. A ConfigError when a GPU is asked for and there is none."""
    if parallel.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("There is no GPU that torch can use.", "Set parallel.device=cpu or auto.")
    if parallel.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise ConfigError(
            f"This machine has {count} GPUs, none for the process with LOCAL_RANK {local} (counted from 0).",
            f"Start at most {count} processes on it, one for each GPU, or set parallel.device=cpu.",
        )
    return torch.device("cuda", local)
