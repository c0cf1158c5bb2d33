"""Learn a vocabulary from a documents folder.

Example:
  trinity data ingest stdlib --out data/documents
  trinity tokenizer train data/documents --vocab-size 4096 --out data/tokenizer
"""

import argparse
import json
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    train = steps.add_parser(
        "train",
        help="train a byte-level BPE tokenizer with the Trinity pre-tokenizer",
        epilog="Example: trinity tokenizer train data/documents --vocab-size 4096 --out data/tokenizer",
    )
    train.add_argument("folder", type=Path, metavar="DOCUMENTS")
    train.add_argument("--vocab-size", default="4096", help="entries, 288 or more: 32 marks, 256 bytes, merges (4096)")
    train.add_argument("--out", required=True, type=Path, help="folder to write tokenizer.json into")
    train.add_argument("--json", action="store_true", help="print the result as JSON")
    train.set_defaults(action=run_train)


def run_train(options: argparse.Namespace) -> None:
    from trinity.base.lineage import write_lineage
    from trinity.base.progress import progress
    from trinity.base.units import parse_count
    from trinity.data.documents import content_fingerprint, data_folder, num_documents, read_documents
    from trinity.text.train_bpe import train_bpe

    wanted = parse_count(options.vocab_size)
    with progress("learn vocabulary", num_documents(options.folder)) as advance:
        texts = (document.text for document in read_documents(options.folder))
        tokenizer = train_bpe(texts, wanted, lambda _: advance(1))
    with data_folder(options.out, "tokenizer") as folder:
        tokenizer.save(folder)
        parents = {"documents": content_fingerprint(options.folder)}
        write_lineage(folder, "tokenizer", parents, {"command": "tokenizer train", "vocab_size": wanted})
    summary = {"out": str(options.out), "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
    if options.json:
        print(json.dumps(summary, indent=2))
        return
    print(f"{tokenizer.vocab_size} entries in {options.out} (fingerprint {tokenizer.fingerprint})")
    if tokenizer.vocab_size < wanted:
        print(f"The text has no pair left that occurs twice, so the vocabulary stays below {wanted}.")
