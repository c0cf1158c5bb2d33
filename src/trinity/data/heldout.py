"""Held-out documents for evaluation: what bits per byte are measured on."""

from collections.abc import Iterator
from pathlib import Path

from trinity.data.mix import HeldoutDocument, open_corpus


def heldout_documents(folder: Path | str, max_bytes: int | None = None) -> Iterator[HeldoutDocument]:
    """Held-out documents of a token or mix folder, in hash order: (text, kind, ids, bytes, id).

    With `max_bytes`, whole documents until that many UTF-8 bytes were given (at least one, if there is any).
    """
    given = 0
    for document in open_corpus(folder).heldout():
        yield document
        given += document.bytes
        if max_bytes is not None and given >= max_bytes:
            return
