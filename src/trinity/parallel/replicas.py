"""Whether replicas still hold the same weights. Each steps by itself, so one that differs in a bit stays different."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trinity.parallel.mesh import World

_AT_ONCE = 1 << 24  # values summed at once, as 8-byte integers: 128 MiB


def differing_shards(model: nn.Module, world: World) -> list[int]:
    """The shards (indices within a replica) that are not the same, to the bit, in every replica.

    A collective call with the same answer on every process: each sums the bits of its own share, one integer for each
    tensor, and compares with the processes that hold the same share. With one replica there is nothing to compare.
    """
    if world.dense is None or world.dense["replicate"].size() == 1:
        return []
    own = torch.stack([_bits(tensor) for tensor in model.state_dict().values()])  # [tensors]
    theirs = [torch.empty_like(own) for _ in range(world.dense["replicate"].size())]
    dist.all_gather(theirs, own, group=world.dense["replicate"].get_group())
    shards = torch.zeros(world.dense["fsdp"].size(), dtype=torch.int64, device=world.device)
    shards[world.dense["fsdp"].get_local_rank()] = int(any(not torch.equal(own, other) for other in theirs))
    return [shard for shard, found in enumerate(world.sum(shards).tolist()) if found]


def _bits(tensor: Tensor) -> Tensor:
    """The sum of a float32 tensor's values read as integers: exact in any order, and changed by any one bit."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    parts = local.detach().contiguous().view(torch.int32).flatten().split(_AT_ONCE)
    return torch.stack([part.sum(dtype=torch.int64) for part in parts]).sum()
