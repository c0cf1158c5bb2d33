"""The planner's formulas beside the running code: FLOPs, what autograd keeps, what a step sends."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from trinity.config.load import override
from trinity.config.run import RunConfig
from trinity.kernels import compiled
from trinity.model import experts
from trinity.model.attend import Packed
from trinity.model.init import build_model
from trinity.model.transformer import Transformer
from trinity.optim.orthogonalise import orthogonalise
from trinity.plan.flops import attention_flops, forward_flops, newton_schulz_flops
from trinity.plan.layout import Kernels, Layout
from trinity.plan.memory import activation_bytes
from trinity.plan.params import count_parameters, layer_kinds
from trinity.plan.wire import transfers
from trinity.recipes.table import recipe

ROWS = 2


def small(*settings: str) -> RunConfig:
    return override(recipe("debug"), [f"train.microbatch_rows={ROWS}", *settings])


def hidden_of(run: RunConfig, model: Transformer) -> torch.Tensor:
    length = run.data.sequence_length
    tokens = torch.randint(run.model.vocab_size, (ROWS, length))
    return model(tokens, attend=Packed(torch.zeros(ROWS, length, dtype=torch.int64))).hidden


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain twins of the kernels, whose FLOPs torch can count."""
    monkeypatch.setattr(compiled, "is_loaded", lambda: False)
    monkeypatch.setattr(experts, "grouped_matmul", experts.grouped_matmul_loop)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("length", [32, 64, 128])
def test_forward_flops_are_what_torch_counts(length: int):
    """Rows shorter than two windows and longer; the weighting of experts' outputs is no matrix of the model."""
    run = small(f"data.sequence_length={length}")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden_of(run, build_model(run.model, 0))
    count = count_parameters(run.model)
    combined = run.model.num_sparse_layers * run.model.num_experts_per_tok * run.model.hidden_size
    token = 2 * (count.multiplied - count.head + combined) + attention_flops(run.model, length, read=True)
    assert counter.get_total_flops() == ROWS * length * token
    assert forward_flops(run.model, length) <= forward_flops(run.model, length, read=True)


@pytest.mark.usefixtures("plain")
def test_newton_schulz_flops_are_what_torch_counts():
    run = small()
    counted = 0
    for layers, weights in layer_kinds(run.model):
        for weight in weights:
            if weight.by_muon:
                with FlopCounterMode(display=False) as counter:
                    orthogonalise(torch.randn(weight.shape), run.optim.newton_schulz_steps)
                counted += layers * counter.get_total_flops()
    assert counted == sum(newton_schulz_flops(run.model, run.optim))


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("model.sliding_window=96",),
        ("model.num_key_value_heads=4", "data.sequence_length=64"),
        ("model.num_dense_layers=4",),
        ("model.num_dense_layers=0", "model.num_experts_per_tok=4", "model.global_attn_every_n_layers=2"),
        ("model.hidden_size=128", "model.moe_intermediate_size=96", "model.num_shared_experts=0"),
    ],
)
@pytest.mark.parametrize("kernels", ["plain", "cpu"])
def test_activations_are_what_autograd_keeps(
    settings: tuple[str, ...], kernels: Kernels, monkeypatch: pytest.MonkeyPatch
):
    """Every tensor that a forward pass saves, each storage once, weights left out."""
    if kernels == "plain":
        monkeypatch.setattr(compiled, "is_loaded", lambda: False)
    elif not compiled.is_loaded():
        pytest.skip("no C++ compiler here")
    run = small(*settings)
    model, kept = build_model(run.model, 0), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = hidden_of(run, model)
    hidden_bytes = hidden.numel() * 4  # the final norm's output, which the loss keeps
    planned = activation_bytes(run, Layout(microbatch_rows=ROWS), kernels) - hidden_bytes
    assert planned == pytest.approx(sum(kept.values()), rel=0.04)


class Collectives(TorchDispatchMode):
    """Bytes of the whole tensor of every collective, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d."):
            flat = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
            kind = name.split(".")[1].strip("_")
            whole = max if "gather" in kind or "scatter" in kind else (lambda sizes: sizes[-1])
            self.bytes[kind] += whole([x.numel() * x.element_size() for x in flat])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("replicate", "shard", "expert", "remat", "precision"),
    [(1, 4, 1, "none", "float32"), (2, 2, 1, "none", "float32"), (1, 4, 2, "block", "float32"),
     (1, 4, 1, "none", "bfloat16")],
)  # fmt: skip
def test_a_step_sends_what_the_plan_says(replicate: int, shard: int, expert: int, remat: str, precision: str):
    """One process of a fake group of four walks forward and backward; gathers and sums are counted in whole tensors."""
    from trinity.model.loss import chunked_loss
    from trinity.parallel.apply import parallelise
    from trinity.parallel.expert import forced_balance
    from trinity.parallel.mesh import layout as layout_of
    from trinity.parallel.mesh import world_of

    run = small(f"parallel.replicate={replicate}", f"parallel.shard={shard}", f"parallel.expert={expert}",
                f"parallel.remat={remat}", f"parallel.precision={precision}", "data.sequence_length=64")  # fmt: skip
    step = override(run, [f"train.batch_tokens={ROWS * 64 * replicate * shard}"])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        world = world_of(layout_of(step, 4), 0, torch.device("cpu"))
        model = build_model(run.model, 0)
        parallelise(model, run.parallel, world)
        tokens = torch.randint(run.model.vocab_size, (ROWS, 64))
        with Collectives() as counted:
            attend = Packed(torch.zeros(ROWS, 64, dtype=torch.int64))
            output = model(tokens, attend=attend, dispatch=forced_balance(world))
            head, targets = model.lm_head.weight, tokens.flatten()
            chunked_loss(output.hidden.flatten(0, 1), head, targets, 0.0, divisor=1.0)[0].backward()
    finally:
        dist.destroy_process_group()
    layout = Layout(replicate, shard, 1, expert, ROWS, remat, precision)
    planned: Counter[str] = Counter()
    for transfer in transfers(step, layout):
        if "weights" in transfer.purpose or "experts gathered" in transfer.purpose or "experts'" in transfer.purpose:
            planned[transfer.collective] += int(transfer.payload)
    seen = {
        "all-gather": sum(n for kind, n in counted.bytes.items() if "allgather" in kind),
        "reduce-scatter": sum(n for kind, n in counted.bytes.items() if "reduce_scatter" in kind),
        "all-reduce": counted.bytes["allreduce"],
    }
    assert seen["all-gather"] and seen["reduce-scatter"] and bool(seen["all-reduce"]) == (replicate > 1)
    assert {kind: planned[kind] for kind in seen} == pytest.approx(seen, rel=0.02), dict(counted.bytes)
