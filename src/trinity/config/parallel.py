"""ParallelConfig: how one run is spread over processes. Nothing here changes what is learnt, beyond rounding."""

from dataclasses import dataclass
from typing import Literal

from trinity.config.knob import Settings, knob


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Settings):
    """Processes = replicate x shard x context. Expert parallelism borrows ranks of shard x context, it adds none."""

    section = "parallel"

    replicate: int = knob("copies of the sharded model (the outer dimension of HSDP)", 1, low=1)
    shard: int = knob("processes that share the weights of one copy (FSDP); 0 takes those that are left", 0, low=0)
    context: int = knob("processes that share the positions of one row", 1, low=1)
    expert: int = knob("processes that share the experts of a layer; divides shard x context", 1, low=1)
    remat: Literal["none", "block"] = knob("what backward computes again instead of keeping", "none")
    compile: bool = knob("compile attention and dense layers for training with torch.compile", False)
    precision: Literal["float32", "bfloat16"] = knob(
        "precision of weights and activations in a forward pass; master weights and sums stay float32", "float32"
    )
    device: Literal["auto", "cpu", "cuda"] = knob(
        "where a process computes; auto takes a GPU where there is one", "auto"
    )
