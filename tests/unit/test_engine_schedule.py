"""Many requests at once: whatever the schedule, each answer is what it is alone, and nothing is left behind."""

from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.base.errors import ConfigError, RequestError, UsageError
from trinity.config.engine import EngineLimits, KvDtype
from trinity.config.serve import ServeConfig
from trinity.engine.engine import Engine, run
from trinity.engine.pages import PAGE, Pools, kv_bytes_per_token, pages_for
from trinity.engine.request import Generation, Piece, Request, SamplingParams, gather
from trinity.engine.runner import Output, Rows, Runner, runner_for
from trinity.kernels.compiled import is_loaded
from trinity.model.init import build_model
from trinity.recipes.table import recipe
from trinity.text.tokenizer import Tokenizer
from trinity.text.train_bpe import train_bpe

CONFIG = replace(recipe("debug").model, sliding_window=80, max_position_embeddings=600, num_hidden_layers=4)
END = frozenset({50})

pytestmark = pytest.mark.skipif(not is_loaded(), reason="no C++ compiler here: results are equal to rounding only")


@pytest.fixture(scope="module")
def runner() -> Runner:
    return runner_for(build_model(CONFIG, 3).eval().requires_grad_(False))


@pytest.fixture(scope="module")
def wide() -> Runner:
    """Heads for the matrix unit, where the processor has it."""
    return runner_for(build_model(replace(CONFIG, head_dim=64), 3).eval().requires_grad_(False))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["some words and more words, 12345\n" * 20], 300)


def page_bytes(pages: int) -> int:
    return pages * PAGE * kv_bytes_per_token(CONFIG)


def ask(prompt: list[int], client: str = "", **sampling: object) -> Request:
    return Request(prompt=tuple(prompt), sampling=SamplingParams(**sampling), client=client)  # type: ignore[arg-type]


def whole(pieces: list[Piece], request: Request) -> Generation:
    return gather(pieces, len(request.prompt))


def alone(runner: Runner, tokenizer: Tokenizer, request: Request, kv_dtype: KvDtype = "float32") -> Generation:
    limits = EngineLimits(max_active=1, window_bytes=0, step_tokens=600, kv_dtype=kv_dtype)
    return whole(run(Engine(runner, tokenizer, END, limits), [request])[0], request)


def left_over(engine: Engine) -> int:
    """Pages and rings in use once the prefix cache has forgotten all texts."""
    assert not engine.busy and engine.kv_bytes() == 0
    engine.prefix.clear()
    assert not engine.prefix.nodes and not engine.prefix.windows
    return engine.pools.paged.in_use + engine.pools.local.in_use


def some_requests(chance: Random) -> list[Request]:
    """Texts of which some begin alike, of some clients, under all kinds of sampling."""
    stems = [[chance.randrange(64, 300) for _ in range(chance.randrange(1, 260))] for _ in range(3)]
    requests = []
    for number in range(chance.randrange(2, 7)):
        prompt = chance.choice(stems) + [chance.randrange(64, 300) for _ in range(chance.randrange(0, 40))]
        if chance.random() < 0.3:
            prompt = (prompt[-9:] * 20)[:150]  # something to draft from
        sampling = {
            "max_new_tokens": chance.randrange(1, 40), "temperature": chance.choice([0.0, 0.0, 0.7]), "seed": number,
            "logprobs": chance.choice([None, 2]), "prompt_logprobs": chance.choice([None, None, 1]),
            "repetition_penalty": chance.choice([1.0, 1.3]), "top_p": chance.choice([1.0, 0.9]),
        }  # fmt: skip
        requests.append(ask(prompt, chance.choice("ab"), **sampling))
    return requests


class CountingRunner:
    """Counts the rows it is given in each step."""

    def __init__(self, runner: Runner) -> None:
        self._runner, self.rows = runner, []

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)

    def read(self, rows: list[Rows], pools: Pools) -> Output:
        self.rows.append(sum(len(one.tokens) for one in rows))
        return self._runner.read(rows, pools)


def rows_of(runner: Runner, tokenizer: Tokenizer, requests: list[Request], **limits: int) -> tuple[list[int], Engine]:
    """How many rows each step reads; the answers are those of each request alone."""
    engine = Engine(counting := CountingRunner(runner), tokenizer, END, EngineLimits(**limits))  # type: ignore[arg-type]
    for request, pieces in zip(requests, run(engine, requests), strict=True):
        assert whole(pieces, request) == alone(runner, tokenizer, request)
    assert left_over(engine) == 0
    return counting.rows, engine


@pytest.mark.parametrize("extra", [0, 9])
def test_the_choices_of_one_prompt_read_it_once(runner, tokenizer, extra: int):
    """All but the last page of one that ends with a page: its last token is read again, for the logits behind it."""
    prompt = [64 + n * n % 211 for n in range(8 * PAGE + extra)]
    requests = [ask(prompt, max_new_tokens=1, temperature=0.8, seed=seed, logprobs=2) for seed in range(4)]
    found = (len(prompt) - 1) // PAGE * PAGE
    rows, engine = rows_of(runner, tokenizer, requests)
    assert sum(rows) == len(prompt) + 3 * (len(prompt) - found)
    assert engine.prefix.lookups == {"hit": 3, "unknown": 1, "given_up": 0, "no_window": 0}
    assert (engine.prefix.tokens_asked, engine.prefix.tokens_found) == (4 * len(prompt), 3 * found)
    rows, _ = rows_of(runner, tokenizer, requests, window_bytes=0)
    assert sum(rows) == 4 * len(prompt), "where no window can be kept nobody waits"
    scored = [replace(one, sampling=replace(one.sampling, prompt_logprobs=0)) for one in requests]
    assert sum(rows_of(runner, tokenizer, scored)[0]) == 4 * len(prompt), "nor for or with a prompt that is scored"


def test_texts_that_part_wait_as_far_as_they_are_alike_and_others_do_not(runner, tokenizer):
    stem = [64 + n * n % 211 for n in range(3 * PAGE + 20)]
    alike = [ask(stem + [end] * 60, "a", max_new_tokens=1) for end in (70, 90, 110)]
    other, foreign = ask([99] * 40, "a", max_new_tokens=1), ask(alike[0].prompt[:130], "b", max_new_tokens=1)  # type: ignore[arg-type]
    rows, engine = rows_of(runner, tokenizer, [*alike, other, foreign])
    assert rows == [272 + 40 + 130, 2 * (272 - 3 * PAGE)]
    assert engine.prefix.lookups == {"hit": 2, "unknown": 3, "given_up": 0, "no_window": 0}


@pytest.mark.parametrize("end", ["abort", "error"])
def test_who_waited_for_a_text_reads_it_where_its_reader_is_gone(runner, tokenizer, end: str):
    damaged = build_model(CONFIG, 3).eval().requires_grad_(False)
    damaged.embed_tokens.weight[301] = torch.nan
    counting = CountingRunner(runner_for(damaged))
    engine = Engine(counting, tokenizer, END, EngineLimits(step_tokens=512 if end == "error" else 90))  # type: ignore[arg-type]
    stem = [64 + n * n % 211 for n in range(3 * PAGE)]
    first, asked = engine.submit(ask([*stem, 301 if end == "error" else 70])), ask([*stem, 80], max_new_tokens=5)
    others = [engine.submit(asked) for _ in range(2)]
    pieces = engine.step()
    assert counting.rows == [3 * PAGE + 1 if end == "error" else 90], "the others wait"
    assert [piece.finish_reason for piece in pieces] == (["error"] if end == "error" else [])
    assert (engine.abort(first) is None) == (end == "error")
    for _ in range(40):
        pieces += engine.step()
    assert not engine.busy and left_over(engine) == 0
    for request_id in others:
        mine = [piece for piece in pieces if piece.request_id == request_id]
        assert whole(mine, asked) == alone(runner, tokenizer, asked)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_any_schedule_gives_each_request_the_answer_it_has_alone(runner, wide, tokenizer, seed: int):
    """Pools begin full of nan: what nobody wrote is no number."""
    chance = Random(seed)
    runner = chance.choice([runner, wide])
    kv_dtype: KvDtype = chance.choice(["float32", "bfloat16"])
    page = PAGE * kv_bytes_per_token(runner.config, kv_dtype)
    limits = EngineLimits(
        max_active=chance.randrange(1, 5), step_tokens=chance.choice([7, 64, 150, 512]),
        kv_bytes=chance.choice([6, 8, 40]) * page, window_bytes=chance.choice([0, 2 * 10**5, 10**8]),
        draft_tokens=chance.choice([0, 4]), kv_dtype=kv_dtype,
    )  # fmt: skip
    engine, requests = Engine(runner, tokenizer, END, limits), some_requests(chance)
    engine.pools.paged.values.fill_(torch.nan)
    engine.pools.local.values.fill_(torch.nan)
    asked = [*requests, *chance.sample(requests, 2)]  # some of them twice, some at once
    asked = [request for request in asked for _ in range(chance.choice([1, 1, 1, 3]))]
    pieces: dict[int, list[Piece]] = {}
    ids, aborted = [], set()
    for request in asked:
        ids.append(engine.submit(request))
        for piece in [piece for _ in range(chance.randrange(4)) for piece in engine.step()]:
            pieces.setdefault(piece.request_id, []).append(piece)
        if chance.random() < 0.2 and engine.abort(victim := chance.choice(ids)):
            aborted.add(victim)
    while engine.busy:
        for piece in engine.step():
            pieces.setdefault(piece.request_id, []).append(piece)
    for request_id, request in zip(ids, asked, strict=True):
        if request_id not in aborted:
            assert whole(pieces[request_id], request) == alone(runner, tokenizer, request, kv_dtype)
            scored = [entry for piece in pieces[request_id] for entry in piece.prompt_logprobs]
            wanted = len(request.prompt) - 1 if request.sampling.prompt_logprobs is not None else 0
            assert [entry.token_id for entry in scored] == list(request.prompt[1 : 1 + wanted])
    assert left_over(engine) == 0


@pytest.mark.parametrize("aborts", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_aborts_at_random_moments_give_every_page_back(runner, tokenizer, aborts: int):
    chance, done = Random(7), 0
    engine = Engine(runner, tokenizer, END, EngineLimits(max_active=4, step_tokens=200, kv_bytes=page_bytes(12)))
    open_ids: list[int] = []
    while done < aborts:
        while len(open_ids) < 6:
            prompt = [chance.randrange(64, 300) for _ in range(chance.choice([3, 70, 200]))]
            open_ids.append(engine.submit(ask(prompt, max_new_tokens=50)))
        for piece in engine.step() if chance.random() < 0.4 else []:
            if piece.finish_reason:
                open_ids.remove(piece.request_id)
        for _ in range(chance.randrange(4)):
            if open_ids:
                assert engine.abort(open_ids.pop(chance.randrange(len(open_ids)))) is not None
                done += 1
    for request_id in open_ids:
        engine.abort(request_id)
    assert left_over(engine) == 0


def test_the_next_turn_of_a_chat_reads_only_what_is_new(runner, tokenizer):
    engine = Engine(runner, tokenizer, END)
    first = ask(list(range(64, 264)), max_new_tokens=60)
    (answer,) = run(engine, [first])
    said = whole(answer, first).token_ids
    second = ask([*first.prompt, *said, 70, 71, 72], max_new_tokens=20, logprobs=1)
    (pieces,) = run(engine, [second])
    assert pieces[0].cached_tokens == (200 + len(said) - 1) // PAGE * PAGE >= 192
    assert whole(pieces, second) == alone(runner, tokenizer, second)
    assert engine.prefix.lookups == {"hit": 1, "unknown": 1, "given_up": 0, "no_window": 0}
    assert (engine.prefix.tokens_asked, engine.prefix.tokens_found) == (
        200 + len(second.prompt),
        pieces[0].cached_tokens,
    )


def test_a_miss_has_a_cause_and_texts_that_part_are_found_the_third_time(runner, tokenizer):
    engine = Engine(runner, tokenizer, END)
    common = list(range(64, 64 + 150))
    asked = [ask([*common, *range(end, end + 60)], max_new_tokens=1) for end in (70, 90, 110)]
    found = [run(engine, [request])[0][0].cached_tokens for request in asked]
    assert found == [0, 0, 128]
    assert engine.prefix.lookups == {"hit": 1, "unknown": 1, "given_up": 0, "no_window": 1}
    other = replace(asked[0], cache_salt="another tenant")
    assert run(engine, [other])[0][0].cached_tokens == 0, "texts are shared only under one salt"
    engine.prefix.clear()
    assert run(engine, [asked[0]])[0][0].cached_tokens == 0
    assert engine.prefix.lookups == {"hit": 1, "unknown": 2, "given_up": 1, "no_window": 1}


def test_windows_stay_within_their_budget(runner, tokenizer):
    one = Engine(runner, tokenizer, END)
    run(one, [ask(list(range(64, 264)), max_new_tokens=1)])
    (size,) = set(one.prefix.windows.values())
    engine = Engine(runner, tokenizer, END, EngineLimits(window_bytes=2 * size))
    for start in range(64, 94):
        run(engine, [ask(list(range(start, start + 130)), max_new_tokens=1)])
    assert sum(engine.prefix.windows.values()) <= 2 * size
    assert sum(node.window is not None for node in engine.prefix.nodes.values()) == len(engine.prefix.windows)


def test_a_client_with_many_requests_does_not_starve_another(runner, tokenizer):
    engine = Engine(runner, tokenizer, END, EngineLimits(max_active=2, step_tokens=64))
    many = [engine.submit(ask([100 + n] * 60, "many", max_new_tokens=30)) for n in range(20)]
    for _ in range(10):
        engine.step()
    late = engine.submit(ask([90] * 60, "late", max_new_tokens=5))
    order = []
    while engine.busy:
        order += [piece.request_id for piece in engine.step() if piece.finish_reason]
    assert order.index(late) <= 3 and set(order) <= {*many, late}


def test_prompts_share_a_step_by_client(runner, tokenizer):
    engine = Engine(runner, tokenizer, END, EngineLimits(max_active=4, step_tokens=50))
    ids = [engine.submit(ask([60 + n] * 300, "many", max_new_tokens=1)) for n in range(3)]
    other = engine.submit(ask([99] * 150, "other", max_new_tokens=1))
    order = []
    while engine.busy:
        order += [piece.request_id for piece in engine.step() if piece.finish_reason]
    assert order[0] == other and sorted(order[1:]) == ids


def test_drafts_are_taken_where_a_text_repeats_itself(runner, tokenizer):
    request = ask([70, 80, 90, 100] * 40, max_new_tokens=40, logit_bias=dict.fromkeys((70, 80, 90, 100), 60.0))
    engine = Engine(runner, tokenizer, END, EngineLimits(draft_tokens=4))
    (pieces,) = run(engine, [request])
    assert whole(pieces, request) == alone(runner, tokenizer, request)
    assert 0 < engine.drafts_taken <= engine.drafted and len(pieces) == 40 - engine.drafts_taken


def test_what_does_not_fit_is_said_with_the_numbers_before_anything_is_taken(runner, tokenizer, monkeypatch):
    engine = Engine(runner, tokenizer, END, EngineLimits(max_active=2, kv_bytes=page_bytes(4)))
    with pytest.raises(RequestError, match=r"may reach 300 tokens, 75.0 KiB .*room for 256, 64.0 KiB") as refused:
        engine.submit(ask([70] * 250, max_new_tokens=50))
    assert "kv_bytes" in refused.value.remedy and not engine.busy
    with pytest.raises(UsageError, match=r"room for 1 pages of 64 tokens .* among 2 requests"):
        Engine(runner, tokenizer, END, EngineLimits(max_active=2, kv_bytes=page_bytes(1)))
    rings = Engine(
        runner, tokenizer, END, EngineLimits(kv_bytes=page_bytes(20), window_bytes=0)
    ).pools.local.values.nbytes
    monkeypatch.setattr("trinity.kernels.heap.free_bytes", lambda: 1000)
    with pytest.raises(
        UsageError, match=r"Rings for 8 requests take .* and windows 256.0 MiB; 1000 B are free"
    ) as refused:
        Engine(runner, tokenizer, END, EngineLimits())
    assert "window_bytes" in refused.value.remedy
    monkeypatch.setattr("trinity.kernels.heap.free_bytes", lambda: rings + 1000)
    with pytest.raises(
        UsageError, match=r"may take .* of pages, .* of rings for 8 requests, .* of windows; .* are free"
    ):
        Engine(runner, tokenizer, END, EngineLimits(kv_bytes=page_bytes(20), window_bytes=0))
    monkeypatch.setattr("trinity.kernels.heap.free_bytes", lambda: None)  # where the system does not say
    assert Engine(runner, tokenizer, END, EngineLimits(max_active=2)).pools.tokens == 2 * pages_for(600) * PAGE


def test_limits_lie_within_their_bounds():
    for made, most, kind in ((EngineLimits, "max_active", "kv_dtype"), (ServeConfig, "--max-active", "--kv-dtype")):
        with pytest.raises(ConfigError, match=f"{most} is 0"):
            made(max_active=0)
        with pytest.raises(ConfigError, match=f"{kind} is 'float16'. Choose auto or float32 or bfloat16"):
            made(kv_dtype="float16")  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [64, 200, 590])
@pytest.mark.parametrize(("kv_dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_memory_of_keys_and_values_is_the_formula(runner, tokenizer, length: int, kv_dtype: KvDtype, size: int):
    """Pages of global layers for the text; a ring of window and step for local ones, however long the text."""
    engine = Engine(runner, tokenizer, END, EngineLimits(step_tokens=64, kv_dtype=kv_dtype))
    engine.submit(ask([70 + n % 9 for n in range(length)], max_new_tokens=9))
    while engine.scheduler.active.get(0) is None or engine.scheduler.active[0].unread > 1:
        engine.step()
    layers = [CONFIG.is_global(layer) for layer in range(CONFIG.num_hidden_layers)]
    each = CONFIG.num_key_value_heads * CONFIG.head_dim * 2 * size
    ring = (pages_for(CONFIG.sliding_window + 64) + 1) * PAGE
    assert engine.kv_bytes() == each * (sum(layers) * pages_for(length) * PAGE + layers.count(False) * ring)


def test_threads_and_engines_share_one_runner(runner, tokenizer):
    """The decoder keeps nothing between calls but its scratch."""
    engines = [Engine(runner, tokenizer, END) for _ in range(2)]
    requests = [ask([70 + n] * 90, max_new_tokens=12) for n in range(2)]
    for engine, request in zip(engines, requests, strict=True):
        engine.submit(request)
    pieces: list[list[Piece]] = [[], []]
    while any(engine.busy for engine in engines):
        for engine, mine in zip(engines, pieces, strict=True):
            mine += engine.step()
    for mine, request in zip(pieces, requests, strict=True):
        assert whole(mine, request) == alone(runner, tokenizer, request)
    assert torch.is_inference_mode_enabled() is False
