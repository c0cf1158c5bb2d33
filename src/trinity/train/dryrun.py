"""A rehearsal: the real training step of any recipe and layout on one machine, without values, and what it takes.

The model, its sharding, the forward and backward passes and the update are those of a run (parallel/, train/step.py).
Only three things differ: tensors have shapes and no memory (FakeTensorMode), the process group calls nobody ("fake"),
and what a run reads from values is answered: routing is even (parallel/expert.py, ForcedBalance), figures are 1.

Steps have equal microbatches; two are walked and what they send is extended to all of them. The most memory is held
from the second one on, when gradients of the first are there.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from trinity.base.errors import UsageError
from trinity.config.phases import Phase
from trinity.config.run import RunConfig
from trinity.data.loader import Batch, Loader
from trinity.model.init import build_on_meta
from trinity.parallel.apply import parallelise
from trinity.parallel.expert import forced_balance
from trinity.parallel.mesh import World, layout, world_of
from trinity.train.state import TrainState
from trinity.train.step import accumulate, apply_update, learning_rates
from trinity.train.storages import Peak, Storages
from trinity.train.traffic import Kind, Sent, Traffic, of_whole_step

WALKED = 2  # microbatches
_BUILT, _STEPPED = 0.1, 0.9  # shares of the time when the model is built, and when its gradients are there


@dataclass(frozen=True)
class Rehearsal:
    """What one process of a step takes."""

    rank: int
    processes: int
    microbatches: int
    walked: int
    sent: dict[Kind, Sent]  # in the whole step
    peaks: dict[str, Peak]  # by stage: forward, backward, update
    held: dict[str, int]  # bytes of weights, moments and gradients
    seconds: float


def rehearse(
    config: RunConfig, processes: int, rank: int = 0, show: Callable[[float], None] = lambda done: None
) -> Rehearsal:
    """Walk one step of the beginning of a run as process `rank` of `processes`. show: called with the share done.

    A ConfigError when the layout does not divide, a UsageError for a rank that there is not.
    """
    started = time.perf_counter()
    config = replace(config, parallel=replace(config.parallel, compile=False))  # changes speed alone
    found = layout(config, processes)
    if not 0 <= rank < processes:
        raise UsageError(f"There is no rank {rank} among {processes}.", f"Take one from 0 to {processes - 1}.")
    with _fake_group(processes, rank, config) as is_spread:
        world = world_of(found, rank, torch.device("cpu")) if is_spread else World.alone()
        model = build_on_meta(config.model)
        parallelise(model, config.parallel, world)
        show(_BUILT)
        storages = Storages("weights")
        with FakeTensorMode(allow_non_fake_inputs=True), Answers(), Traffic() as traffic, storages.following():
            model.to_empty(device=world.device)
            state = TrainState.around(model, config, cast(Loader, None), world)  # no rows are read
            storages.stage = "rows"
            batches = _rows(config.course[0], min(WALKED, config.course[0].microbatches(world.data_size)))
            return walk(state, batches, config, (traffic, storages), started, show)


@contextmanager
def _fake_group(processes: int, rank: int, config: RunConfig) -> Iterator[bool]:
    """The process group of a run, calling nobody; False where a run has none (parallel/mesh.py, joined_world)."""
    if processes == 1 and config.parallel.precision == "float32":
        yield False
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
    try:
        yield True
    finally:
        dist.destroy_process_group()


def walk(
    state: TrainState,
    batches: list[Batch],
    config: RunConfig,
    watching: tuple[Traffic, Storages],
    started: float,
    show: Callable[[float], None] = lambda done: None,
) -> Rehearsal:
    """One step over `batches`, watched: in a rehearsal, or for real (which is how this one is checked)."""
    (traffic, storages), world, model = watching, state.world, state.model
    microbatches = config.course[0].microbatches(world.data_size)
    traffic.watch(model, world)
    weights = [*model.parameters(), *model.buffers()]
    storages.name(weights, "weights")
    moments = _begin_moments(state)
    storages.name(moments, "moments")
    progress = _Progress(len(batches) * len(model.layers), show)

    def before(*_: Any) -> None:
        traffic.begin_forward()
        storages.name(state.optimisers.gradients(), "gradients")
        storages.stage = "forward"

    def after(*_: Any) -> None:
        storages.stage = "loss"

    hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    hooks += [block.register_forward_pre_hook(progress.entered) for block in model.layers]
    try:
        measured = accumulate(state, batches, config, forced_balance(world))
        gradients = state.optimisers.gradients()
        storages.name(gradients, "gradients")
        storages.stage = "update"
        apply_update(state, measured, config, learning_rates(config.course[0].batch_tokens, config))
    finally:
        for hook in hooks:
            hook.remove()
    held = {
        "weights": _bytes(weights),
        "moments": _bytes(moments),
        "gradients": sum(gradient.numel() * gradient.element_size() for gradient in gradients),
    }
    share = microbatches / len(batches)
    sent = {kind: of_whole_step(kind, walked, share) for kind, walked in traffic.sent.items()}
    show(1.0)
    seconds = time.perf_counter() - started
    return Rehearsal(world.rank, world.size, microbatches, len(batches), sent, storages.peaks, held, seconds)


def _begin_moments(state: TrainState) -> list[Tensor]:
    """Give the optimisers the moments that they have in every step but a run's first."""
    slots = ((state.optimisers.muon, ("momentum",)), (state.optimisers.adamw, ("exp_avg", "exp_avg_sq")))
    moments = [state.bias_momentum]
    for optimiser, names in slots:
        for parameter in (parameter for group in optimiser.param_groups for parameter in group["params"]):
            made = {name: torch.zeros_like(parameter.detach()) for name in names}
            if optimiser is state.optimisers.adamw:
                made["step"] = torch.zeros((), device=parameter.device)
            optimiser.state[parameter].update(made)
            moments += made.values()
    return moments


def _bytes(tensors: list[Tensor]) -> int:
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def _rows(phase: Phase, many: int) -> list[Batch]:
    """Microbatches of nothing in particular."""
    shape = (phase.microbatch_rows, phase.sequence_length)
    return [Batch(*(torch.zeros(shape, dtype=torch.int64) for _ in range(3))) for _ in range(many)]


class Answers(TorchDispatchMode):
    """Answers what a step reads from values that are not there: a figure is 1, a condition false, a count of rows 0,
    rows one document."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops.aten.equal.default:
            return True  # documents lie in a row one after another
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_zeros((1, args[0].dim()), dtype=torch.int64)  # where the one document begins
        if func is torch.ops.aten.bincount.default:
            return args[0].new_zeros(args[2] if len(args) > 2 else (kwargs or {}).get("minlength", 0))
        return func(*args, **(kwargs or {}))


class _Progress:
    """Turns layers entered in forward passes into a share of the whole."""

    def __init__(self, layers: int, show: Callable[[float], None]) -> None:
        self.layers, self.show, self.seen = layers, show, 0

    def entered(self, *_: Any) -> None:
        self.seen += 1
        self.show(_BUILT + (_STEPPED - _BUILT) * self.seen / self.layers)
