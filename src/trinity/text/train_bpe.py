"""Training a byte-level BPE vocabulary with the Trinity pre-tokenizer.

The pre-tokenizer cuts a text into words that merges never cross: digits into right-aligned groups of three (place
values line up: '1234567' is '1', '234', '567'), runs of scripts that are written without spaces, then words with the
space, punctuation mark or symbol before them. Equal texts in equal order give the same file, byte for byte. It has
programs put the begin mark before a text, as `trinity data tokenize` puts it before a document.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from trinity.base.errors import UsageError
from trinity.text.tokenizer import Tokenizer

# Ids 0..31 as in the published Base and Preview tokenizers. True: a control mark; False: visible text with an id.
ADDED_TOKENS: tuple[tuple[str, bool], ...] = (
    *((f"<|{name}|>", True) for name in ("begin_of_text", "end_of_text", "im_start", "im_end", "eot_id", "start")),
    *((f"<|{name}|>", True) for name in ("channel", "message", "end", "fitm_start", "fitm_end", "fitm_hole", "pad")),
    *((f"<{slash}{name}>", False) for name in ("think", "tools", "tool_call", "tool_response") for slash in ("", "/")),
    *((f"<|reserved_special_{number}|>", True) for number in range(8, 19)),
)
SMALLEST_VOCABULARY = len(ADDED_TOKENS) + 256

# Runs longer than 510 digits are cut into pieces of 510 from the right first, so that the look-ahead below stays short.
LONG_DIGIT_RUNS = r"\p{Nd}{1,510}(?=(?>\p{Nd}{510})*(?:\P{Nd}|$))|\G\p{Nd}{510}"
LEADING_DIGITS = r"\A\p{Nd}{1,2}(?=\p{Nd}{3}+\z)"
DIGIT_TRIPLES = r"\A\p{Nd}{3}|\G\p{Nd}{3}"
SCRIPT_RUNS = (
    r"(?:[\u4E00-\u9FFF\u3040-\u309F\u30A0-\u30FF\u3400-\u4DBF\uf900-\uFAFF\uFF65-\uFF9F\u2F00-\u2FDF]+"  # Han, Kana
    r"|[\u0E00-\u0E7F]+|[\u0E80-\u0EFF]+|[\u1780-\u17FF]+"  # Thai, Lao, Khmer
    r"|[\u1000-\u109F\uAA60-\uAA7F\uA9E0-\uA9FF]+"  # Myanmar
    r"|[\uAC00-\uD7AF\u1100-\u11FF]+)"  # Hangul
)
WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)


def split_isolated(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def pre_tokenizer() -> dict[str, Any]:
    """The pre-tokenizer section of a tokenizer.json, as published with Trinity."""
    splits = map(split_isolated, (LONG_DIGIT_RUNS, LEADING_DIGITS, DIGIT_TRIPLES, SCRIPT_RUNS, WORDS))
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": False}, *splits, as_bytes],
    }


def tokenizer_json(model: dict[str, Any]) -> dict[str, Any]:
    """A whole tokenizer.json around a BPE model section."""
    added = [
        {"id": id, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": special}
        for id, (content, special) in enumerate(ADDED_TOKENS)
    ]
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added if model["vocab"] else [],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer(),
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def train_bpe(texts: Iterable[str], vocab_size: int, progress: Callable[[int], None] | None = None) -> Tokenizer:
    """Learn merges until the vocabulary has `vocab_size` entries; fewer when no pair occurs twice any more.

    `progress` is told the characters of each text as it is read. Raises UsageError below 288 entries.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"A vocabulary of {vocab_size} entries is too small.",
            f"{len(ADDED_TOKENS)} marks and 256 bytes need {SMALLEST_VOCABULARY}; ask for that or more.",
        )
    empty: dict[str, Any] = {"type": "BPE", "vocab": {}, "merges": []}
    learning = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(empty)))
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[content for content, _ in ADDED_TOKENS],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    learning.train_from_iterator(reported(texts, progress), trainer=trainer)
    model = json.loads(learning.to_str())["model"]
    trained = Tokenizer(json.dumps(tokenizer_json(model), ensure_ascii=False, indent=1), "the trained tokenizer")
    return trained.with_begin_mark()


def reported(texts: Iterable[str], progress: Callable[[int], None] | None) -> Iterator[str]:
    for text in texts:
        yield text
        if progress:
            progress(len(text))
