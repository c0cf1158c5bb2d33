"""What the two processes of test_runs.py do: evaluate and sample, roll back, live through phases."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from steps import small, whole

from trinity.cli.main import main
from trinity.config.load import override
from trinity.config.phases import ExtensionConfig, PhaseConfig
from trinity.config.run import RunConfig
from trinity.data.heldout import heldout_documents
from trinity.data.loader import Loader
from trinity.model.generate import continue_greedily
from trinity.parallel.expert import dispatch_over
from trinity.parallel.mesh import World, joined_world
from trinity.recipes.table import recipe
from trinity.train import loop, step
from trinity.train.duties import within
from trinity.train.evaluate import score_documents
from trinity.train.state import TrainState

EXPERTS_APART = ["parallel.expert=2"]
ROLL_BACK = override(
    recipe("debug"),
    ["train.tokens=8K", "train.save_every_tokens=3072", "train.evaluate_bytes=0", "train.sample_tokens=0",
     "optim.decay_tokens=2K", "optim.warmup_tokens=1K", "train.nonfinite_action=rollback"],
)  # fmt: skip
BAD = 5  # the step whose second microbatch, that of rank 1, is not finite


def life(data: dict[str, Path]) -> RunConfig:
    """A ramp, a second mix, longer rows: docs/guides/life.toml in 14 steps."""
    settings = ["model.num_hidden_layers=2", "train.tokens=6K", "train.batch_tokens=512", "train.microbatch_rows=4",
                "data.sequence_length=64", "data.buffer_documents=32", "optim.warmup_tokens=512",
                "optim.decay_tokens=2K", "train.evaluate_every_tokens=0", "train.evaluate_bytes=300",
                "train.sample_tokens=2", "train.save_every_tokens=2K"]  # fmt: skip
    return replace(
        override(recipe("debug"), settings),
        phases=(
            PhaseConfig(name="wide", from_tokens=2048, batch_tokens=1024),
            PhaseConfig(name="code", from_tokens=4096, mix=str(data["code"])),
        ),
        extension=ExtensionConfig(
            tokens=4096, sequence_length=256, batch_tokens=1024, mix=str(data["long"]), final_lr_fraction=0.05
        ),
    )


def ramped() -> RunConfig:
    """A row a step, which two processes cannot share, and then four."""
    settings = ["train.tokens=3K", "train.batch_tokens=128", "train.microbatch_rows=1", "optim.decay_tokens=0",
                "optim.warmup_tokens=0", "train.evaluate_bytes=0", "train.sample_tokens=0",
                "train.save_every_tokens=512"]  # fmt: skip
    return replace(
        override(recipe("debug"), settings), phases=(PhaseConfig(name="wide", from_tokens=512, batch_tokens=512),)
    )


def go_on(recipe: Path, data: Path, run: Path) -> None:
    """The command that resumes a run."""
    code = main(["train", str(recipe), "--data", str(data), "--out", str(run)])
    assert not code, code


def look(data: Path, world: World, *settings: str) -> dict[str, Any]:
    """Scores of held-out documents and a sample, of fresh weights."""
    config = small(*settings)
    state = TrainState.fresh(config, Loader(data, config.data, config.train.seed), world)
    state.model.eval()
    ((text, size), *_) = within(heldout_documents(data), 12_000, state.loader.tokenizer)
    # Of uneven lengths, and an odd number of batches of rows: one process reads for nothing at the end.
    documents = [(text[start:end], size) for start, end in ((0, 300), (300, 301), (301, 1500), (1500, len(text)))]
    scores = score_documents(state.model, documents, 96, world)
    sample = continue_greedily(state.model, text[:12], 12, dispatch=dispatch_over(world))
    return {"scores": [list(score) for score in scores], "sample": sample}


def lived(config: RunConfig, data: Path, run: Path, world: World) -> dict[str, Any]:
    """Train, and what the run ended in."""
    state = loop.train(config, data, run, lambda _: None, lambda _: None, world)
    return {
        "step": state.step,
        "tokens": state.tokens,
        "loader": state.loader.state(),
        "guard": state.guard.state(),
        "weights": {name: whole(tensor) for name, tensor in state.model.state_dict().items()},
        "bias_momentum": state.bias_momentum,
    }


def breaking(call: int):
    """Let the `call`-th microbatch of this process have a loss that is not finite; what puts it right again."""
    original, calls = step.chunked_loss, []

    def broken(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        loss, cross_entropy = original(*arguments, **named)
        return (loss * math.nan, cross_entropy * math.nan) if len(calls) == call else (loss, cross_entropy)

    step.chunked_loss = broken
    return lambda: setattr(step, "chunked_loss", original)


def live(debug_data: Path, data: dict[str, Path], out: Path) -> None:
    """All three, with the experts apart; the first process leaves what it found in `out`."""
    with joined_world(override(ROLL_BACK, EXPERTS_APART)) as world:
        found = {"look": look(debug_data, world, *EXPERTS_APART)}
        mend = breaking(BAD) if os.environ["RANK"] == "1" else lambda: None
        found["roll back"] = lived(override(ROLL_BACK, EXPERTS_APART), debug_data, out / "rolled", world)
        mend()
        found["life"] = lived(override(life(data), EXPERTS_APART), data["web"], out / "life", world)
        table: list[Any] = [None] * world.size
        dist.all_gather_object(table, found)
        if world.is_first:
            torch.save(table, out / "found.pt")
