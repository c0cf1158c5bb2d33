"""What the processes of test_checkpoints.py do: save under one layout, go on under another, fail on one rank alone."""

import errno
import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor

from trinity.base.errors import CheckpointError, ConfigError, StorageError, TrinityError
from trinity.ckpt import folder as checkpoints
from trinity.ckpt.folder import newest_good, save_checkpoint
from trinity.config.load import override
from trinity.config.run import RunConfig
from trinity.data.loader import Loader
from trinity.parallel.agree import agree
from trinity.parallel.mesh import World, joined_world
from trinity.recipes.table import recipe
from trinity.train.loop import next_microbatches
from trinity.train.saver import FAILURES, Failed, Saver, peers_of
from trinity.train.state import TrainState
from trinity.train.step import accumulate, apply_update, learning_rates

# Six experts over two by two processes: three for each pair, two and one for its members. 37 divides by nothing.
SMALL = ["model.num_experts=6", "model.vocab_size=512", "model.intermediate_size=37", "train.microbatch_rows=2",
         "train.batch_tokens=1024"]  # fmt: skip
STEP = "step-00000001"
FORGOTTEN = "Failed to validate global plan"  # of torch's planner; `missing` counts again what its check lets pass


def small(*settings: str) -> RunConfig:
    return override(recipe("debug"), [*SMALL, *settings])


def fresh(config: RunConfig, data: Path, world: World) -> TrainState:
    return TrainState.fresh(config, Loader(data, config.data, config.train.seed), world)


def advance(state: TrainState, config: RunConfig) -> tuple[torch.Tensor, float]:
    """One step; the tokens that this process read, one microbatch after another [M, B, T], and the step's loss."""
    batches = next_microbatches(state.loader, config.phase_at(state.tokens), state.world)
    measured = accumulate(state, batches, config)
    state.step += 1
    state.tokens += config.train.batch_tokens
    apply_update(state, measured, config, learning_rates(state.tokens, config))
    return torch.stack([batch.tokens for batch in batches]), measured.loss


def whole(state: TrainState) -> dict[str, torch.Tensor]:
    """All tensors of a state, put together from all processes."""
    tensors = {**state.model.state_dict(), **state._optimizer_tensors()}
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors.items()
    }


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


def save_under(data: Path, out: Path, layouts: dict[str, list[str]], ports: list[int]) -> None:
    """Under each layout: one step, a checkpoint in OUT/NAME, and the whole tensors beside it as the test wants them."""
    for (name, settings), port in zip(layouts.items(), ports, strict=True):
        config = small(*settings)
        os.environ["MASTER_PORT"] = str(port)  # a port serves one process group
        with joined_world(config) as world:
            state = fresh(config, data, world)
            advance(state, config)
            save_checkpoint(out / name, STEP, state.staged(config), peers_of(world))
            tensors = whole(state)
            if world.is_first:
                torch.save(tensors, out / f"{name}.pt")


def restore_under(data: Path, out: Path, layouts: dict[str, list[str]], names: list[str], ports: list[int]) -> None:
    """Under each layout: go on from each of the checkpoints that other layouts and numbers of processes wrote."""
    for settings, port in zip(layouts.values(), ports, strict=True):
        config = small(*settings)
        os.environ["MASTER_PORT"] = str(port)
        with joined_world(config) as world:
            peers = peers_of(world)
            for name in names:
                state = fresh(config, data, world)
                found = newest_good(out / name, print, peers)
                assert found == out / name / "checkpoints" / STEP
                state.restore(found, config, peers)
                assert (state.step, state.tokens) == (1, 1024)
                equal(whole(state), torch.load(out / f"{name}.pt"))


def raises(kind: type[Exception], what: str, work: Callable[[], Any]) -> None:
    """Demand an error of one kind; on every process, or the others would wait without end."""
    try:
        work()
    except kind as error:
        assert what in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__} on rank {os.environ['RANK']}")


def fail_on_one_rank(data: Path, out: Path) -> None:
    """Rank 1's disk is full, then it forgets its experts, then it cannot read: all fail alike, nothing is left."""
    config = small()
    with joined_world(config) as world:
        peers = peers_of(world)
        state = fresh(config, data, world)
        advance(state, config)
        save_checkpoint(out, STEP, state.staged(config), peers)
        before = sorted(path.name for path in (out / "checkpoints").iterdir())
        world.barrier()  # no process begins the next before all have looked

        create = FileSystem.create_stream
        if world.rank == 1:
            FileSystem.create_stream = full_disk
        host = socket.gethostname()
        refused = f"On process 1 on {host}: The system refused: [Errno 28] No space left"
        full = "The disk is full: writing " if world.rank else refused
        raises(StorageError, full, lambda: save_checkpoint(out, "step-00000002", state.staged(config), peers))
        FileSystem.create_stream = create
        world.barrier()
        assert sorted(path.name for path in (out / "checkpoints").iterdir()) == before

        staged = state.staged(config)
        if world.rank == 1:
            for name in staged.model:
                if name.endswith("experts.down_proj"):
                    piece = staged.model[name]
                    staged.model[name] = checkpoints.Piece(piece.values[:0], piece.shape, piece.offsets)
        forgotten = FORGOTTEN if world.is_first else f"On process 0 on {host}: ValueError: {FORGOTTEN}"
        raises(TrinityError if world.rank else ValueError, forgotten,
               lambda: save_checkpoint(out, "step-00000002", staged, peers))  # fmt: skip
        world.barrier()
        assert sorted(path.name for path in (out / "checkpoints").iterdir()) == before

        # NaN in what rank 1 alone holds, infinity in a moment of rank 0's: both are found by both.
        assert state.not_finite() == []
        moment = next(name for name in state._optimizer_tensors() if name.endswith("lm_head.weight/exp_avg"))
        spoilt = state.model.lm_head.weight if world.rank else state._optimizer_tensors()[moment]
        own = spoilt.detach().to_local() if isinstance(spoilt, DTensor) else spoilt
        before_it = own.flatten()[-1].item()
        own.view(-1)[-1] = float("nan") if world.rank else float("inf")
        assert state.not_finite() == ["lm_head.weight", moment]
        own.view(-1)[-1] = before_it

        # One flipped bit in what rank 1 hashes: every rank hears of it.
        second = save_checkpoint(out, "step-00000002", state.staged(config), peers)
        world.barrier()
        if world.is_first:
            shard = sorted((second / "optimizer").iterdir())[1]
            content = bytearray(shard.read_bytes())
            content[-1] ^= 1
            shard.write_bytes(bytes(content))
        world.barrier()
        said: list[str] = []
        found = newest_good(out, said.append, peers)
        assert found == out / "checkpoints" / STEP
        assert len(said) == 1 and "optimizer/shard-00002-model-00001-of-00001.safetensors was altered" in said[0]
        if world.is_first:
            (found / "manifest.json").unlink()
        world.barrier()
        raises(CheckpointError, "Every checkpoint", lambda: newest_good(out, said.append, peers))


def full_disk(self: FileSystem, path: Any, mode: str) -> AbstractContextManager[Any]:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def fail_behind(data: Path, out: Path) -> None:
    """Saves that fail on rank 1 in the background are told at one step on all ranks, and the third ends the run so."""
    config = small()
    with joined_world(config) as world:
        state, saver = fresh(config, data, world), Saver(out, config, world)
        advance(state, config)
        saver.start(state, STEP, newest=True)
        saved = None
        while saved is None:
            advance(state, config)
            saved = saver.poll()
        assert (saved.step, saved.checkpoint, saved.tokens) == (1, STEP, 1024)
        assert (out / "checkpoints" / "latest").read_text() == STEP + "\n"
        if world.rank == 1:
            FileSystem.create_stream = full_disk
        steps: list[int] = []
        for failure in range(1, FAILURES + 1):
            name = f"step-{state.step:08d}"
            saver.start(state, name, newest=True)

            def until_told() -> Failed | None:
                told = None
                while told is None:
                    advance(state, config)
                    told = saver.poll()
                assert isinstance(told, Failed), told
                return told

            if failure < FAILURES:
                told = until_told()
                assert (told.checkpoint, told.in_a_row) == (name, failure) and "No space left" in told.problem or (
                    world.rank == 1 and "disk is full" in told.problem), told  # fmt: skip
            else:
                raises(StorageError, "No space left" if world.is_first else "disk is full", until_told)
            steps.append(state.step)
        table: list[Any] = [None] * world.size
        dist.all_gather_object(table, steps)
        assert all(theirs == steps for theirs in table), table
        assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["latest", STEP]


def disagree(port: int) -> None:
    """Rank 1 has another layout; other code; a fact more. Then all agree."""
    settings = ["parallel.replicate=3"] if os.environ["RANK"] == "1" else []

    def join() -> None:
        with joined_world(small("train.batch_tokens=768", *settings)):
            pass

    raises(ConfigError, "rank 1 has config", join)
    os.environ["MASTER_PORT"] = str(port)
    dist.init_process_group("gloo")
    facts = {"code": "1.0 abc", "config": "c0ffee"}
    odd = facts | {"code": "0.9 def"} if dist.get_rank() == 1 else facts
    raises(ConfigError, "rank 1 has code 0.9 def instead of 1.0 abc", lambda: agree(odd))
    more = odd | {"data": "x"} if dist.get_rank() == 1 else odd
    raises(ConfigError, "data x instead of nothing", lambda: agree(more))
    agree(facts)
    dist.destroy_process_group()


def stream(data: Path, out: Path, first: bool, steps: int, parallel: list[str]) -> None:
    """Some steps of a run from where its newest checkpoint left it; their tokens in the order of rows, and losses."""
    config = small(*parallel)
    with joined_world(config) as world:
        peers = peers_of(world)
        state = fresh(config, data, world)
        if not first:
            newest = newest_good(out, print, peers)
            assert newest is not None
            state.restore(newest, config, peers)
        for _ in range(steps):
            own, loss = advance(state, config)
            parts = [torch.empty_like(own) for _ in range(world.size)]
            dist.all_gather(parts, own) if world.size > 1 else parts[0].copy_(own)
            if world.is_first:
                rows = torch.stack(parts, dim=1).flatten(0, 2)  # processes take turns, a microbatch each
                torch.save({"tokens": rows, "loss": loss}, out / f"step-{state.step}.pt")
        save_checkpoint(out, f"step-{state.step:08d}", state.staged(config), peers)
