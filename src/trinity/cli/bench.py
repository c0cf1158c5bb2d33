"""`trinity bench decode`: how fast a model reads and writes on this machine, beside other engines where they are here.

Example:
  trinity bench decode runs/demo --dtype float32 int8
  trinity bench decode models/chat --dtype int8 int4 --beside llama.cpp --text book.txt --json figures.json
  trinity bench decode models/chat --dtype int8 --drafts 4

Engines take turns in processes of their own, and medians are told with half of what the repeats span. The share of the
bandwidth is bytes of weights that a token needs times tokens a second at batch 1, over what memory gives.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trinity.bench.subject import Side

# Ours, and llama.cpp's nearest.
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "q8_0", "int4": "q4_0", "float8": "q8_0"}
BESIDE = {"transformers": "transformers", "llama.cpp": "llama"}
PREFILL, PROMPT = (512, 4096), 128


def configure(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    decode = kinds.add_parser("decode", help="tokens a second of decoding and of reading prompts", description=__doc__,
                              formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    decode.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder or a run folder")
    decode.add_argument("--dtype", nargs="+", choices=DTYPES, help="what weights are kept in (default: float32, on a "
                        "GPU bfloat16, of a packed folder what it has)")  # fmt: skip
    decode.add_argument("--beside", action="append", default=[], choices=BESIDE, help="another engine, on the same "
                        "weights; transformers in float32 (on a GPU in bfloat16), llama.cpp in what is nearest to each "
                        "--dtype")  # fmt: skip
    add_measures(decode, repeats=3)
    decode.set_defaults(action=bench_decode)


def add_measures(parser: argparse.ArgumentParser, repeats: int) -> None:
    """Arguments of what is measured; `asked_of` reads them back."""
    count: dict[str, Any] = {"type": _positive, "metavar": "N"}
    parser.add_argument(
        "--batch", nargs="+", default=[1, 8], help="sequences that get a token at once; default 1 8", **count
    )
    parser.add_argument("--prefill", nargs="+", help="tokens of prompts that are read (default: 512 4096, where the "
                        "context holds them)", **count)  # fmt: skip
    parser.add_argument("--requests", default=0, help="also measure so many requests, of prompts and answers of half "
                        "the length to all of it, answered together", **count)  # fmt: skip
    parser.add_argument("--tokens", default=32, help="decoded of each sequence; default %(default)s", **count)
    parser.add_argument("--repeats", default=repeats, help="default %(default)s", **count)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    parser.add_argument("--threads", help="default: as many as torch takes", **count)
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="also tell perplexity on it, and what fewer bits cost"
    )
    parser.add_argument("--drafts", default=0, help="also measure answers with that many drafted tokens", **count)
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep llama.cpp's files of the weights there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def bench_decode(options: argparse.Namespace) -> None:
    from importlib.util import find_spec

    from trinity.bench.figures import PACKAGES
    from trinity.bench.subject import Side, Subject
    from trinity.ckpt.opened import find_model
    from trinity.ckpt.weights import PackedWeights
    from trinity.engine.device import device_named
    from trinity.engine.packed import kind_of

    found = find_model(options.model)
    subject = Subject(name=found.name, config=found.config, folder=found.folder)
    packed = kind_of(found.weights.file) if isinstance(found.weights, PackedWeights) else None
    options.device = device_named("cpu" if packed and options.device == "auto" else options.device).type
    exact = "float32" if options.device == "cpu" else "bfloat16"
    dtypes = dict.fromkeys(options.dtype or [packed or exact])
    engines = [("trinity", dtype) for dtype in dtypes]
    if "transformers" in options.beside:
        engines += [("transformers", exact)]
    if "llama.cpp" in options.beside:
        engines += [("llama", DTYPES[dtype]) for dtype in dtypes]
    if not options.beside:
        here = [name for name in BESIDE if all(find_spec(module) for module in PACKAGES[BESIDE[name]])]
        told = f"--beside takes {' and '.join(here)}" if here else f"neither {' nor '.join(BESIDE)} is here"
        print(f"trinity alone is measured; {told}.", file=sys.stderr)
    sides = [Side(engine=engine, precision=precision, subject=subject) for engine, precision in engines]
    measure(sides, options)


def measure(sides: "list[Side]", options: argparse.Namespace) -> None:
    """Compare the sides, print the tables, and write the figures where they are asked for."""
    import json
    import tempfile

    import torch

    from trinity.base.errors import UsageError
    from trinity.bench.figures import compare
    from trinity.bench.subject import Asked
    from trinity.cli.bench_text import as_text

    try:
        text = options.text.read_text() if options.text else None
    except UnicodeDecodeError as error:
        raise UsageError(f"{options.text} is no text in UTF-8.", "Name a text file.") from error
    if text is not None and len(text) < 2:
        raise UsageError(f"{options.text} holds no text.", "Name a file with some pages of text.")
    if options.json and not options.json.absolute().parent.is_dir():
        raise UsageError(f"There is no folder for {options.json}.", "Make it first, or name another place for --json.")
    context = sides[0].subject.config.max_position_embeddings
    with tempfile.TemporaryDirectory(prefix="trinity-bench-") as scratch:
        asked = Asked(
            batches=tuple(options.batch),
            prefill=tuple(options.prefill or [n for n in PREFILL if n < context] or [context // 2]),
            prompt=min(PROMPT, context // 4),
            requests=options.requests,
            tokens=options.tokens,
            repeats=options.repeats,
            device=options.device,
            threads=options.threads or torch.get_num_threads(),
            # Asleep as in every command of trinity; but llama.cpp would decode a tenth of the tokens.
            awake=any(side.engine == "llama" for side in sides),
            text=text,
            drafts=options.drafts,
            work=options.work or Path(scratch),
        )
        found = compare(sides, asked)
    print(as_text(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
