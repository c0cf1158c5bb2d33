"""The one place where a model becomes a parallel model. The order is fixed:

    1. experts are cut over expert-parallel processes       (parallel/expert.py moves the rows)
    2. blocks are computed again in backward                (remat)
    3. both parts of attention and dense layers are compiled
    4. weights are sharded, and replicated over replicas    (FSDP2, HSDP)
    5. what a process holds gets memory and initial values

Context parallelism needs nothing here: it is an `attend`, handed to each forward (parallel/context.py).
Gradients are sums over processes, never means: the loss divides by the targets of the whole step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

from trinity.base.errors import ConfigError
from trinity.config.model import ModelConfig
from trinity.config.parallel import ParallelConfig
from trinity.model.block import Block
from trinity.model.experts import Experts, MixtureOfExperts, through_experts
from trinity.model.init import build_on_meta, fill_initial
from trinity.model.layers import RMSNorm
from trinity.model.router import Router
from trinity.model.transformer import Transformer
from trinity.parallel.mesh import World


def build_parallel(config: ModelConfig, parallel: ParallelConfig, world: World, seed: int) -> Transformer:
    """A freshly initialised model of which this process holds its part: equal values whatever the layout.

    Raises ConfigError for bfloat16 in a world without a mesh, which would compute in float32.
    """
    if world.dense is None and parallel.precision != "float32":
        raise ConfigError(
            f"parallel.precision={parallel.precision} needs the sharded master weights of a joined world.",
            "Hand it the world of `joined_world(config)`, which opens one for a single process too.",
        )
    model = build_on_meta(config)
    parallelise(model, parallel, world)
    materialise(model, world.device, seed)
    return model


def parallelise(model: Transformer, parallel: ParallelConfig, world: World) -> None:
    """Steps 1 to 4, in place, on a model without memory (meta device) or with it."""
    if world.sparse is not None and parallel.expert > 1:
        for module in model.modules():
            if isinstance(module, Experts):
                _cut_experts(module, world)
    for block in model.layers:
        assert isinstance(block, Block)
        if parallel.remat == "block":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        if parallel.compile:
            _compile(block)
    if world.dense is not None:
        _shard(model, parallel, world)


def sum_over_replicas(model: Transformer, wanted: bool) -> None:
    """Whether backward passes from now on sum gradients over replicas, or keep their sums within this one's shards.

    The last microbatch of a step does, the others do not: the slow links between replicas are used once a step.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(wanted)


def materialise(model: Transformer, device: torch.device, seed: int) -> None:
    """Give a model on the meta device memory and initial values; of a sharded tensor the local part alone."""
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part, first = local_part(parameter)
            fill_initial(part, name, model.config, seed, rows=len(parameter), first=first)
        for bias in model.expert_biases():
            bias.zero_()


def local_part(tensor: Tensor) -> tuple[Tensor, int]:
    """(what this process holds of a tensor sharded along its first dimension, the first row of it)."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), offset[0]


def _cut_experts(experts: Experts, world: World) -> None:
    assert world.sparse is not None
    mesh = world.sparse["expert"]
    for name, parameter in list(experts.named_parameters()):
        part = parameter.detach().chunk(mesh.size())[mesh.get_local_rank()]
        experts.register_parameter(name, nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False)))
    experts.forward = partial(_through_own, experts)


def _through_own(experts: Experts, x: Tensor, weights: Tensor | None, order: Tensor, ends: Tensor) -> Tensor:
    """Experts.forward over the experts that this process holds."""
    gate_up, down = experts.gate_up_proj, experts.down_proj
    assert isinstance(gate_up, DTensor) and isinstance(down, DTensor)
    return through_experts(x, weights, order, ends, gate_up.to_local(), down.to_local())


def _compile(block: Block) -> None:
    """Experts stay as they are: grouped_mm in float32 does not compile (docs/adr/0019).

    So does what lies between the two parts of attention: an `attend` keeps what it makes once a batch, sends rows to
    other processes and takes another number of documents with every batch. A graph of it would depend on all of that,
    and a block computed again in backward would find another graph than the one whose tensors were saved.
    """
    attention = block.self_attn
    attention.heads, attention.merged = _compiled(attention.heads), _compiled(attention.merged)
    dense = block.mlp.shared_experts if isinstance(block.mlp, MixtureOfExperts) else block.mlp
    if dense is not None:
        dense.forward = _compiled(dense.forward)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled where gradients are wanted.

    Evaluations and samples have rows of any length: their graphs would fill the few places that torch has for those of
    one function, and training, which comes after the first evaluation, would go uncompiled.
    """
    fast = torch.compile(function)
    return lambda *inputs: (fast if torch.is_grad_enabled() else function)(*inputs)


def _shard(model: Transformer, parallel: ParallelConfig, world: World) -> None:
    """One FSDP unit for each block, its experts apart (they live on another mesh); embedding apart; norm and head last.

    The head stays gathered between forward and backward, where the loss reads it without a forward of its own.
    """
    assert world.dense is not None and world.sparse is not None
    alone = parallel.replicate == 1
    dense = world.dense["fsdp"] if alone else world.dense
    sparse = world.sparse["expert_shard"] if alone else world.sparse["replicate", "expert_shard"]
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, parallel.precision), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.layers:
        for module in block.modules():
            if isinstance(module, Experts):
                fully_shard(module, mesh=sparse, mp_policy=policy)
        if parallel.precision != "float32":
            # Router and norm gains are float32 in every mode: units of their own, gathered unrounded.
            for module in block.modules():
                if isinstance(module, Router | RMSNorm):
                    fully_shard(module, mesh=dense, mp_policy=exact)
        fully_shard(block, mesh=dense, mp_policy=policy)
    fully_shard(model.embed_tokens, mesh=dense, mp_policy=policy)
    if parallel.precision != "float32":
        fully_shard(model.norm, mesh=dense, mp_policy=exact)
    fully_shard(model, mesh=dense, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo scales no sums
