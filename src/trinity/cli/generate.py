"""Complete a prompt with a model.

Example:
  trinity generate runs/debug --prompt 'def fibonacci(n):' --max-new-tokens 64
  echo 'import os' | trinity generate runs/debug --prompt - --temperature 0.8 --seed 1
  trinity generate models/chat --prompt 'A city:' --json-schema city.json
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from trinity.base.errors import UsageError
from trinity.config.engine import KvChoice
from trinity.plan.inference import DTYPES

if TYPE_CHECKING:
    from trinity.engine.loaded import LoadedModel


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder or a run folder")
    parser.add_argument("--prompt", required=True, help="text to continue; '-' reads it from standard input")
    add_sampling(parser, max_new_tokens=64, temperature=0.0)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=Path, metavar="FILE", help="the answer is JSON of this schema")
    form.add_argument("--regex", metavar="TEXT", help="the whole answer matches this regular expression")
    form.add_argument("--grammar", type=Path, metavar="FILE", help="the answer is of this Lark grammar")
    parser.add_argument("--after-think", action="store_true", help="the form begins behind </think>")
    parser.add_argument("--json", action="store_true", help="print one JSON object: text, token ids, log-probabilities")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="show text as it appears (default: when standard output is a terminal)",
    )
    parser.set_defaults(action=generate)


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int, temperature: float) -> None:
    """Arguments of how tokens are drawn; `sampling_of` reads them back."""
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help="default %(default)s")
    parser.add_argument("--temperature", type=float, default=temperature, help="0 is greedy; default %(default)s")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the smallest set with this much probability")
    parser.add_argument("--top-k", type=int, default=0, help="keep this many most likely tokens; 0 keeps all")
    parser.add_argument("--min-p", type=float, default=0.0, help="keep tokens this likely relative to the likeliest")
    parser.add_argument("--seed", type=int, help="draw the same answer again; without it every run draws anew")
    parser.add_argument("--stop", action="append", default=[], help="end before this text; may be given several times")
    add_loading(parser)
    parser.add_argument("--kv-dtype", default="auto", choices=get_args(KvChoice), help="of keys and values")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Arguments of how a model is held in memory; `loaded` reads them back."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="what weights are kept in (default: as they are stored, on a GPU bfloat16)",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    parser.add_argument(
        "--expert-bytes",
        default="0",
        metavar="BYTES",
        help="keep experts of a packed folder on the disk but for as many bytes, such as 4G; 0 (the default): none",
    )


def loaded(options: argparse.Namespace) -> "LoadedModel":
    from trinity.base.units import parse_bytes
    from trinity.engine.loaded import load

    budget = parse_bytes(options.expert_bytes)
    return load(options.model, options.dtype, options.device, options.kv_dtype, budget)


def tell_reads(model: "LoadedModel") -> None:
    """How often experts had to be fetched, where they stay on the disk."""
    from trinity.base.units import show_bytes, show_seconds

    reads = model.runner.expert_reads()
    if reads is not None:
        asked = max(1, reads.hits + reads.misses)
        print(
            f"experts: {reads.hits / asked:.0%} of {asked:,} were in memory, {show_bytes(reads.bytes)} read, "
            f"{show_seconds(reads.stalled_seconds)} in which a thread had to wait",
            file=sys.stderr,
        )


def sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "seed")
    return {name: getattr(options, name) for name in names} | {"stop": tuple(options.stop)}


def _form_of(options: argparse.Namespace) -> dict[str, Any]:
    """The form that an answer shall have, as `constraint_of` takes it."""

    def text_of(file: Path | None) -> str | None:
        try:
            return None if file is None else file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
            raise UsageError(f"{file} cannot be read: {reason}.", "Give a text file.") from error

    texts = {"json_schema": text_of(options.json_schema), "grammar": text_of(options.grammar), "regex": options.regex}
    return texts | {"after_think": options.after_think}


def generate(options: argparse.Namespace) -> None:
    from trinity.engine.loaded import sampling_from

    sampling = sampling_of(options) | _form_of(options)
    sampling_from(sampling)  # refuses bad values before the model is loaded
    prompt = _standard_input() if options.prompt == "-" else options.prompt
    model = loaded(options)
    stream = sys.stdout.isatty() if options.stream is None else options.stream
    if options.json:
        print(json.dumps(asdict(model.generate(prompt, **sampling)), ensure_ascii=False))
    elif stream:
        reason = None
        for piece in model.stream(model.prompt(prompt), sampling_from(sampling)):
            print(piece.text, end="", flush=True)
            reason = piece.finish_reason
        print()
        _tell_cut(reason, options)
    else:
        answer = model.generate(prompt, **sampling)
        print(answer.text)
        _tell_cut(answer.finish_reason, options)
    tell_reads(model)


def _standard_input() -> str:
    try:
        text = sys.stdin.read()
        text.encode()  # in some locales what is no text comes through as halves of surrogate pairs
    except UnicodeError as error:
        raise UsageError("Standard input is no text in UTF-8.", "Give --prompt - a text.") from error
    return text


def _tell_cut(reason: str | None, options: argparse.Namespace) -> None:
    """Of an answer that was to have a form: that it has it only as far as it goes."""
    if reason == "length" and (options.json_schema or options.grammar or options.regex is not None):
        told = f"The answer was cut off at {options.max_new_tokens} tokens, before its form was whole."
        print(f"{told} Give it more with --max-new-tokens.", file=sys.stderr)
