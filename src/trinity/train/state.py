"""TrainState: everything that a killed run needs to go on exactly as if it had not been killed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trinity.base.errors import CheckpointError, DataError
from trinity.base.seeds import named_seed
from trinity.ckpt.folder import MODEL, OPTIMIZER, Staged, read_state, stage
from trinity.ckpt.peers import ALONE, Peers
from trinity.ckpt.shards import StoredPart
from trinity.config.load import differences, to_dict
from trinity.config.run import RunConfig
from trinity.data.loader import Loader
from trinity.model.transformer import Transformer
from trinity.optim.groups import Optimisers, build_optimisers
from trinity.parallel.apply import build_parallel
from trinity.parallel.mesh import World, device_of
from trinity.parallel.muon import Owners
from trinity.train.guard import Guard
from trinity.train.settings import locked_fingerprint

_BIAS_MOMENTUM = "bias_momentum"


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
        return cls.around(model, config, loader, world)

    @classmethod
    def around(cls, model: Transformer, config: RunConfig, loader: Loader, world: World) -> "TrainState":
        """The state before the first step of a model that is already there."""
        across = None if world.dense is None else Owners(world.dense["fsdp"].get_group())
        return cls(
            model=model,
            optimisers=build_optimisers(model, config.optim, across),
            bias_momentum=torch.zeros(config.model.num_sparse_layers, config.model.num_experts, device=world.device),
            loader=loader,
            guard=Guard(config.train),
            world=world,
        )

    def staged(self, config: RunConfig) -> Staged:
        """This process's share of everything, copied to the memory of the CPU; the run may go on at once."""
        counters = {
            "step": self.step,
            "tokens": self.tokens,
            "loader": self.loader.state(),
            "guard": self.guard.state(),
            "data_fingerprint": self.loader.data_fingerprint,
            "config_fingerprint": locked_fingerprint(config),
            "model_config": to_dict(config.model),
        }
        return stage(self.model.state_dict(), self._optimizer_tensors(), counters)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        """Names and tensors of the optimisers' state; changing a tensor changes the state."""
        tensors = {_BIAS_MOMENTUM: self.bias_momentum}
        for parameter_name, parameter in self.model.named_parameters():
            for kind, optimiser in self._optimisers_by_name().items():
                for slot, value in optimiser.state.get(parameter, {}).items():
                    tensors[f"{kind}/{parameter_name}/{slot}"] = value.view(1) if value.dim() == 0 else value
        return tensors

    def _optimisers_by_name(self) -> dict[str, torch.optim.Optimizer]:
        return {"muon": self.optimisers.muon, "adamw": self.optimisers.adamw}

    def restore(self, folder: Path, config: RunConfig, peers: Peers = ALONE, keep_loader: bool = False) -> None:
        """Become the state that a checked checkpoint holds, whatever number of processes wrote it in what layout.

        With keep_loader (roll-back) data and counts of incidents go on. Nothing changes when it is refused.
        """
        counters = read_state(folder)
        self._refuse_another(counters, folder, config)
        StoredPart(folder / MODEL, peers).read_into(self.model.state_dict())
        stored = StoredPart(folder / OPTIMIZER, peers)
        self._make_slots(stored.tensors)
        stored.read_into(self._optimizer_tensors())
        self.step, self.tokens = counters["step"], counters["tokens"]
        if keep_loader:
            self.guard.rolled_back(counters["guard"])
        else:
            self.loader.load_state(counters["loader"])
            self.guard.load_state(counters["guard"])

    def _refuse_another(self, counters: dict[str, Any], folder: Path, config: RunConfig) -> None:
        other = differences(counters["model_config"], to_dict(config.model))
        if other:
            more = f"; and {len(other) - 3} more" if len(other) > 3 else ""
            raise CheckpointError(
                f"{folder} holds a model of another architecture: {'; '.join(other[:3])}{more}.",
                "Give the same model settings to resume, or another --out.",
            )
        if counters["config_fingerprint"] != locked_fingerprint(config):
            raise CheckpointError(f"{folder} belongs to another configuration.", "Train into another --out.")
        if counters["data_fingerprint"] != self.loader.data_fingerprint:
            raise DataError(
                f"The data changed since {folder} was written.",
                "Give the data folder the run began with, or start again with another --out.",
            )

    def _make_slots(self, stored: dict[str, TensorStorageMetadata]) -> None:
        """Give the optimisers exactly the slots that a checkpoint has values for: fresh optimisers have none yet."""
        parameters = dict(self.model.named_parameters())
        optimisers = self._optimisers_by_name()
        for optimiser in optimisers.values():
            optimiser.state.clear()
        for key, found in stored.items():
            if key == _BIAS_MOMENTUM:
                continue
            kind, name, slot = key.split("/")
            parameter, dtype = parameters[name], found.properties.dtype
            optimisers[kind].state[parameter][slot] = (
                torch.zeros((), dtype=dtype, device=parameter.device)
                if slot == "step"
                else torch.zeros_like(parameter.detach(), dtype=dtype, memory_format=torch.contiguous_format)
            )
