"""TrainState: everything that a killed run needs to go on exactly as if it had not been killed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trinity.base.errors import CheckpointError, DataError
from trinity.base.seeds import named_seed
from trinity.ckpt.folder import Checkpoint, save_checkpoint
from trinity.config.load import to_dict
from trinity.config.run import RunConfig
from trinity.data.loader import Loader
from trinity.model.transformer import Transformer
from trinity.optim.groups import Optimisers, build_optimisers
from trinity.parallel.apply import build_parallel
from trinity.parallel.mesh import World, device_of
from trinity.parallel.muon import Owners
from trinity.train.guard import Guard
from trinity.train.settings import locked_fingerprint


@dataclass
class TrainState:
    model: Transformer
    optimisers: Optimisers
    bias_momentum: Tensor  # [L, E] float32, SMEBU's buffer
    loader: Loader
    guard: Guard
    world: World
    step: int = 0
    tokens: int = 0

    @classmethod
    def fresh(cls, config: RunConfig, loader: Loader, world: World | None = None) -> "TrainState":
        """The state before the first step; of several processes each holds its part."""
        world = world or World.alone(device_of(config.parallel))
        model = build_parallel(config.model, config.parallel, world, named_seed(config.train.seed, "model"))
        across = None if world.dense is None else Owners(world.dense["fsdp"].get_group())
        return cls(
            model=model,
            optimisers=build_optimisers(model, config.optim, across),
            bias_momentum=torch.zeros(config.model.num_sparse_layers, config.model.num_experts, device=world.device),
            loader=loader,
            guard=Guard(config.train),
            world=world,
        )

    def save(self, run: Path, name: str, config: RunConfig) -> Path:
        """Write a durable checkpoint; the pointer is the caller's to move."""
        optimizer = {"bias_momentum": self.bias_momentum}
        for parameter_name, parameter in self.model.named_parameters():
            for kind, optimiser in (("muon", self.optimisers.muon), ("adamw", self.optimisers.adamw)):
                for key, value in optimiser.state.get(parameter, {}).items():
                    optimizer[f"{kind}/{parameter_name}/{key}"] = value.reshape(-1) if value.dim() == 0 else value
        counters = {
            "step": self.step,
            "tokens": self.tokens,
            "loader": self.loader.state(),
            "guard": self.guard.state(),
            "data_fingerprint": self.loader.data_fingerprint,
            "config_fingerprint": locked_fingerprint(config),
            "model_config": to_dict(config.model),
        }
        return save_checkpoint(run, name, self.model.state_dict(), optimizer, counters)

    def restore(self, checkpoint: Checkpoint, config: RunConfig, keep_loader: bool = False) -> None:
        """Become the state that `checkpoint` holds. With keep_loader (roll-back) data and counts of incidents go on."""
        counters: dict[str, Any] = checkpoint.state
        if counters["config_fingerprint"] != locked_fingerprint(config):
            raise CheckpointError(f"{checkpoint.folder} belongs to another configuration.", "Train into another --out.")
        if counters["data_fingerprint"] != self.loader.data_fingerprint:
            raise DataError(
                f"The data changed since {checkpoint.folder} was written.",
                "Give the data folder the run began with, or start again with another --out.",
            )
        self.model.load_state_dict(checkpoint.model)
        self._restore_optimisers(checkpoint)
        self.bias_momentum = checkpoint.optimizer["bias_momentum"].clone()
        self.step, self.tokens = counters["step"], counters["tokens"]
        if keep_loader:
            self.guard.rolled_back(counters["guard"])
        else:
            self.loader.load_state(counters["loader"])
            self.guard.load_state(counters["guard"])

    def _restore_optimisers(self, checkpoint: Checkpoint) -> None:
        names = dict(self.model.named_parameters())
        for optimiser in (self.optimisers.muon, self.optimisers.adamw):
            optimiser.state.clear()
        for key, value in checkpoint.optimizer.items():
            if key == "bias_momentum":
                continue
            kind, name, slot = key.split("/")
            optimiser = self.optimisers.muon if kind == "muon" else self.optimisers.adamw
            parameter = names[name]
            shaped = value.reshape(()) if slot == "step" else value
            optimiser.state[parameter][slot] = shaped.clone()
