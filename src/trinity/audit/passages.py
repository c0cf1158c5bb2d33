"""What an audit reads: held-out documents of each kind, and passages of training text for each duplicate count."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trinity.audit.memorisation import CONTROL, STRATA, Stratum, cut_passage, stratum_of
from trinity.base.errors import DataError
from trinity.base.seeds import named_seed
from trinity.config.audit import AuditConfig
from trinity.data.mix import Corpus
from trinity.text.tokenizer import Tokenizer


class HeldoutText(NamedTuple):
    ids: list[int]  # without marks
    kind: str
    bytes: int  # UTF-8 bytes of these ids


def heldout_texts(corpus: Corpus, tokenizer: Tokenizer, config: AuditConfig) -> list[HeldoutText]:
    """The first `bytes_per_document` bytes of up to `documents_per_kind` held-out documents of each kind.

    Documents come in the order of their hashes, which is as good as drawn, and the same for every model.
    """
    found: list[HeldoutText] = []
    taken = Counter[str]()
    for document in corpus.heldout():
        if taken[document.kind] == config.documents_per_kind:
            continue
        ids, size = cut_to_bytes(document.ids[1:-1].tolist(), tokenizer, config.bytes_per_document)
        if ids:
            taken[document.kind] += 1
            found.append(HeldoutText(ids, document.kind, size))
    if not found:
        raise DataError(
            f"{corpus.path} holds no held-out text to measure on.",
            "Tokenize a larger corpus, or with a larger held-out share.",
        )
    return found


def cut_to_bytes(ids: list[int], tokenizer: Tokenizer, most: int) -> tuple[list[int], int]:
    """The longest beginning of at most `most` bytes (one token at least), and its bytes."""
    size = 0
    for place, id in enumerate(ids):
        more = len(tokenizer.piece(id))
        if place and size + more > most:
            return ids[:place], size
        size += more
    return ids, size


def strata(corpus: Corpus, config: AuditConfig) -> list[Stratum]:
    """Up to `prompts_per_stratum` passages for each duplicate count that occurs, and as many held-out ones."""
    tokens = config.prefix_tokens + config.suffix_tokens
    found = []
    for name, documents in candidates(corpus, tokens).items():
        generator = np.random.default_rng(named_seed(config.seed, "memorisation", name))
        chosen = generator.permutation(len(documents))[: config.prompts_per_stratum]
        passages = []
        for index in sorted(documents[place] for place in chosen):
            split, place = corpus.locate(index)
            passages.append(cut_passage(corpus.document(index)[1:-1], tokens, config.seed, split.document_id(place)))
        found.append(Stratum(name, stacked(passages, tokens)))
    control = []
    for document in corpus.heldout():
        if len(control) == config.prompts_per_stratum:
            break
        if len(document.ids) - 2 >= tokens:
            control.append(cut_passage(document.ids[1:-1], tokens, config.seed, document.id))
    return [*found, Stratum(CONTROL, stacked(control, tokens))]


def candidates(corpus: Corpus, tokens: int) -> dict[str, list[int]]:
    """Training documents of at least `tokens` tokens, by stratum in the order of STRATA, as indices into the corpus.

    A text occurs as often as the corpus still holds it, each time with the copies that curation counted and dropped.
    """
    splits = [source.train for source in corpus.sources]
    # Eight bytes of a sha256 tell a hundred million texts apart with a chance of error below 0.1 %.
    names = np.concatenate([np.ascontiguousarray(split.ids[:, :8]).view(np.uint64)[:, 0] for split in splits])
    copies = np.concatenate([np.asarray(split.copies) for split in splits])
    lengths = np.concatenate([split.lengths for split in splits])
    _, firsts, text_of = np.unique(names, return_index=True, return_inverse=True)
    occurrences = np.zeros(len(firsts), np.int64)
    np.add.at(occurrences, text_of, copies)
    found: dict[str, list[int]] = defaultdict(list)
    for first, times in sorted(zip(firsts.tolist(), occurrences.tolist())):
        if lengths[first] - 2 >= tokens:
            found[stratum_of(times)].append(first)
    return {name: found[name] for name, _, _ in STRATA if name in found}


def stacked(passages: Sequence[np.ndarray], tokens: int) -> np.ndarray:
    return np.array(passages, dtype=np.int64).reshape(-1, tokens)
