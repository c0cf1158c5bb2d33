"""Gates between a rewriter's answer and the corpus. Every rejection names its gate, its number and the bound.

    token_cap      the answer ran into its token limit, so its end is missing
    refusal        the answer opens by declining
    prefix         the answer does not begin as it was asked to
    empty          nothing follows the prefix
    length_ratio   tokens of the rewrite over tokens of the source, outside the style's bounds
    copied         share of the rewrite's words inside runs of RUN words that stand verbatim in the source
    new_numbers    numbers in the rewrite that the source does not have
    new_names      names (capitalised inside a sentence, or with two capitals) that the source does not have

These are lexical: they catch invention and copying, not a fact that is twisted with the source's own words. How well
the last two separate supported from unsupported claims is measured on human labels in docs/guides/rewriting.md.
"""

import re
from typing import NamedTuple

from trinity.data.rewrite.prompts import Style
from trinity.data.rewrite.segment import CountTokens

RUN = 8  # words in a row that count as copied
MOST_COPIED = 0.8
MOST_NEW_NUMBERS = 0
MOST_NEW_NAMES = 1  # one may be a respelling; two are an invention

_REFUSALS = (
    "i cannot", "i can't", "i can’t", "i am unable", "i'm unable", "i’m unable", "i'm sorry", "i’m sorry", "i am sorry",
    "as an ai", "as a language model", "i will not", "i won't", "unfortunately, i",
)  # fmt: skip
_REFUSAL_REACH = 120  # characters of the opening in which a refusal is looked for
_THINKING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_NAME = re.compile(r"(?P<before>[^\w\s]*\s*)\b(?P<name>[A-Z][^\W\d_]*)")
_SPELLED = {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
    )
}


class Rejection(NamedTuple):
    gate: str
    number: float
    bound: float
    detail: str  # what was found, shortened


class Checked(NamedTuple):
    text: str  # the rewrite without prefix and wrapping
    rejections: list[Rejection]  # empty when it may enter the corpus
    token_ratio: float  # tokens of the rewrite over tokens of the source
    number_recall: float | None  # share of the source's distinct numbers that the rewrite keeps; None without numbers


def check(style: Style, source: str, answer: str, cut_off: bool, count: CountTokens) -> Checked:
    """Pass one answer through all gates. `cut_off`: the endpoint said that it stopped at the token limit."""
    opened = _unwrap(_THINKING.sub("", answer)).lstrip("*# ")
    text = _unwrap(opened[len(style.prefix) :] if opened.startswith(style.prefix) else opened)
    ratio = count(text) / max(1, count(source))
    kept = numbers_of(source)
    recall = len(kept & numbers_of(text)) / len(kept) if kept else None
    rejections = []
    if cut_off:
        rejections.append(Rejection("token_cap", count(text), style.longest_answer, "the end is missing"))
    if refusal := _refusal(text, source):
        rejections.append(Rejection("refusal", 1, 0, refusal))
    if not opened.startswith(style.prefix):
        rejections.append(Rejection("prefix", 0, 1, opened[: len(style.prefix)]))
    if not text:
        return Checked("", [*rejections, Rejection("empty", 0, 1, "nothing follows the prefix")], ratio, recall)
    low, high = style.length_ratio
    if not low <= ratio <= high:
        rejections.append(Rejection("length_ratio", round(ratio, 4), low if ratio < low else high, f"{ratio:.0%}"))
    if (copied := copied_share(source, text)) > MOST_COPIED:
        rejections.append(Rejection("copied", round(copied, 4), MOST_COPIED, f"{copied:.0%} of the words"))
    if len(new := sorted(numbers_of(text) - kept)) > MOST_NEW_NUMBERS:
        rejections.append(Rejection("new_numbers", len(new), MOST_NEW_NUMBERS, ", ".join(new[:8])))
    if len(new := new_names(source, text)) > MOST_NEW_NAMES:
        rejections.append(Rejection("new_names", len(new), MOST_NEW_NAMES, ", ".join(new[:8])))
    return Checked(text, rejections, ratio, recall)


def numbers_of(text: str) -> set[str]:
    """Distinct numbers, thousands separators removed; small numbers written as words count too."""
    found = {re.sub(r",(?=\d{3}(?!\d))", "", number) for number in _NUMBER.findall(text)}
    return found | {_SPELLED[word] for word in re.findall(r"[a-z]+", text.lower()) if word in _SPELLED}


def new_names(source: str, text: str) -> list[str]:
    """Names of the rewrite whose word the source has in no spelling of case. A sentence's first word is no name unless
    it carries a second capital."""
    known = {word.casefold() for word in re.findall(r"[^\W\d_]+", source)}
    found = []
    for match in _NAME.finditer(text):
        name = match["name"]
        opens_sentence = match.start() == 0 or any(mark in match["before"] for mark in '.!?:\n"“(•-')
        if opens_sentence and not any(letter.isupper() for letter in name[1:]):
            continue
        if name != "I" and name.casefold() not in known and name not in found:
            found.append(name)
    return found


def copied_share(source: str, text: str) -> float:
    """Share of the rewrite's words that lie inside a run of RUN words found verbatim (case aside) in the source."""
    there, words = _words(source), _words(text)
    if len(words) < RUN:
        return 0.0
    runs = {tuple(there[i : i + RUN]) for i in range(len(there) - RUN + 1)}
    copied = [False] * len(words)
    for i in range(len(words) - RUN + 1):
        if tuple(words[i : i + RUN]) in runs:
            copied[i : i + RUN] = [True] * RUN
    return sum(copied) / len(words)


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(text)]


def _refusal(text: str, source: str) -> str:
    """The refusing phrase that opens the text and is not the source's own, or nothing."""
    opening, own = text[:_REFUSAL_REACH].lower(), source.lower()
    return next((phrase for phrase in _REFUSALS if phrase in opening and phrase not in own), "")


def _unwrap(text: str) -> str:
    """Without the code fence, bold marks or quotation marks that some models put around a whole answer."""
    text = text.strip().removeprefix("**").strip()
    fenced = re.fullmatch(r"```[a-z]*\n(.*?)\n?```", text, re.DOTALL)
    if fenced and "```" not in fenced[1]:
        text = fenced[1].strip()
    if len(text) > 1 and (text[0], text[-1]) in (('"', '"'), ("“", "”")) and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text
