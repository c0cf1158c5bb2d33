"""Bits per byte: every token counted once with enough past, the plain computation's value; budgets; the display."""

import math
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from trinity.data.mix import HeldoutDocument
from trinity.model.loss import IGNORED
from trinity.text.tokenizer import Tokenizer
from trinity.train import display
from trinity.train.display import TrainingDisplay
from trinity.train.duties import Progress, due, within
from trinity.train.evaluate import Score, overlapping_rows, score_documents, total


@given(st.integers(0, 200), st.integers(1, 40))
def test_every_token_is_one_target_with_at_least_half_a_row_of_past(length: int, row_length: int):
    text = list(range(1000, 1000 + length + 1))  # the begin token and `length` more, all different
    counted: list[int] = []
    for inputs, targets in overlapping_rows(text, row_length):
        assert 0 < len(inputs) == len(targets) <= row_length
        for place, target in enumerate(targets):
            if target == IGNORED:
                continue
            counted.append(target)
            assert inputs[place] == target - 1, "the token before it is the last that is read"
            past = inputs[: place + 1]
            assert past == text[target - 1000 - len(past) : target - 1000], "a stretch of the text without a gap"
            assert len(past) >= min(target - 1000, row_length // 2), "half a row, or all there is"
    assert counted == text[1:]


def plain_nats(model, ids: list[int]) -> float:
    """The whole document in one pass, through all logits."""
    text = torch.tensor([ids[:-1]])
    with torch.no_grad():
        log_p = model.head(model(text[:, :-1]).hidden).double().log_softmax(-1)
    return -float(log_p[0].gather(-1, text[0, 1:, None]).sum())


def test_scores_equal_the_plain_computation_where_a_row_holds_the_document(tiny_model):
    generator = np.random.default_rng(0)
    documents = [(generator.integers(0, 64, size).tolist(), size * 3) for size in (30, 2, 3, 65, 17, 1, 66, 40)]
    tiny_model.eval()
    scores = score_documents(tiny_model, documents, row_length=64)
    for (ids, size), score in zip(documents, scores, strict=True):
        assert (score.tokens, score.bytes) == (max(len(ids) - 2, 0), size)
        assert score.nats == pytest.approx(plain_nats(tiny_model, ids) if len(ids) > 2 else 0.0, rel=1e-5)
    alone = [score_documents(tiny_model, [document], 64)[0] for document in documents]
    assert [score.nats for score in alone] == pytest.approx([score.nats for score in scores], rel=1e-6)
    whole = total(scores)
    assert whole.tokens == sum(score.tokens for score in scores) and whole.nats == sum(score.nats for score in scores)
    assert whole.bits_per_byte == pytest.approx(whole.nats / math.log(2) / whole.bytes)
    assert whole.loss == whole.nats / whole.tokens
    assert total([]) == Score(0, 0, 0) and total([]).bits_per_byte == 0.0


def test_a_longer_document_is_scored_with_the_past_its_rows_give(tiny_model):
    ids = np.random.default_rng(1).integers(0, 64, 151).tolist()
    (found,) = score_documents(tiny_model, [(ids, 150)], row_length=32)
    assert found.tokens == 149
    text, nats = ids[:-1], 0.0
    with torch.no_grad():
        for target in range(1, len(text)):
            start = 0 if target <= 32 else 16 * math.ceil((target - 32) / 16)
            logits = tiny_model.head(tiny_model(torch.tensor([text[start:target]])).hidden)[0, -1]
            nats -= float(logits.double().log_softmax(-1)[text[target]])
    assert found.nats == pytest.approx(nats, rel=1e-5)


def documents_of(tokenizer: Tokenizer, texts: list[str]) -> list[HeldoutDocument]:
    ids = [np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]) for text in texts]
    return [HeldoutDocument(text, "prose", of, len(text.encode()), "") for text, of in zip(texts, ids, strict=True)]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=6), st.integers(0, 150))
def test_a_budget_is_used_up_but_not_passed(debug_data, texts: list[str], budget: int):
    tokenizer = Tokenizer.load(debug_data)
    chosen = within(documents_of(tokenizer, texts), budget, tokenizer)
    assert sum(size for _, size in chosen) <= budget
    together = "".join(texts).encode()
    read = b"".join(tokenizer.decode_bytes(ids) for ids, _ in chosen)
    assert together.startswith(read) and len(read) == sum(size for _, size in chosen)
    longest = max((len(tokenizer.piece(token)) for token in range(tokenizer.vocab_size)), default=0)
    assert len(read) > min(budget, len(together)) - longest, "less than one token of the budget is left"
    for ids, size in chosen:
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id) and size > 0


@given(st.integers(0, 50), st.integers(0, 500), st.integers(1, 100))
def test_a_duty_is_due_when_a_multiple_was_passed(every: int, before: int, step: int):
    passed = any(tokens % every == 0 for tokens in range(before + 1, before + step + 1)) if every else False
    assert due(every, before, before + step) == passed


FIGURES = Progress(3, 3072, 2.5, None, 0.25, 1, 1234.5)


def test_away_from_a_terminal_the_display_is_sparse_plain_lines(capsys):
    sentence = "[not markup] " + "a long sentence " * 20
    with TrainingDisplay(4096) as shown:
        shown.say(sentence)
        for tokens in (1024, 2048, 3072, 4096):
            shown.show(FIGURES._replace(tokens=tokens, bits_per_byte=2.0 if tokens > 2048 else None))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].strip() == sentence.strip(), "a sentence is one line, however long"
    assert len(lines) == 3, "the first and the last step; those between came too soon after"
    assert lines[1].startswith(" 25.0%  loss 2.500  bits/byte -  MaxVio 0.25  dead 1  1.23K tok/s  left -")
    assert lines[2].startswith("100.0%") and "bits/byte 2.000 at step 2" in lines[2] and lines[2].endswith("left 0.0s")


def test_bits_per_byte_stand_with_the_step_they_were_measured_after(capsys, monkeypatch):
    monkeypatch.setattr(display, "_PLAIN_SECONDS", 0.0)
    with TrainingDisplay(8192) as shown:
        for step, bits in enumerate((7.5, 7.5, 7.5, 6.25, 6.25), 1):
            shown.show(FIGURES._replace(step=step, tokens=1024 * step, bits_per_byte=bits))
    found = [line.partition("bits/byte ")[2].partition("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert found == ["7.500 at step 0"] * 3 + ["6.250 at step 3"] * 2


def test_a_screen_that_is_a_file_on_a_full_disk_ends_nothing(monkeypatch):
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr("sys.stderr", full)
        with TrainingDisplay(4096) as display:
            display.say("a sentence")
            display.show(FIGURES._replace(tokens=4096))
        monkeypatch.undo()
        with suppress(OSError):  # what it holds is refused once more
            full.close()


def test_on_a_terminal_the_display_is_one_live_line(capsys):
    shown = TrainingDisplay(4096)
    shown.console = Console(force_terminal=True, stderr=True, width=120, highlight=False)
    shown.live = True
    shown.bar.live.console = shown.console
    with shown:
        shown.say("a sentence")
        shown.show(FIGURES)
        shown.show(FIGURES._replace(tokens=4096))
        assert shown.bar.tasks[0].completed == 4096
    shown = capsys.readouterr().err
    assert "a sentence" in shown and "loss 2.500" in shown and "100%" in shown and "left 0.0s" in shown
