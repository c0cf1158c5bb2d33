"""Offer a model through an OpenAI-compatible API on this machine, or (with API keys) to others.

Example:
  trinity serve runs/tuned
  trinity serve runs/tuned --host 0.0.0.0 --port 8000 --api-key-file keys.txt
"""

import argparse
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from trinity.base.units import parse_bytes, show_bytes
from trinity.cli.generate import add_loading, loaded
from trinity.config.serve import ServeConfig

if TYPE_CHECKING:
    from trinity.engine.engine import Engine


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder or a run folder")
    for knob in fields(ServeConfig):
        parser.add_argument(
            f"--{knob.name.replace('_', '-')}",
            type=parse_bytes if knob.name.endswith("_bytes") else type(knob.default),
            default=knob.default,
            choices=get_args(knob.type) or None,
            help=f"{knob.metadata['meaning']} (default %(default)s)",
        )
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="one key a line; TRINITY_API_KEY adds one")
    add_loading(parser)
    parser.set_defaults(action=serve)


def serve(options: argparse.Namespace) -> None:
    from trinity.serve.limits import read_keys
    from trinity.serve.server import Server, open_socket, url_of

    config = ServeConfig(**{knob.name: getattr(options, knob.name) for knob in fields(ServeConfig)})
    keys = read_keys(options.api_key_file, os.environ.get("TRINITY_API_KEY"))
    with open_socket(config, keys) as listener:
        model = loaded(options)
        url = url_of(listener)

        def announce() -> None:
            print(f"Serving {model.name} at {url}\n{room(server.service.worker.engine)}\n", flush=True)
            print(example(url, model.name, bool(keys)), flush=True)

        server = Server(model, config, keys, listener, announce)
        server.serve_until_stopped()


def room(engine: "Engine") -> str:
    """What a server holds, and for how much it has room."""
    from trinity.engine.runner import kv_dtype_of

    pools, context = engine.pools, engine.config.max_position_embeddings
    values = kv_dtype_of(engine.runner, engine.limits.kv_dtype)
    return (
        f"{show_bytes(engine.runner.weight_bytes)} of weights; keys and values in {values} for {pools.tokens:,} "
        f"tokens, {engine.limits.max_active} requests at a time, each of up to {min(context, pools.tokens):,}"
    )


def example(url: str, name: str, with_key: bool) -> str:
    """A request to paste into a shell."""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64})
    key = '  -H "Authorization: Bearer $TRINITY_API_KEY" \\\n' if with_key else ""
    return f"curl {url}/chat/completions \\\n  -H 'Content-Type: application/json' \\\n{key}  -d '{body}'"
