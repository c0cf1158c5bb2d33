"""A layout: how a run is laid over processes, and how much of a step one process gets.

processes = replicate x shard x context;  fsdp = shard x context = expert x expert_shard      (parallel/mesh.py)
"""

from typing import Literal, NamedTuple

from trinity.config.run import RunConfig

# Which code attends and goes through experts: the compiled kernels, torch's for half precision on a GPU (no masks), or
# the plain one with masks.
Kernels = Literal["cpu", "gpu", "plain"]


class Layout(NamedTuple):
    replicate: int = 1
    shard: int = 1
    context: int = 1
    expert: int = 1
    microbatch_rows: int = 1
    remat: str = "none"
    precision: str = "float32"

    @property
    def size(self) -> int:
        return self.replicate * self.shard * self.context

    @property
    def fsdp(self) -> int:
        """Processes that share the dense weights of one replica."""
        return self.shard * self.context

    @property
    def expert_shard(self) -> int:
        """Processes that share one stack of experts."""
        return self.fsdp // self.expert

    @property
    def data(self) -> int:
        """Groups of processes that read rows of their own."""
        return self.replicate * self.shard

    @property
    def value_bytes(self) -> int:
        """Bytes of a working weight or an activation."""
        return 2 if self.precision == "bfloat16" else 4

    def kernels(self, in_host_memory: bool) -> Kernels:
        """in_host_memory: it computes in host memory (a CPU)."""
        if in_host_memory:
            return "cpu" if self.precision == "float32" else "plain"
        return "gpu" if self.precision == "bfloat16" else "plain"

    def tokens(self, run: RunConfig) -> int:
        """Tokens of one microbatch on one process."""
        return self.microbatch_rows * run.data.sequence_length // self.context

    def microbatches(self, run: RunConfig) -> int:
        """Microbatches of one step on one process; 0 when the step has too few rows for all processes."""
        return run.train.batch_tokens // (self.microbatch_rows * run.data.sequence_length * self.data)

    def __str__(self) -> str:
        return (
            f"replicate {self.replicate} x shard {self.shard} x context {self.context}, expert {self.expert}, "
            f"{self.microbatch_rows} rows a microbatch, remat {self.remat}, {self.precision}"
        )
