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
from trinity.ckpt.shards import StoredPart, local_part
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

    def not_finite(self) -> list[str]:
        """Names of the tensors of weights and optimiser state that hold NaN or infinity on any process.

        One number a tensor is summed over all processes, once, so the list is the same on all. Values are not copied.
        """
        tensors = {**self.model.state_dict(), **self._optimizer_tensors()}
        parts = {name: local_part(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
        held = [name for name, part in parts.items() if part.numel()]
        # The largest magnitude: NaN goes through it as through a sum, and no finite value overflows it.
        largest = torch._foreach_norm([parts[name] for name in held], torch.inf)  # pyright: ignore[reportPrivateImportUsage]
        bad = dict(zip(held, (~torch.stack([value.float() for value in largest]).isfinite()).tolist(), strict=True))
        flags = torch.tensor([float(bad.get(name, False)) for name in parts], device=self.world.device)
        self.world.sum(flags)
        return [name for name, flag in zip(parts, flags.tolist(), strict=True) if flag]

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
        weights, moments = StoredPart(folder / MODEL, peers), StoredPart(folder / OPTIMIZER, peers)
        tensors = self.model.state_dict()
        weights.check(tensors)
        self._refuse_strange_slots(moments)
        weights.read_into(tensors)
        self._make_slots(moments.tensors)
        moments.read_into(self._optimizer_tensors())
        self.step, self.tokens = counters["step"], counters["tokens"]
        if keep_loader:
            self.guard.rolled_back(counters["guard"])
        else:
            self.loader.load_state(counters["loader"])
            self.guard.load_state(counters["guard"])

    def go_on_after_roll_back(self, record: dict[str, Any]) -> None:
        """Where a roll-back to the checkpoint that was just restored went on (train/rollback.py)."""
        self.loader.load_state(record["loader"])
        self.guard.load_state(record["guard"])

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

    def _refuse_strange_slots(self, moments: StoredPart) -> None:
        """Demand that every stored tensor is a slot of a parameter that is here, in its shape, or SMEBU's buffer."""
        parameters, kinds = dict(self.model.named_parameters()), self._optimisers_by_name()
        moments.check({_BIAS_MOMENTUM: self.bias_momentum})
        for key, found in moments.tensors.items():
            kind, _, rest = key.partition("/")
            name, _, slot = rest.rpartition("/")
            if key == _BIAS_MOMENTUM:
                continue
            shape = torch.Size([1]) if slot == "step" else parameters[name].shape if name in parameters else None
            if kind not in kinds or found.size != shape:
                raise CheckpointError(
                    f"{moments.folder} holds {key} of shape {list(found.size)}, which is no state of this optimiser.",
                    "It was written by another version of trinity or another model.",
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
