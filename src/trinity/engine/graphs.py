"""Steps of few rows that a GPU repeats from a recording, without a word from the host.

Launching the operators of one step takes longer than a small batch keeps a GPU busy. A step of rows of few tokens is a
function of tensors alone (engine/step.py), so it is recorded once for each shape: number of rows and width of the page
tables. Every number of rows up to 16 has a recording of its own, as a batch that is filled up computes what nobody
asked for; widths are rounded to two an octave. A shape is recorded when it comes for the second time: the first is run
as it is, which also has libraries made ready.
"""

from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor

from trinity.engine.pages import Pools
from trinity.engine.step import Step

Replay = Callable[[], Tensor]
Record = Callable[[Replay], Replay]  # what does the same again, on the same memory

EXACT = 16  # numbers of rows that are not rounded


def rounded_rows(rows: int) -> int:
    return rows if rows <= EXACT else -(-rows // 8) * 8


def rounded_width(pages: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    octave = 1 << (pages - 1).bit_length()
    return 3 * octave // 4 if octave > 2 and pages <= 3 * octave // 4 else octave


class Repeated:
    """One shape of step: tensors that stay where they are, and what is done with them."""

    def __init__(self, step: Step, run: Callable[[Step, Pools], Tensor], record: Record) -> None:
        self.step, self._run, self._record = step, run, record
        self._replay: Replay | None = None
        self._warm = False

    def __call__(self, step: Step, pools: Pools) -> Tensor:
        """What `run` makes of the numbers of `step`, good until the next call of any shape.

        Pools are the same each time. They are not kept here, so that they go when their engine goes.
        """
        self.step.take(step)
        if not self._warm:
            self._warm = True
            return self._run(self.step, pools)
        if self._replay is None:
            self._replay = self._record(lambda: self._run(self.step, pools))
        return self._replay()


class CudaGraphs:
    """A `Record` of a GPU. Recordings share memory and places for what they make (logits of all shapes would take
    gigabytes): none is repeated while what another made is in use."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._places: dict[int, Tensor] = {}  # of so many rows

    def __call__(self, run: Replay) -> Replay:
        if not self._graphs:  # torch takes no memory again that the last of its graphs has left
            self._memory, self._places = torch.cuda.graph_pool_handle(), {}
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: others may ask the GPU something meanwhile, as a server does for its memory.
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"),
        ):
            made = run()  # noted down, not computed
            size = 1 << (len(made) - 1).bit_length()
            place = self._places.setdefault(size, made.new_empty(size, *made.shape[1:]))[: len(made)].copy_(made)
        self._graphs.add(graph)

        def replay() -> Tensor:
            graph.replay()
            return place

        return replay
