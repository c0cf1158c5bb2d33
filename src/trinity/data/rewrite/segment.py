"""Cut a document into stretches a rewriter can take in, without losing a character.

Paragraphs are joined greedily up to a limit of tokens; a paragraph above the limit falls into its lines, a line above
it into sentences, then words, then characters. The segments joined together are the document again, byte for byte.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

CountTokens = Callable[[str], int]

_PARAGRAPH = re.compile(r".*?(?:\n[ \t]*(?=\n)(?:[ \t]*\n)+|\Z)", re.DOTALL)
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_SENTENCE = re.compile(r".+?(?:[.!?。！？]+[\"')\]]*\s+|\Z)", re.DOTALL)
_WORD = re.compile(r"\s*\S+\s*")


class Segmentation(NamedTuple):
    segments: list[str]  # "".join(segments) is the document
    lines_cut: int  # lines longer than a whole segment, which had to be cut inside


def estimate_tokens(text: str) -> int:
    """Tokens by the usual rule of thumb of four UTF-8 bytes each, for rewriters whose tokenizer is not at hand."""
    return -(-len(text.encode()) // 4)


def segment(text: str, limit: int, count: CountTokens) -> Segmentation:
    """Segments of at most `limit` tokens (by the sum over their pieces), in order, covering all of `text`."""
    pieces: list[str] = []
    lines_cut = 0
    for paragraph in filter(None, _PARAGRAPH.findall(text)):
        if count(paragraph) <= limit:
            pieces.append(paragraph)
            continue
        for line in _LINE.findall(paragraph):
            if count(line) <= limit:
                pieces.append(line)
            else:
                lines_cut += 1
                pieces += _cut_line(line, limit, count)
    return Segmentation(_join(pieces, limit, count), lines_cut)


def _cut_line(line: str, limit: int, count: CountTokens) -> list[str]:
    """Sentences of a line; a sentence above the limit as words, a word above the limit as halves of halves."""
    found: list[str] = []
    for sentence in _SENTENCE.findall(line):
        if count(sentence) <= limit:
            found.append(sentence)
            continue
        words = _WORD.findall(sentence) or [sentence]
        parts = [part for word in words for part in _halve(word, limit, count)]
        found += _join(parts, limit, count)
    return found


def _halve(word: str, limit: int, count: CountTokens) -> list[str]:
    if len(word) < 2 or count(word) <= limit:
        return [word]
    middle = len(word) // 2
    return _halve(word[:middle], limit, count) + _halve(word[middle:], limit, count)


def _join(pieces: Iterable[str], limit: int, count: CountTokens) -> list[str]:
    """Neighbours joined as long as the sum of their tokens stays within the limit."""
    joined: list[str] = []
    held: list[str] = []
    held_tokens = 0
    for piece in pieces:
        tokens = count(piece)
        if held and held_tokens + tokens > limit:
            joined.append("".join(held))
            held, held_tokens = [], 0
        held.append(piece)
        held_tokens += tokens
    return joined + (["".join(held)] if held else [])
