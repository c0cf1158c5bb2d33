"""Segments lose nothing; gates name what they reject; prompts have a version of their own."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity.base.errors import ConfigError
from trinity.data.rewrite.check import check, copied_share, new_names, numbers_of
from trinity.data.rewrite.prompts import DISTILL, style_named
from trinity.data.rewrite.segment import estimate_tokens, segment

SOURCE = (
    "The bridge at Lundby was opened in 1931 and carries 1,200 vehicles a day. It was designed by Ada Holm, who had "
    "built twelve bridges before. Repairs in 1987 replaced the deck, and the towers were painted again in 2004."
)
GOOD = (
    "Condensed text: Ada Holm, builder of 12 earlier bridges, designed the Lundby bridge (1931; 1200 vehicles daily)."
)
WICE = Path(__file__).parents[2] / "../shared/data/wice/claim-dev.jsonl"


@given(st.text(alphabet="ab.!? \n\té…", max_size=300), st.integers(1, 20))
def test_segments_joined_are_the_document(text, limit):
    cut = segment(text, limit, estimate_tokens)
    assert "".join(cut.segments) == text
    assert all(cut.segments)
    assert all(estimate_tokens(part) <= limit or len(part) == 1 for part in cut.segments)


def test_paragraphs_are_kept_whole_where_they_fit():
    text = "one two\nthree\n\nfour five\n\n" + "six " * 10
    assert segment(text, 9, estimate_tokens).segments == ["one two\nthree\n\nfour five\n\n", "six " * 9, "six "]


def test_a_line_above_the_limit_is_cut_at_sentences_and_counted():
    line = "The first sentence is here. The second one follows! " * 3
    cut = segment(f"short\n{line}\nend\n", 15, estimate_tokens)
    assert cut.lines_cut == 1
    assert "".join(cut.segments) == f"short\n{line}\nend\n"
    assert all(part.rstrip().endswith((".", "!")) for part in cut.segments[:-1])
    assert segment("x" * 100, 5, estimate_tokens).lines_cut == 1


def verdict(answer: str, source: str = SOURCE, cut_off: bool = False):
    return check(DISTILL, source, answer, cut_off, estimate_tokens)


def gates(answer: str, **more) -> list[str]:
    return [rejection.gate for rejection in verdict(answer, **more).rejections]


def test_a_faithful_condensation_passes_with_its_density_numbers():
    checked = verdict(GOOD)
    assert not checked.rejections
    assert checked.text.startswith("Ada Holm") and "Condensed" not in checked.text
    assert 0.3 < checked.token_ratio < 0.6
    assert checked.number_recall == pytest.approx(3 / 5)  # 1931, 1200, 12; not 1987, 2004


@pytest.mark.parametrize(
    "wrapped",
    [
        '"Condensed text: Ada Holm designed it."',
        "**Condensed text:** Ada Holm designed it.",
        "<think>numbers?</think>\nCondensed text:\n```text\nAda Holm designed it.\n```",
    ],
)
def test_wrapping_around_a_whole_answer_is_taken_off(wrapped):
    assert verdict(wrapped).text == "Ada Holm designed it."


@pytest.mark.parametrize(
    ("gate", "answer"),
    [
        ("prefix", "Ada Holm designed the Lundby bridge, opened in 1931."),
        ("empty", "Condensed text:   "),
        ("refusal", "I'm sorry, but I cannot rewrite this text about a bridge."),
        ("length_ratio", "Condensed text: Bridge."),
        ("length_ratio", "Condensed text: " + "the bridge was painted and the deck replaced and " * 20),
        ("copied", "Condensed text: " + SOURCE),
        ("new_numbers", "Condensed text: Ada Holm designed the Lundby bridge, opened in 1932."),
        ("new_names", "Condensed text: The bridge at Lundby, by Ada Holm and Peter Strand, opened in 1931."),
    ],
)
def test_each_gate_rejects_and_names_itself(gate, answer):
    assert gate in gates(answer)


def test_a_cut_off_answer_is_rejected_with_its_numbers():
    (rejection,) = verdict(GOOD, cut_off=True).rejections
    assert rejection.gate == "token_cap" and rejection.bound == DISTILL.longest_answer


def test_a_refusal_that_the_source_itself_contains_is_no_refusal():
    source = "The clerk wrote: I'm sorry, the office is closed on Monday, and on Tuesday, and on Wednesday as well."
    assert "refusal" not in gates("Condensed text: I'm sorry, closed Monday to Wednesday.", source=source)


def test_numbers_are_compared_by_value_and_names_without_case():
    assert numbers_of("1,200 and 1200; 3.14, utf8, seven") == {"1200", "3.14", "8", "7"}
    assert numbers_of("1,5 kg") == {"1,5"}
    assert new_names("the lundby bridge", "However, the Lundby bridge of NASA and Rome. Then more.") == ["NASA", "Rome"]


def test_copied_share_counts_words_in_long_verbatim_runs():
    words = [f"w{i}" for i in range(30)]
    letters = [chr(97 + i // 26) + chr(97 + i % 26) for i in range(30)]
    source = " ".join(letters)
    assert copied_share(source, source) == 1
    assert copied_share(source, " ".join(reversed(letters))) == 0
    assert copied_share(source, " ".join(letters[:10] + words[:10])) == 0.5


def test_a_changed_word_is_another_prompt_version():
    changed = dataclasses.replace(DISTILL, request=DISTILL.request + " Please.")
    assert changed.version != DISTILL.version == style_named("distill").version
    assert DISTILL.prefix in DISTILL.request and "the text" in DISTILL.messages("the text")[1]["content"]


def test_an_unknown_style_offers_the_nearest():
    with pytest.raises(ConfigError, match="distill"):
        style_named("distil")


def test_lexical_gates_separate_supported_from_unsupported_claims():
    if not WICE.exists():
        pytest.skip("the WiCE claims are not beside this checkout")
    missing: dict[str, list[int]] = {"supported": [], "partially_supported": [], "not_supported": []}
    for line in WICE.read_text().splitlines():
        row = json.loads(line)
        source = " ".join(row["evidence"])
        new = numbers_of(row["claim"]) - numbers_of(source)
        missing[row["label"]].append(len(new) + len(new_names(source, row["claim"])))
    good, bad = missing["supported"], missing["not_supported"]
    wins = sum((b > g) + 0.5 * (b == g) for b in bad for g in good) / (len(good) * len(bad))
    assert wins > 0.75
