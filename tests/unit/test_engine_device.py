"""The plain runner against the model and the compiled one, on any schedule; and what is recorded for a GPU, on a CPU.

`Tape` stands for a CUDA graph: it notes down operators with the memory that they use, and does them again.
"""

import gc
import inspect
import textwrap
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_runner import CONFIGS, STEP, a_model, a_text, plain_logits, pools_for
from test_kernels_varlen import plain_varlen
from torch import Tensor
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode

from trinity.base.errors import UsageError
from trinity.ckpt.weights import HeldWeights
from trinity.cli.main import main
from trinity.config.engine import EngineLimits
from trinity.config.model import ModelConfig
from trinity.engine.device import DeviceRunner, by_row, device_named
from trinity.engine.engine import Engine, run
from trinity.engine.graphs import CudaGraphs, Replay, rounded_rows, rounded_width
from trinity.engine.request import Request, SamplingParams, gather
from trinity.engine.runner import CompiledRunner, Runner
from trinity.engine.step import FEW, Rows
from trinity.engine.weights import decoder_weights
from trinity.kernels.compiled import is_loaded
from trinity.model.dispatch import locally
from trinity.model.generate import continue_greedily
from trinity.model.router import Routing
from trinity.model.transformer import Transformer
from trinity.text.train_bpe import train_bpe

MODELS: dict[str, Transformer] = {}
WAITING = ("_local_scalar_dense", "nonzero", "bincount", "lift_fresh", "unique", "masked_select")


class Tape(TorchDispatchMode):
    """Records operators; none may ask the host for a number or bring one from there."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in WAITING), f"{func} would have a GPU wait"
        made = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        for func, args, kwargs, made in self.done:
            again = func(*args, **kwargs)
            for old, new in zip(tree.tree_leaves(made), tree.tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Tapes:
    """A `Record` that counts."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Replay) -> Replay:
        self.recorded += 1
        with Tape() as tape:
            made = work()
        made.fill_(torch.nan)  # a GPU notes down and computes nothing

        def replay() -> Tensor:
            self.replayed += 1
            tape.replay()
            return made

        return replay


def anew(work: Replay) -> Replay:
    return work


def schedule(chance: Random, texts: list[list[int]], places: list[tuple]) -> Iterator[list[tuple[int, Rows]]]:
    """Steps in which texts are read in any company: single tokens, drafts, parts of prompts; with their numbers."""
    done = [0] * len(texts)
    while any(start < len(text) for start, text in zip(done, texts, strict=True)):
        rows = []
        for number in chance.sample(range(len(texts)), len(texts)):
            most = chance.choice([1, 1, FEW, FEW + 1, STEP])
            count = min(chance.randint(1, most), len(texts[number]) - done[number])
            if count and chance.random() < 0.8:
                part = texts[number][done[number] : done[number] + count]
                rows.append((number, Rows(part, done[number], *places[number], count)))
                done[number] += count
        if rows:
            yield rows


def read_together(runner: Runner, texts: list[list[int]], seed: int) -> list[Tensor]:
    """Logits [T, V] of each text, read in the company that the seed draws."""
    pools, places = pools_for(runner.config, len(texts), 150)
    made: list[list[Tensor]] = [[] for _ in texts]
    for step in schedule(Random(seed), texts, places):
        logits = runner.forward([one for _, one in step], pools).split([one.wanted for _, one in step])
        for (number, _), part in zip(step, logits, strict=True):
            made[number].append(part)
    return [torch.cat(parts) for parts in made]


def some_texts(config: ModelConfig, seed: int, most: int = 4) -> list[list[int]]:
    chance = Random(seed)
    return [a_text(config, chance.randint(1, 150), seed + place) for place in range(chance.randint(1, most))]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("record", [None, anew], ids=["free", "fixed"])
@settings(max_examples=6)
@given(seed=st.integers(0, 10**6))
@torch.inference_mode()
def test_any_schedule_gives_what_the_model_does(name: str, record, seed: int):
    model = MODELS.setdefault(name, a_model(CONFIGS[name]))
    texts = some_texts(model.config, seed)
    for text, found in zip(texts, read_together(DeviceRunner(model, record), texts, seed), strict=True):
        torch.testing.assert_close(found, plain_logits(model, text), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not is_loaded(), reason="no C++ compiler here")
@torch.inference_mode()
def test_experts_are_counted_as_the_compiled_runner_does():
    """With 19 rows, which are filled up to 24: what fills a place counts for nothing."""
    model = a_model(CONFIGS["debug"])
    compiled = CompiledRunner(decoder_weights(model.config, HeldWeights(model.state_dict()), "float32"))
    runners = [DeviceRunner(model), DeviceRunner(model, anew), compiled]
    texts = [a_text(model.config, 2, number) for number in range(19)]
    made = []
    for runner in runners:
        pools, places = pools_for(model.config, 19, 2)
        for at in range(2):
            rows = [Rows(text[at : at + 1], at, *place) for text, place in zip(texts, places, strict=True)]
            made.append(runner.forward(rows, pools))
        assert torch.equal(runner.expert_rows, runners[0].expert_rows)
    for one, other in zip(made[:2] * 2, made[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dispatch", [locally, by_row])
@torch.inference_mode()
def test_a_recording_computes_what_its_step_does(dispatch):
    """In bfloat16, where no kernel for CPUs steps in: the operators are those of a GPU. To the bit."""
    model = a_model(CONFIGS["debug"])
    for name, parameter in model.named_parameters():
        if "norm" not in name and "router" not in name:
            parameter.data = parameter.bfloat16()
    texts = [a_text(model.config, 70, number) for number in range(3)]
    tapes, made = Tapes(), []
    for record in (anew, tapes):
        runner = DeviceRunner(model, record)
        runner._by_row = dispatch is by_row  # as a GPU whose grouped product waits
        pools, places = pools_for(model.config, 3, 70)
        for text, place in zip(texts, places, strict=True):
            runner.forward([Rows(text[:50], 0, *place, 0)], pools)
        made += [
            runner.forward([Rows([t[at]], at, *p) for t, p in zip(texts, places, strict=True)], pools)
            for at in range(50, 70)
        ]
    # 14 steps see one page and 6 see two; the first of each shape is run as it is.
    assert (tapes.recorded, tapes.replayed) == (2, 13 + 5)
    for anew_made, replayed in zip(made[:20], made[20:], strict=True):
        assert torch.equal(anew_made, replayed)
        assert torch.isfinite(replayed).all()


def test_the_tape_refuses_what_waits():
    with pytest.raises(AssertionError, match="wait"), Tape():
        torch.ones(1).item()


@torch.inference_mode()
def test_recordings_go_with_their_pools():
    def once(work: Replay) -> Replay:
        made = work()  # a graph knows memory by address, and keeps none of the pools'
        return lambda: made

    runner = DeviceRunner(a_model(CONFIGS["debug"]), once)
    pools, [place] = pools_for(runner.config, 1, 9)
    for at in range(3):
        runner.forward([Rows([5], at, *place)], pools)
    assert list(runner._repeated[pools]) == [(1, 1)]
    gone = weakref.ref(pools)
    del pools
    gc.collect()
    assert gone() is None and not runner._repeated


@torch.inference_mode()
def test_of_many_shapes_those_are_kept_that_came_last(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trinity.engine.device.MOST_SHAPES", 2)
    runner = DeviceRunner(a_model(CONFIGS["debug"]), lambda work: work)
    pools, [*places] = pools_for(runner.config, 3, 9)
    for count in (1, 2, 1, 3):
        runner.forward([Rows([5], 0, *place) for place in places[:count]], pools)
    assert list(runner._repeated[pools]) == [(1, 1), (3, 1)]


def test_memory_that_recordings_share_is_not_asked_for_again_once_all_have_gone(monkeypatch: pytest.MonkeyPatch):
    """As torch's allocator has it: "use_count > 0 INTERNAL ASSERT FAILED" where no graph holds what it once made."""
    users: dict[int, int] = {}

    class Graph:
        def replay(self) -> None:
            """Nothing: what it makes was made when it was noted down."""

    @contextmanager
    def capture(graph: Graph, pool: int, capture_error_mode: str) -> Iterator[None]:
        assert users.get(pool) != 0, "no graph lives in that memory"
        users[pool] = users.get(pool, 0) + 1
        weakref.finalize(graph, lambda: users.update({pool: users[pool] - 1}))
        yield

    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: len(users) + 1)
    monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
    monkeypatch.setattr("torch.cuda.graph", capture)
    monkeypatch.setattr("torch.cuda.device", lambda _: nullcontext())
    record = CudaGraphs(torch.device("cuda", 0))
    kept = [record(partial(torch.ones, 5)) for _ in range(2)]
    assert users == {1: 2}  # they share it
    del kept[0]
    kept.append(record(partial(torch.ones, 7)))
    assert users == {1: 2}  # the second still lives
    one, other = (repeat() for repeat in kept)
    assert len(one) == 5 and len(other) == 7 and one.data_ptr() == other.data_ptr() and one.sum() == 5
    kept.clear()
    kept.append(record(partial(torch.ones, 5)))
    assert users == {1: 0, 2: 1} and kept[0]().data_ptr() != one.data_ptr()


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_prompts_as_a_gpu_reads_them(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trinity.engine.past.takes", lambda q: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
    model = MODELS.setdefault(name, a_model(CONFIGS[name]))
    texts = some_texts(model.config, 5)
    for text, found in zip(texts, read_together(DeviceRunner(model), texts, 5), strict=True):
        torch.testing.assert_close(found, plain_logits(model, text), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("record", [None, Tapes()], ids=["free", "recorded"])
def test_answers_equal_the_oracle_with_hits_drafts_and_company(record):
    tokenizer = train_bpe([inspect.getsource(textwrap)], 512)
    config = replace(CONFIGS["debug"], max_position_embeddings=400)
    model = a_model(config)
    limits = EngineLimits(max_active=3, step_tokens=STEP, draft_tokens=4)
    engine = Engine(DeviceRunner(model, record), tokenizer, frozenset(), limits)
    begin = a_text(config, 130)
    prompts = [[*begin, *a_text(config, 5, number)] for number in range(4)] + [[7, 8, 9] * 6]
    for _ in range(2):
        requests = [Request(prompt=tuple(p), sampling=SamplingParams(max_new_tokens=24)) for p in prompts]
        pieces = run(engine, requests)
        for prompt, one in zip(prompts, pieces, strict=True):
            assert gather(one, len(prompt)).token_ids == continue_greedily(model, prompt, 24)
    assert engine.prefix.lookups["hit"] > 0 and engine.drafts_taken > 0
    if record is not None:
        assert record.replayed > record.recorded > 0


@given(rows=st.integers(1, 12), top=st.integers(1, 4), seed=st.integers(0, 99))
@torch.inference_mode()
def test_experts_one_by_one_equal_the_grouped(rows: int, top: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    experts = MODELS.setdefault("debug", a_model(CONFIGS["debug"])).layers[-1].mlp.experts
    x = torch.randn(rows, experts.down_proj.shape[1], generator=generator)
    scores = torch.rand(rows, len(experts.down_proj), generator=generator)
    weights, chosen = scores.topk(top)
    routing = Routing(chosen, weights, scores)
    torch.testing.assert_close(by_row(experts, x, routing), locally(experts, x, routing), rtol=1e-4, atol=1e-6)


@given(st.integers(1, 5000))
def test_shapes_are_few_and_large_enough(number: int):
    assert number <= rounded_width(number) <= max(number, 1.5 * number)
    assert number <= rounded_rows(number) < number + 8 and (number > 16 or rounded_rows(number) == number)
    assert len({rounded_width(n) for n in range(1, number + 1)}) <= 2 * number.bit_length()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]):
    assert device_named("auto") == device_named("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="'gpu' is not offered"):
        device_named("gpu")
    assert main(["generate", "nowhere", "--prompt", "a", "--device", "cuda"]) != 0
    assert capsys.readouterr().err.strip().splitlines() == [
        "trinity generate: There is no GPU of compute capability 8 or more that torch can use. "
        "Choose device 'cpu' or 'auto'."
    ]


@pytest.mark.parametrize(("capability", "taken"), [((7, 5), "cpu"), ((8, 0), "cuda"), ((12, 0), "cuda")])
def test_a_gpu_without_the_attention_for_prompts_is_not_taken(capability, taken, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    assert device_named("auto").type == taken and device_named("cpu").type == "cpu"
    if taken == "cpu":
        with pytest.raises(UsageError, match="no GPU of compute capability 8 or more"):
            device_named("cuda")
