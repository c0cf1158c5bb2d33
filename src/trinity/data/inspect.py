"""What is in a data folder, as plain tables: counts by kind, bytes, tokens, bytes per token, copies, samples."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from trinity.base.errors import DataError
from trinity.base.run import read_lines
from trinity.data.documents import folder_kind, promised_files, read_documents
from trinity.data.mix import Corpus, open_corpus
from trinity.data.tokens import TokenFolder, TokenSplit

SAMPLE_CHARACTERS = 160


def inspect_folder(folder: Path, samples: int = 3) -> dict[str, Any]:
    """A JSON-like report whose "folder" is documents, tokens or mix. Raises DataError for any other folder."""
    kind = folder_kind(folder)
    if kind == "documents":
        return inspect_documents(folder, samples)
    if kind == "tokens":
        return inspect_tokens(TokenFolder.open(folder), samples)
    if kind == "mix":
        return inspect_mix(open_corpus(folder))
    what = "is not a data folder" if folder.exists() else "does not exist"
    raise DataError(f"{folder} {what}.", "Give what 'trinity data ingest', 'curate', 'tokenize' or 'mix' wrote.")


def inspect_documents(folder: Path, samples: int) -> dict[str, Any]:
    promised_files(folder, "documents")
    documents, sizes, copies = Counter[str](), Counter[str](), Counter[str]()
    shown: list[dict[str, str]] = []
    next_shown = 1
    for number, document in enumerate(read_documents(folder), 1):
        documents[document.kind] += 1
        sizes[document.kind] += len(document.text.encode())
        copies[document.kind] += document.copies - 1
        if number == next_shown and len(shown) < samples:  # the 1st, 10th, 100th, ...: one pass, spread out
            shown.append(sample(document.source, document.kind, document.text))
            next_shown *= 10
    dropped = Counter(line["rule"] for line in read_lines(folder / "ledger.jsonl"))
    rows = [
        {"kind": kind, "documents": documents[kind], "bytes": sizes[kind], "copies_dropped": copies[kind]}
        for kind in sorted(documents)
    ]
    return {"folder": "documents", "path": str(folder), "kinds": rows, "dropped": dict(dropped), "samples": shown}


def inspect_tokens(folder: TokenFolder, samples: int) -> dict[str, Any]:
    rows = [row for name in ("train", "heldout") for row in rows_by_kind(name, getattr(folder, name))]
    return {
        "folder": "tokens",
        "path": str(folder.path),
        "fingerprint": folder.fingerprint,
        "tokenizer": folder.tokenizer_fingerprint,
        "vocab_size": folder.vocab_size,
        "kinds": rows,
        "samples": token_samples(folder, samples),
    }


def inspect_mix(corpus: Corpus) -> dict[str, Any]:
    """Sources with their weights, what is dropped because another holds it out, and how many tokens one pass lasts."""
    sources = [
        {
            "path": str(source.path),
            "weight": weight,
            "documents": source.train.num_documents,
            "dropped": source.num_left_out,
            "tokens": source.train.num_tokens,
            "epoch_mix_tokens": round(source.train.num_tokens / weight),
        }
        for source, weight in zip(corpus.sources, corpus.weights, strict=True)
    ]
    rows = [
        {"source": str(source.path), **row} for source in corpus.sources for row in rows_by_kind("train", source.train)
    ]
    return {
        "folder": "mix",
        "path": str(corpus.path),
        "fingerprint": corpus.fingerprint,
        "tokenizer": corpus.tokenizer.fingerprint,
        "sources": sources,
        "kinds": rows,
    }


def rows_by_kind(name: str, split: TokenSplit) -> list[dict[str, Any]]:
    rows = []
    for index, kind in enumerate(split.kinds):
        chosen = split.kind_index == index
        tokens, size = int(split.lengths[chosen].sum()), int(split.bytes[chosen].sum())
        if count := int(np.count_nonzero(chosen)):
            rows.append(
                {"split": name, "kind": kind, "documents": count, "bytes": size, "tokens": tokens}
                | {
                    "bytes_per_token": round(size / tokens, 3),
                    "copies_dropped": int(split.copies[chosen].sum()) - count,
                }
            )
    return rows


def token_samples(folder: TokenFolder, samples: int) -> list[dict[str, str]]:
    split = folder.train
    places = sorted({split.num_documents * place // max(samples, 1) for place in range(samples)})
    sources = split.sources
    return [
        sample(sources[place], split.kind(place), folder.tokenizer.decode(split.document(place)[:256].tolist()))
        for place in places
    ]


def sample(source: str, kind: str, text: str) -> dict[str, str]:
    return {"source": source, "kind": kind, "text": text[:SAMPLE_CHARACTERS]}
