"""The model's own modules with weights of fewer bits, for a GPU: of 8 or 4 bits, or float8.

8 and 4 bits are the whole numbers and the float16 scales that the compiled decoder computes with (weights.py); inputs
keep their precision. Where few rows meet a matrix, one kernel multiplies the numbers as it reads them: torch.compile
writes it, in Triton. Where many do, the matrix becomes as wide as they first, of experts all of a layer.

float8 is e4m3 with a float32 scale for each output. Inputs are rounded as well, with a scale for each row, and torch's
own kernels multiply the two: `F.scaled_mm`, and for experts `F.scaled_grouped_mm`, of compute capability 9.

Shapes: M rows, I inputs, O outputs, E experts, K chosen, D width, F hidden width.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trinity.base.errors import CheckpointError, UsageError
from trinity.ckpt.weights import Weights, keep_precision
from trinity.config.model import ModelConfig
from trinity.engine.weights import Kind, fitted, head_kind, packed, unpaneled
from trinity.model.experts import Experts, one_by_one, routed, through_experts
from trinity.model.init import build_on_meta
from trinity.model.layers import Linear
from trinity.model.transformer import Transformer
from trinity.plan.inference import GROUP

NarrowKind = Literal["float8", "int8", "int4"]
FEW = 8  # rows that multiply a matrix as it is read: each reads all of it again, if from a cache
FLOAT8 = torch.float8_e4m3fn
FLOAT8_MOST = torch.finfo(FLOAT8).max  # 448
FLOAT8_STEP = 16  # what its kernels' sizes are multiples of
Parts = tuple[Tensor, Tensor]  # numbers and scales
BY_ROW = F.ScalingType.RowWise


def rounded(matrices: Tensor, kind: NarrowKind, name: str = "A matrix") -> Parts:
    """[..., O, I] -> numbers and scales: int8 [..., O, I] or, two of a row's neighbours a byte, uint8 [..., O, I / 2],
    and float16 [..., O, I / 32]; float8 [..., O, I] and float32 [..., O]. CheckpointError where they cannot keep it."""
    if kind == "float8":
        numbers, scales = rounded_rows(matrices.float())
        if not scales.isfinite().all():
            raise CheckpointError(f"{name} has values that are no numbers.", "Its weights are damaged.")
        return numbers, scales
    outputs, depth = matrices.shape[-2:]
    whole, scales = unpaneled(packed(matrices, kind, name), outputs, depth, kind)
    if kind == "int4":
        pairs = (whole + 8).to(torch.uint8).unflatten(-1, (-1, 2))
        whole = pairs[..., 0] | pairs[..., 1] << 4
    return whole.contiguous(), scales.contiguous()


def rounded_rows(x: Tensor) -> Parts:
    """[..., I] -> float8 [..., I] and the float32 scale of each row [...]."""
    scales = (x.abs().amax(-1).float() / FLOAT8_MOST).clamp(min=1e-30)
    return (x / scales.unsqueeze(-1)).to(FLOAT8), scales


def _halves(numbers: Tensor, scales: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Whole numbers as float32 [..., O, I / n, n], and their scales [..., O, I / n, 1]: all of a row or, of 4 bits, its
    even and its odd places. They are never put together here: a compiler would write them down for it."""
    parts = [numbers] if numbers.dtype == torch.int8 else [(numbers & 15), (numbers >> 4)]
    less, size = (0, GROUP) if len(parts) == 1 else (8, GROUP // 2)
    return [(part.float().sub(less).unflatten(-1, (-1, size)), scales.float().unsqueeze(-1)) for part in parts]


def widened(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole numbers and scales -> [..., O, I]."""
    halves = [(part * scale).flatten(-2).to(dtype) for part, scale in _halves(numbers, scales)]
    return halves[0] if len(halves) == 1 else torch.stack(halves, dim=-1).flatten(-2)


def weighed(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """x [..., 1, I] -> [..., O]: products and their sum, in float32, that become one kernel."""
    halves = _halves(numbers, scales)
    places = [x] if len(halves) == 1 else [*x.unflatten(-1, (-1, 2)).unbind(-1)]
    size = GROUP // len(halves)
    made = [at.unflatten(-1, (-1, size)) * part * scale for at, (part, scale) in zip(places, halves, strict=True)]
    return (made[0] if len(made) == 1 else made[0] + made[1]).sum((-2, -1))


def product_of_few(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """x [M, I] -> [M, O]: `F.linear(x, widened(...))`, in that form."""
    return weighed(x.float().unsqueeze(1), numbers, scales).to(x.dtype)


def experts_of_few(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Parts, down: Parts) -> Tensor:
    """x [M, D], weights and chosen [M, K] -> [M, D]: `one_by_one` in that form, a reading of each row's experts."""

    def product(rows: Tensor, stack: Parts) -> Tensor:
        numbers, scales = (part.flatten(1, -2).index_select(0, chosen.flatten()) for part in stack)
        return weighed(rows.unsqueeze(1), numbers, scales)

    rows = product(x.float().repeat_interleave(chosen.shape[1], dim=0), gate_up)
    gate, up = rows.to(x.dtype).chunk(2, dim=-1)
    rows = product((F.silu(gate) * up).float(), down)
    return (rows.unflatten(0, chosen.shape) * weights.unsqueeze(-1)).sum(1).to(x.dtype)


Args = ParamSpec("Args")
Made = TypeVar("Made")


def fused(function: Callable[Args, Made]) -> Callable[Args, Made]:
    """The function as torch compiles it for the shapes that come, with sizes left open once they have changed."""
    return _compiled(function)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, recompile_limit=64)  # pyright: ignore[reportCallIssue]


def fuses(device: torch.device) -> bool:
    """Whether torch's kernels are written here: elsewhere twins of its operators do their work."""
    return device.type == "cuda"


def _wide(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    if not fuses(numbers.device):
        return widened(numbers, scales, dtype)
    made = fused(widened)(numbers.flatten(0, -2), scales.flatten(0, -2), dtype)  # one form for stacks and matrices
    return made.unflatten(0, numbers.shape[:-1])


class NarrowLinear(nn.Module):
    """A linear map of 8 or 4 bits. Its buffers have no memory before `take`."""

    def __init__(self, outputs: int, inputs: int, kind: NarrowKind) -> None:
        super().__init__()
        self.kind: NarrowKind = kind
        self.numbers, self.scales = _buffers(self, "", (outputs, inputs), kind)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        rows = x.flatten(0, -2)
        if len(rows) <= FEW and fuses(x.device):
            made = fused(product_of_few)(rows, self.numbers, self.scales)
        else:
            made = F.linear(rows, _wide(self.numbers, self.scales, x.dtype))
        return made.unflatten(0, x.shape[:-1])


class NarrowExperts(nn.Module):
    """Routed experts of 8 or 4 bits: see `Experts`."""

    def __init__(self, experts: int, width: int, hidden: int, kind: NarrowKind) -> None:
        super().__init__()
        self.gate_up_numbers, self.gate_up_scales = _buffers(self, "gate_up_", (experts, 2, hidden, width), kind)
        self.down_numbers, self.down_scales = _buffers(self, "down_", (experts, width, hidden), kind)

    def forward(self, x: Tensor, weights: Tensor | None, order: Tensor, ends: Tensor) -> Tensor:
        gate_up = _wide(self.gate_up_numbers, self.gate_up_scales, x.dtype)
        return through_experts(x, weights, order, ends, gate_up, _wide(self.down_numbers, self.down_scales, x.dtype))

    def by_row(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        if not fuses(x.device):
            return one_by_one(x, weights, chosen, self.chosen)
        gate_up, down = (self.gate_up_numbers, self.gate_up_scales), (self.down_numbers, self.down_scales)
        return fused(experts_of_few)(x, weights, chosen, gate_up, down)

    def chosen(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row the matrices of an expert, in float32."""
        stacks = ((self.gate_up_numbers, self.gate_up_scales), (self.down_numbers, self.down_scales))
        gate_up, down = (
            widened(numbers.index_select(0, choice), scales.index_select(0, choice), torch.float32)
            for numbers, scales in stacks
        )
        return gate_up, down


class Float8Linear(nn.Module):
    """A linear map of float8. Its buffers have no memory before `take`."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.kind: NarrowKind = "float8"
        self.numbers, self.scales = _buffers(self, "", (outputs, inputs), self.kind)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        rows, scales = _rounded(x.flatten(0, -2))
        return scaled_product(rows, scales, self.numbers, self.scales, x.dtype).unflatten(0, x.shape[:-1])


class Float8Experts(nn.Module):
    """Routed experts of float8: see `Experts`."""

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_numbers, self.gate_up_scales = _buffers(self, "gate_up_", (experts, 2, hidden, width), "float8")
        self.down_numbers, self.down_scales = _buffers(self, "down_", (experts, width, hidden), "float8")

    def forward(self, x: Tensor, weights: Tensor | None, order: Tensor, ends: Tensor) -> Tensor:
        def product(numbers: Tensor, scales: Tensor) -> Callable[[Tensor], Tensor]:
            multiply = scaled_grouped_product if x.is_cuda else scaled_grouped_loop
            return lambda rows: multiply(*_rounded(rows), numbers, scales, ends, rows.dtype)

        gate_up = product(self.gate_up_numbers.flatten(1, 2), self.gate_up_scales.flatten(1, 2))
        return routed(x, weights, order, gate_up, product(self.down_numbers, self.down_scales))


def _rounded(rows: Tensor) -> Parts:
    return (fused(rounded_rows) if fuses(rows.device) else rounded_rows)(rows)


def scaled_product(x: Tensor, x_scales: Tensor, numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """float8 x [M, I] and numbers [O, I], a scale for each row of both -> [M, O] of `dtype`."""
    made = F.scaled_mm(
        x, numbers.T, x_scales.unsqueeze(1), BY_ROW, scales.unsqueeze(0), BY_ROW, output_dtype=torch.bfloat16
    )
    return made.to(dtype)


def scaled_grouped_product(
    x: Tensor, x_scales: Tensor, numbers: Tensor, scales: Tensor, ends: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same for each expert's stretch of rows: numbers [E, O, I], scales [E, O], ends [E] cumulative counts."""
    made = F.scaled_grouped_mm(  # pyright: ignore[reportAttributeAccessIssue]
        x, numbers.transpose(1, 2), x_scales, BY_ROW, scales, BY_ROW,
        offs=ends.to(torch.int32), output_dtype=torch.bfloat16,
    )  # fmt: skip
    return made.to(dtype)


def scaled_grouped_loop(
    x: Tensor, x_scales: Tensor, numbers: Tensor, scales: Tensor, ends: Tensor, dtype: torch.dtype
) -> Tensor:
    """The twin of `scaled_grouped_product`, which a CPU lacks."""
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    parts = zip(x.split(sizes), x_scales.split(sizes), numbers, scales, strict=True)
    return torch.cat([scaled_product(*part, dtype) for part in parts if len(part[0])])


def _buffers(module: nn.Module, prefix: str, shape: tuple[int, ...], kind: NarrowKind) -> Parts:
    """Numbers and scales of a matrix or a stack of them, without memory."""
    *stack, inputs = shape
    if kind == "float8":
        numbers = torch.empty(shape, dtype=FLOAT8, device="meta")
        scales = torch.empty(stack, dtype=torch.float32, device="meta")
    else:
        a_byte, dtype = (2, torch.uint8) if kind == "int4" else (1, torch.int8)
        numbers = torch.empty(*stack, inputs // a_byte, dtype=dtype, device="meta")
        scales = torch.empty(*stack, inputs // GROUP, dtype=torch.float16, device="meta")
    module.register_buffer(f"{prefix}numbers", numbers)
    module.register_buffer(f"{prefix}scales", scales)
    return numbers, scales


def narrow_on_meta(config: ModelConfig, kind: NarrowKind) -> Transformer:
    """The model without memory, its matrices of `kind` where their sizes allow it. Routers and embeddings stay, and
    so does the head of float8; that of 4 bits has 8, as in the compiled decoder."""
    model = build_on_meta(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            width, hidden = config.hidden_size, config.moe_intermediate_size
            if _fits(kind, width, hidden) and _fits(kind, 2 * hidden, width):
                stacks = (config.num_experts, width, hidden)
                model.set_submodule(name, Float8Experts(*stacks) if kind == "float8" else NarrowExperts(*stacks, kind))
        elif isinstance(module, Linear) and not name.endswith("router.gate"):
            its = cast(NarrowKind, head_kind(cast(Kind, kind))) if name == "lm_head" else kind
            if not _fits(its, module.out_features, module.in_features) or (name == "lm_head" and kind == "float8"):
                continue
            shape = (module.out_features, module.in_features)
            model.set_submodule(name, Float8Linear(*shape) if its == "float8" else NarrowLinear(*shape, its))
    return model


def _fits(kind: NarrowKind, outputs: int, inputs: int) -> bool:
    if kind == "float8":
        return outputs % FLOAT8_STEP == 0 and inputs % FLOAT8_STEP == 0
    return fitted(kind, inputs) == kind


def narrow_bytes(config: ModelConfig, kind: NarrowKind) -> int:
    """Of all tensors of `narrow_model`."""
    return sum(tensor.nbytes for tensor in _state(narrow_on_meta(config, kind)).values())


def widest_bytes(model: Transformer) -> int:
    """What is made and dropped again where many rows meet a matrix, or the experts of a layer: these in bfloat16."""
    scales = [sum(b.numel() for b in module.buffers() if b.dtype == torch.float16) for _, module in _narrow(model)]
    return 2 * GROUP * max(scales, default=0)


def _state(model: Transformer) -> dict[str, Tensor]:
    """What the model holds, on meta, in the precision that it is held in."""
    own = {f"{name}.{buffer}" for name, module in _narrow(model) for buffer, _ in module.named_buffers()}
    return {
        name: tensor if name in own else keep_precision(name, tensor, torch.bfloat16)
        for name, tensor in model.state_dict().items()
    }


def _narrow(model: Transformer) -> list[tuple[str, nn.Module]]:
    kinds = NarrowLinear | NarrowExperts | Float8Linear | Float8Experts
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


@torch.no_grad()
def narrow_model(
    config: ModelConfig,
    weights: Weights,
    kind: NarrowKind,
    device: torch.device,
    advance: Callable[[int], None] = lambda _: None,
) -> Transformer:
    """The model on a device, what is not of `kind` in bfloat16, but for what is float32 in any case.

    On the way a tensor is in memory at a time. `advance` is told bytes that were made.
    """
    model = narrow_on_meta(config, kind)
    state = {name: torch.empty_like(tensor, device=device) for name, tensor in _state(model).items()}
    for (name, expert), part in _parts(model, weights, kind):
        into = state[name] if expert is None else state[name][expert]
        into.copy_(part)
        advance(into.nbytes)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _parts(model: Transformer, weights: Weights, kind: NarrowKind) -> Iterator[tuple[tuple[str, int | None], Tensor]]:
    """Every tensor of the model, or an expert's part of it: its name, the expert, and its values."""
    narrow = dict(_narrow(model))
    for name, module in narrow.items():
        if isinstance(module, NarrowLinear | Float8Linear):
            parts = rounded(weights.tensor(f"{name}.weight"), module.kind, name)
            for part, what in zip(parts, ("numbers", "scales"), strict=True):
                yield (f"{name}.{what}", None), part
            continue
        for stack in ("gate_up", "down"):
            for expert, matrices in enumerate(weights.experts(f"{name}.{stack}_proj")):
                for part, what in zip(rounded(matrices, kind, name), ("numbers", "scales"), strict=True):
                    yield (f"{name}.{stack}_{what}", expert), part
    for name in model.state_dict():
        if name.rpartition(".")[0] not in narrow:
            yield (name, None), weights.tensor(name)


def check_kernels(device: torch.device) -> None:
    """UsageError where torch.compile can write no kernels for this device; a first step would tell it at length."""
    numbers = torch.zeros(2, GROUP, dtype=torch.int8, device=device)
    try:
        fused(widened)(numbers, numbers[:, :1].half(), torch.bfloat16)
    except RuntimeError as error:
        reason = str(error).removeprefix("backend='inductor' raised:\n").partition("\n")[0].rstrip(".")
        raise UsageError(
            f"torch.compile writes no kernels here, which fewer bits need: {reason}.",
            "Install Triton and a C compiler such as gcc, or use --dtype bfloat16.",
        ) from error


def check_float8(device: torch.device) -> None:
    """UsageError where this device has no kernels for float8."""
    if device.type != "cuda":
        raise UsageError("float8 is for GPUs.", "Use --device cuda where there is one, or --dtype int8.")
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        raise UsageError(
            f"float8 needs a GPU of compute capability 9; this one has {major}.{minor}.",
            "Use --dtype int8 or bfloat16.",
        )
