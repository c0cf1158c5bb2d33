"""`trinity align`: fine-tune a model on conversations.

Example:
  trinity align sft models/truebase --data chat.jsonl --out models/chat --set epochs=3

chat.jsonl holds one {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]} a line; only what the assistant
says is learnt. The result is a model folder: trinity chat models/chat.
"""

import argparse
import json
import sys
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    methods = parser.add_subparsers(required=True, metavar="METHOD")
    sft = methods.add_parser("sft", help="supervised fine-tuning")
    sft.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face folder, run folder or checkpoint folder")
    sft.add_argument("--data", required=True, type=Path, metavar="JSONL", help="conversations, one a line")
    sft.add_argument("--out", required=True, type=Path, metavar="DIR", help="model folder to write; must not exist")
    sft.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="override a setting"
    )
    sft.add_argument("--strict", action="store_true", help="stop at the first bad line instead of skipping it")
    sft.add_argument("--json", action="store_true", help="print the result as JSON")
    sft.set_defaults(action=run_sft)


def run_sft(options: argparse.Namespace) -> None:
    from trinity.base.errors import UsageError
    from trinity.config.align import AlignConfig
    from trinity.config.load import override

    config = override(AlignConfig(), options.settings)
    if options.out.exists():
        raise UsageError(f"{options.out} exists.", "Name a folder that does not, or remove it first.")
    from trinity.align.conversations import read_conversations
    from trinity.align.sft import count_learnt, count_steps, fine_tune
    from trinity.base.progress import progress
    from trinity.ckpt.opened import open_model

    opened = open_model(options.model)
    length = min(config.sequence_length, opened.model.config.max_position_embeddings)
    conversations = read_conversations(options.data, opened.tokenizer, length, options.strict)
    for sentence in conversations.skipped[:5]:
        print(f"skipped {sentence}", file=sys.stderr)
    with progress("fine-tuning", count_steps(conversations, config)) as advance:
        history = fine_tune(opened, conversations, config, options.data, options.out, lambda step: advance(1))
    result = {
        "model": str(options.out),
        "conversations": count_learnt(conversations, config),
        "usable": len(conversations.rendered),
        "skipped": len(conversations.skipped),
        "cut": conversations.cut,
        "steps": len(history),
        "first_loss": history[0].loss,
        "last_loss": history[-1].loss,
    }
    if options.json:
        print(json.dumps(result))
        return
    print(
        f"Learnt from {result['conversations']} of {result['usable']} conversations ({result['skipped']} lines of the "
        f"file skipped, {result['cut']} conversations cut) in {result['steps']} steps: {result['first_loss']:.3f} -> "
        f"{result['last_loss']:.3f} nats per assistant token."
    )
    print(f"Next: trinity chat {options.out}   |   trinity serve {options.out}")
