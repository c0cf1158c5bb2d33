"""The plain runner: the model's own code over all rows of a step at once, on any device.

On a GPU steps of few rows are repeated from recordings (graphs.py). Results agree with the compiled runner's to
rounding; the last bits of a row may depend on its company, as torch's products do.
"""

from itertools import accumulate
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from trinity.base.errors import UsageError
from trinity.config.engine import KvDtype
from trinity.engine.graphs import CudaGraphs, Record, Repeated, rounded_rows, rounded_width
from trinity.engine.narrow import NarrowExperts, widest_bytes
from trinity.engine.pages import Pools
from trinity.engine.past import Past
from trinity.engine.step import Output, Rows, Step, filled_step, step_of
from trinity.model.dispatch import ChosenExperts, Dispatch, locally
from trinity.model.experts import Experts
from trinity.model.router import Routing
from trinity.model.transformer import Transformer

DEVICES = ("auto", "cpu", "cuda")
MOST_ROWS = 256  # in a step that is repeated
MOST_SHAPES = 128  # of steps that are kept: each recording takes some of the GPU's memory
MOST_COPIED = 16  # the same where each row's experts are copied out, or read as they are: a recording keeps its memory


class DeviceRunner:
    """`record`: how steps of few rows are recorded. None: as CUDA graphs on a GPU, and not at all elsewhere."""

    def __init__(self, model: Transformer, record: Record | None = None) -> None:
        self.config = model.config
        self.model = model
        self.device = model.embed_tokens.weight.device
        self.kv_dtype: KvDtype = "float32" if model.embed_tokens.weight.dtype == torch.float32 else "bfloat16"
        self.weight_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
        shape = (self.config.num_sparse_layers, self.config.num_experts)
        self.expert_rows = torch.zeros(shape, dtype=torch.int64, device=self.device)
        on_gpu = self.device.type == "cuda"
        self._record = CudaGraphs(self.device) if record is None and on_gpu else record
        self.step_bytes = widest_bytes(model)
        narrow = any(isinstance(module, NarrowExperts) for module in model.modules())
        self._by_row = narrow or (on_gpu and grouped_products_wait(model))
        self._most = MOST_COPIED if self._by_row else MOST_ROWS
        self._repeated: WeakKeyDictionary[Pools, dict[tuple[int, int], Repeated]] = WeakKeyDictionary()

    def read(self, rows: list[Rows], pools: Pools) -> Output:
        logits = self.forward(rows, pools)
        return Output(logits, likeliest_of(logits))

    def expert_reads(self) -> None:
        return None

    def forward(self, rows: list[Rows], pools: Pools) -> Tensor:
        """Logits of the wanted rows, in order: [N, V] float32 on this device."""
        order = sorted(range(len(rows)), key=lambda number: not rows[number].is_few)  # stable
        ordered = [rows[number] for number in order]
        ends = dict(zip(order, accumulate(len(one.tokens) for one in ordered), strict=True))
        places = [place for n, one in enumerate(rows) for place in range(ends[n] - one.wanted, ends[n])]
        wanted = torch.tensor(places, dtype=torch.int64).to(self.device)
        count = sum(len(one.tokens) for one in rows)
        if self._record is not None and count <= self._most and ordered[-1].is_few:
            made = self._repeat(ordered, rounded_rows(count), pools, self._record)
            return made.index_select(0, wanted)
        hidden = self._read(step_of(ordered).to(self.device), pools, locally)
        return self.model.head(hidden.index_select(0, wanted))

    def _repeat(self, rows: list[Rows], size: int, pools: Pools, record: Record) -> Tensor:
        """Logits of a step of rows of few tokens, by the recording of its shape: [size, V]."""
        width = rounded_width(max(one.blocks for one in rows))
        step = filled_step(rows, size, width)
        shapes = self._repeated.setdefault(pools, {})
        repeated = shapes.pop((size, width), None) or Repeated(step.to(self.device), self.logits, record)
        shapes[size, width] = repeated  # behind all that were not used since
        if len(shapes) > MOST_SHAPES:
            del shapes[next(iter(shapes))]
        return repeated(step, pools)

    def logits(self, step: Step, pools: Pools) -> Tensor:
        """[M, V] of all rows of a step without texts. Nothing here waits for the device or asks what is in a tensor."""
        return self.model.head(self._read(step, pools, by_row if self._by_row else locally))

    def _read(self, step: Step, pools: Pools, dispatch: Dispatch) -> Tensor:
        """The rows of a step, their keys and values put in pages, after the final norm: [M, D]."""
        tokens, positions, _, counted = step.rows.unbind(1)
        hidden, routings = self.model(tokens[None], positions, Past(self.config, step, pools), dispatch)
        for seen, routing in zip(self.expert_rows, routings, strict=True):
            seen.scatter_add_(0, routing.chosen.flatten(), counted[:, None].expand_as(routing.chosen).flatten())
        return hidden[0]


def likeliest_of(logits: Tensor) -> list[int]:
    """Of each row of logits [N, V] the first of the greatest, -1 where not all are finite."""
    finite = (logits * 0 == 0).all(dim=-1)
    return torch.where(finite, logits.argmax(dim=-1), -1).tolist()


def by_row(experts: ChosenExperts, x: Tensor, routing: Routing) -> Tensor:
    """A `Dispatch` for few rows on a device whose grouped product waits for the host."""
    return cast(Experts | NarrowExperts, experts).by_row(x, routing.weights, routing.chosen)


def grouped_products_wait(model: Transformer) -> bool:
    """Whether F.grouped_mm, on the GPU that holds the model, reads its offsets on the host: all but its kernel for
    bfloat16 on compute capability 9 and 10 do (GroupedBlas.cpp), and so does our loop for sizes it does not take."""
    major, _ = torch.cuda.get_device_capability(model.embed_tokens.weight.device)
    config = model.config
    aligned = config.hidden_size % 8 == 0 and config.moe_intermediate_size % 8 == 0
    return major not in (9, 10) or model.embed_tokens.weight.dtype != torch.bfloat16 or not aligned


def device_named(name: str) -> torch.device:
    """'auto' is the GPU where there is one that torch's attention for prompts takes. UsageError where one is asked for
    and there is none."""
    if name not in DEVICES:
        raise UsageError(f"device '{name}' is not offered.", f"Choose one of {', '.join(DEVICES)}.")
    there = name != "cpu" and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if name == "cuda" and not there:
        what = "There is no GPU of compute capability 8 or more that torch can use."
        raise UsageError(what, "Choose device 'cpu' or 'auto'.")
    return torch.device("cuda", torch.cuda.current_device()) if there else torch.device("cpu")
