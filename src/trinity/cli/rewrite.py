"""Rewrite documents with a language model behind any OpenAI-compatible endpoint.

Example:
  trinity data rewrite corpus/ --endpoint http://127.0.0.1:8000/v1 --model NAME --style distill --out corpus-distilled/

Answers are cached beside --out (NAME.answers/): the same command again asks only for what is missing. The ledger in
--out names every segment that was left out, with the gate and the number.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from trinity.base.errors import UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("documents", type=Path, metavar="DIR", help="a documents folder, made by 'trinity data ingest'")
    parser.add_argument("--endpoint", required=True, metavar="URL", help="base address of the API, such as .../v1")
    parser.add_argument("--model", required=True, metavar="NAME", help="the rewriter's name at the endpoint")
    parser.add_argument("--style", default="distill", metavar="NAME", help="how to rewrite (default: distill)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the documents folder to write")
    parser.add_argument("--api-key-env", default="OPENAI_API_KEY", metavar="VARIABLE",
                        help="variable that holds the API key, if any (default: OPENAI_API_KEY)")  # fmt: skip
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="counts tokens (default: four bytes each)")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once (default: 8)")
    parser.add_argument("--limit", type=int, metavar="N", help="rewrite only the first N documents")
    parser.add_argument("--temperature", type=float, default=0.5, metavar="T", help="sampling (default: 0.5)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(action=rewrite)


def rewrite(options: argparse.Namespace) -> None:
    from itertools import islice

    from trinity.base.progress import progress
    from trinity.data.documents import content_fingerprint, read_documents, read_rows
    from trinity.data.rewrite.cache import AnswerCache
    from trinity.data.rewrite.endpoint import Endpoint
    from trinity.data.rewrite.prompts import style_named
    from trinity.data.rewrite.run import Rewriting, rewrite_folder
    from trinity.data.rewrite.segment import estimate_tokens

    check_options(options)
    count = estimate_tokens
    if options.tokenizer:
        from trinity.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(options.tokenizer)
        count = lambda text: len(tokenizer.encode(text))  # noqa: E731
    rewriting = Rewriting(
        style=style_named(options.style),
        model=options.model,
        temperature=options.temperature,
        concurrency=options.concurrency,
        count=count,
    )
    found = sum(1 for _ in read_rows(options.documents, ["id"]))
    total = found if options.limit is None else min(found, options.limit)
    key = os.environ.get(options.api_key_env) or None
    endpoint = Endpoint(options.endpoint, options.model, key=key, connections=options.concurrency)
    cache = AnswerCache(options.out.with_name(f"{options.out.name}.answers") / "answers.sqlite")
    try:
        endpoint.reach()
        with progress(f"rewriting {total} documents", total) as advance:
            report = rewrite_folder(
                islice(read_documents(options.documents), total),
                options.out,
                endpoint,
                cache,
                rewriting,
                {"documents": content_fingerprint(options.documents)},
                advance,
            )
    finally:
        endpoint.close()
        cache.close()
    show(report, options)


def check_options(options: argparse.Namespace) -> None:
    if options.concurrency < 1:
        raise UsageError(f"--concurrency is {options.concurrency}.", "It must be at least 1.")
    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit is {options.limit}.", "It must be at least 1.")
    if not 0 <= options.temperature <= 2:
        raise UsageError(f"--temperature is {options.temperature}.", "It lies between 0 and 2.")


def show(report: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return

    def share(name: str) -> str:
        return "none" if report[name] is None else f"{report[name]:.1%}"

    print(f"{options.out}: {report['documents_rewritten']} of {report['documents']} documents rewritten")
    print(
        f"  segments     {report['segments']}: {report['segments_accepted']} accepted, {report['segments_rejected']} "
        f"rejected, {report['segments_failed']} failed, {report['segments_too_short']} too short"
    )
    for gate, rejected in report["rejections_by_gate"].items():
        print(f"  {gate:<12} {rejected} rejected")
    print(f"  acceptance   {share('acceptance')} of the answers")
    print(f"  token ratio  {share('token_ratio')} of the source's tokens remain")
    print(f"  numbers      {share('number_recall')} of the source's numbers are kept")
    print(f"  requests     {report['requests']} made, {report['cache_hits']} answered from the cache")
    if report["segments_failed"]:
        print("  The same command again asks once more for the segments that failed.")
