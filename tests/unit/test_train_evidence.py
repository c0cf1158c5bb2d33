"""An incident is told with its place: guilty rows, gradients that broke first, and data that is not read again."""

import math

import torch

from trinity.base.run import read_lines
from trinity.config.load import override
from trinity.data.rsdb import Segment
from trinity.data.trace import REMEMBERED, Place, Trace
from trinity.recipes.table import recipe
from trinity.report.read import read_run
from trinity.report.sections import sections_of_run
from trinity.train import loop
from trinity.train.guard import Guard

SETTINGS = ["train.tokens=10K", "train.save_every_tokens=3072", "train.evaluate_bytes=0", "train.sample_tokens=0",
            "optim.decay_tokens=2K", "optim.warmup_tokens=1K"]  # fmt: skip
LAYER = "layers.2.self_attn"


def run(debug_data, folder, *settings):
    said: list[str] = []
    config = override(recipe("debug"), [*SETTINGS, *settings])
    state = loop.train(config, debug_data, folder, said.append, lambda _: None)
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "guard"]
    return state, lines, said


def break_calls(monkeypatch, chosen: set[int], of: str, broken) -> None:
    """Let `broken(result)` replace what function `of` of the step returns at the chosen calls."""
    from trinity.train import step

    original, calls = getattr(step, of), []

    def replaced(*arguments, **named):
        calls.append(1)
        result = original(*arguments, **named)
        return broken(result) if len(calls) in chosen else result

    monkeypatch.setattr(step, of, replaced)


def test_the_guilty_microbatch_is_named_by_its_rows(debug_data, tmp_path, monkeypatch):
    # Two microbatches of 4 rows a step: the tenth is the second one of step 5, rows 36-39.
    break_calls(monkeypatch, {10}, "chunked_loss", lambda result: (result[0] * math.nan, result[1] * math.nan))
    _, (line,), said = run(debug_data, tmp_path / "run")
    assert (line["step"], line["trouble"], line["action"]) == (5, "non-finite", "skip")
    found = line["nonfinite"]
    assert found["rows"] == [[36, 40]] and found["weights"] == []
    assert found["num_gradients"] == found["num_parameters"] and found["gradients"][0] == "lm_head.weight"
    assert any("guilty rows of the stream: 36-39" in sentence for sentence in said)


def test_a_gradient_that_breaks_on_the_way_back_is_named_where_it_began(debug_data, tmp_path, monkeypatch):
    prepare = loop.prepare

    def hooked(*arguments):
        state, changed = prepare(*arguments)
        calls = []

        def breaks(gradient):
            calls.append(1)
            return torch.full_like(gradient, math.inf) if len(calls) == 7 else gradient

        dict(state.model.named_parameters())[f"{LAYER}.o_proj.weight"].register_hook(breaks)
        return state, changed

    monkeypatch.setattr(loop, "prepare", hooked)
    _, (line,), said = run(debug_data, tmp_path / "run")
    found = line["nonfinite"]
    assert line["step"] == 4 and found["rows"] == [], "the loss was sound, so no row can be blamed"
    assert found["gradients"] == [f"{LAYER}.o_proj.weight"] and found["num_gradients"] == 1
    assert any(f"on the way back first {LAYER}.o_proj.weight" in sentence for sentence in said)


def test_weights_that_are_ruined_already_are_told_as_such(debug_data, tmp_path, monkeypatch):
    apply, calls = loop.apply_update, []

    def ruins(state, *arguments):
        apply(state, *arguments)
        calls.append(1)
        if len(calls) == 4:
            with torch.no_grad():
                state.model.norm.weight.fill_(math.nan)

    monkeypatch.setattr(loop, "apply_update", ruins)
    _, lines, said = run(debug_data, tmp_path / "run", "train.nonfinite_action=rollback")
    (line,) = lines
    assert line["step"] == 5 and line["nonfinite"]["weights"] == ["norm.weight"]
    assert any("which only a roll-back heals" in sentence for sentence in said)


def nan_at(monkeypatch, chosen: set[int]) -> None:
    original, calls = loop.accumulate, []

    def poisoned(*arguments):
        calls.append(1)
        measured = original(*arguments)
        return measured._replace(loss=math.nan) if len(calls) in chosen else measured

    monkeypatch.setattr(loop, "accumulate", poisoned)


def documents_of_rows(debug_data, first: int, end: int) -> set[str]:
    loader = loop.Loader(debug_data, recipe("debug").data, 0)
    found = set()
    for row in range(end):
        before = loader.trace.place
        loader.next_batch(1)
        if row >= first:
            found |= {loader.corpus.locate(index)[0].document_id(loader.corpus.locate(index)[1])
                      for index in loader.trace.since(before).documents}  # fmt: skip
    return found


def test_a_roll_back_says_what_is_not_read_again_and_the_report_shows_it(debug_data, tmp_path, monkeypatch):
    nan_at(monkeypatch, {5, 7})  # step 5; then step 4 again is good, and step 5 again is not
    folder = tmp_path / "run"
    state, lines, said = run(debug_data, folder, "train.nonfinite_action=rollback")
    first, second = (line["not_read_again"] for line in lines)
    # Saved after step 3 = 24 rows of 128 tokens. The second time only what was read since the first is newly lost.
    assert first["rows"] == [24, 40] and first["tokens"] == [24 * 128, 40 * 128]
    assert second["rows"] == [40, 56] and second["tokens"] == [40 * 128, 56 * 128]
    for window in (first, second):
        expected = documents_of_rows(debug_data, *window["rows"])
        assert window["all_documents"] and window["num_documents"] == len(expected)
        assert len(window["documents"]) == min(20, len(expected)) and set(window["documents"]) <= expected
    assert state.loader.trace.place.rows == (10 + 4) * 8
    (sentence,) = [sentence for sentence in said if "rows 24-39 of the stream (tokens 3,072-5,119" in sentence]
    assert f"of {first['num_documents']} documents" in sentence and first["documents"][0][:12] in sentence
    (incidents,) = [part for part in sections_of_run(read_run(folder)) if part.heading == "Incidents"]
    shown = [row[3] for row in incidents.tables[0].rows]
    assert shown[0].startswith("rows 24-39, tokens 3,072-5,119: ") and shown[1].startswith("rows 40-55")


def test_a_long_window_forgets_its_oldest_documents_and_says_so():
    trace = Trace()
    rows = REMEMBERED // 2 + 100
    for row in range(rows):
        trace.note([Segment(row, 0, 3), Segment(row + 1, 3, 8)])
    whole, newest = trace.since(Place()), trace.since(Place(rows - 10, 8 * (rows - 10)))
    assert not whole.complete and len(whole.documents) == REMEMBERED // 2 + 1
    assert newest.complete and newest.documents == list(range(rows, rows - 11, -1))
    assert trace.place == Place(rows, 8 * rows)


def test_a_gradient_norm_far_above_its_recent_mean_is_a_spike():
    config = recipe("debug").train

    def settled(**changes) -> Guard:
        guard = Guard(override(config, [f"{key}={value}" for key, value in changes.items()]))
        for step in range(20):
            assert guard.judge(3.0, 1.0 + 0.1 * (step % 3)).action == "update"
        return guard

    verdict = settled().judge(3.0, 30.0)
    assert (verdict.action, verdict.kind) == ("skip", "spike") and "gradient norm 30 after" in verdict.reason
    assert settled().judge(3.0, 3.0).action == "update", "norms are skewed: three times as large is nothing"
    assert settled(norm_spike_sigmas=0).judge(3.0, 30.0).action == "update"
    assert settled(spike_action="stop").judge(3.0, 30.0).action == "stop"
    guard = settled()
    assert [guard.judge(3.0, norm).action for norm in (8.0, 8.1, 7.9, 8.0)] == ["skip", "skip", "update", "update"]
    assert guard.judge(3.0, 100.0).action == "skip", "at the new level spikes are seen at once"
