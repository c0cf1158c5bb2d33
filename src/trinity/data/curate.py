"""Curation: exact duplicates and texts that are mostly repetition leave; every drop is a line in the ledger.

The repetition rules are those of Gopher (Rae et al. 2021, table A1) with its limits. They describe prose: source code
repeats lines such as `return None` by nature, so code meets only the length rule and exact duplicate removal.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from trinity.base.errors import DataError
from trinity.data.documents import content_fingerprint, promised_files, read_documents, read_rows, writing_documents
from trinity.data.tokenise import hash_share

SHORTEST_CHARACTERS = 32
NOT_PROSE = ("code", "json")


def characters(text: str) -> int:
    """Length without the white space around it."""
    return len(text.strip())


def duplicate_line_share(text: str) -> float:
    """Share of non-empty lines that already occurred in the text: 0 when all differ."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def duplicate_line_character_share(text: str) -> float:
    """Share of the characters of non-empty lines that lie in lines which already occurred."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    total = sum(map(len, lines))
    return 1 - sum(map(len, set(lines))) / total if total else 0.0


def top_ngram_share(text: str, n: int) -> float:
    """Share of a text's characters (white space aside) covered by its most frequent word n-gram; 0 if none repeats."""
    words = text.split()
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    if not counts:
        return 0.0
    most = max(counts.values())
    if most == 1:
        return 0.0
    longest = max(sum(map(len, ngram)) for ngram, count in counts.items() if count == most)
    return min(1.0, most * longest / sum(map(len, words)))


@dataclass(frozen=True)
class Rule:
    """A text is dropped when `measure` of it exceeds `limit`."""

    name: str
    measure: Callable[[str], float]
    limit: float


REPETITION = (
    Rule("duplicate lines", duplicate_line_share, 0.30),
    Rule("characters in duplicate lines", duplicate_line_character_share, 0.20),
    Rule("top 2-gram", lambda text: top_ngram_share(text, 2), 0.20),
    Rule("top 3-gram", lambda text: top_ngram_share(text, 3), 0.18),
    Rule("top 4-gram", lambda text: top_ngram_share(text, 4), 0.16),
)


def broken_rule(text: str, kind: str) -> tuple[str, float] | None:
    """The first rule a text breaks and the number that decided, or None for a text that stays."""
    if (length := characters(text)) < SHORTEST_CHARACTERS:
        return "too short", length
    if kind in NOT_PROSE:
        return None
    for rule in REPETITION:
        if (measured := rule.measure(text)) > rule.limit:
            return rule.name, round(measured, 4)
    return None


@dataclass(frozen=True)
class CurateSummary:
    out: str
    documents: int
    bytes: int
    dropped: dict[str, int]  # rule -> documents


def curate(folder: Path, out: Path, progress: Callable[[int], None] | None = None) -> CurateSummary:
    """Write those documents of `folder` that stay to `out`, each with its number of copies."""
    promised_files(folder, "documents")
    copies, parents = count_copies(folder)
    seen: set[str] = set()
    made_from = {"documents": content_fingerprint(folder)}
    with writing_documents(out, made_from, {"command": "data curate"}) as (writer, ledger):
        for document in read_documents(folder):
            if document.id in seen:
                ledger.drop("duplicate", document.source, document.id, copies[document.id])
            else:
                seen.add(document.id)
                broken = broken_rule(document.text, document.kind)
                if broken:
                    ledger.drop(broken[0], document.source, document.id, broken[1])
                else:
                    own = parents.get(document.id, ())
                    writer.write(replace(document, copies=copies[document.id], parents=own))
            if progress:
                progress(1)
        if not writer.documents:
            raise DataError(
                f"No document of {folder} stays: {sum(ledger.counts.values())} were dropped, first {ledger.first}.",
                "Tokenize the folder without curating it, or ingest other text.",
            )
    return CurateSummary(str(out), writer.documents, writer.bytes, dict(ledger.counts))


def count_copies(folder: Path) -> tuple[Counter[str], dict[str, tuple[str, ...]]]:
    """How often each text occurs, and the parents of those made from others, from a pass that reads no text.

    Of a text with several originals the one that is held out first decides, so that the copy which stays is held out
    if any original is.
    """
    counts: Counter[str] = Counter()
    parents: dict[str, tuple[str, ...]] = {}
    for row in read_rows(folder, ["id", "parents", "copies"]):
        id, own = row["id"], row["parents"]
        counts[id] += row["copies"]
        if own and (id not in parents or hash_share(own[-1]) < hash_share(parents[id][-1])):
            parents[id] = tuple(own)
    return counts, parents
