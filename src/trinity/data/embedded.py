"""The embedded corpus: a small token folder from a few well-known standard modules, made in seconds, no network.

What a run reads when it is given no data. It depends on the version of Python, whose library differs from release to
release, and on nothing else.
"""

import tempfile
from pathlib import Path

from trinity.base.errors import DataError
from trinity.data.documents import read_documents, writing_documents
from trinity.data.stdlib import library_files, module_documents
from trinity.data.tokenise import tokenise
from trinity.data.tokens import TokenFolder
from trinity.text.train_bpe import train_bpe

MODULES = (
    "abc argparse ast base64 bisect calendar cmd codecs configparser contextlib copy csv dataclasses difflib enum"
    " fnmatch fractions functools glob gzip heapq json/__init__ json/decoder json/encoder keyword logging/__init__"
    " operator pprint queue random sched shelve shlex string tempfile textwrap threading timeit traceback types uuid"
)
HELDOUT_FRACTION = 0.1  # of about a hundred documents; a fiftieth would be chance


def embedded_corpus(out: Path, vocab_size: int) -> Path:
    """Make the embedded token folder at `out` with a tokenizer of `vocab_size` entries; one already there is kept."""
    if out.exists() and TokenFolder.open(out).vocab_size == vocab_size:
        return out
    wanted = {f"{module}.py" for module in MODULES.split()}
    found = [name for name, _ in library_files() if name in wanted]
    if not found:
        raise DataError("This Python's library has none of the embedded modules.", "Give a folder with --data.")
    with tempfile.TemporaryDirectory() as place:
        documents = Path(place) / "documents"
        made_by = {"modules": found}
        with writing_documents(documents, {"sources": ["stdlib"]}, made_by) as (writer, _):
            for name in found:
                for document in module_documents(name):
                    writer.write(document)
        tokenizer = train_bpe((document.text for document in read_documents(documents)), vocab_size)
        tokenise(documents, tokenizer, out, HELDOUT_FRACTION)
    return out
