"""`trinity demo`: the whole story on this machine, from raw text to a served model.

Example:
  trinity demo --out demo
  trinity demo --out demo --minutes 2

Every step is an ordinary command, printed before it runs, so that any of them can be repeated by hand. A demo that was
stopped goes on where it was: the same command again.
"""

import argparse
import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HELDOUT = "0.04"  # of documents and, by the same rule, of the modules that questions are made from
FINE_TUNING_SECONDS = 60.0
TOKENS_A_PAIR = 48  # of the docstring pairs, marks included
# What grows and shrinks with the horizon.
SCALED = ("train.evaluate_every_tokens", "train.save_every_tokens", "optim.warmup_tokens", "optim.decay_tokens")
COMPLETION = 'import os\n\ndef read_lines(path):\n    """Return the lines of a file."""\n    with open('
QUESTION = "What does textwrap.dedent do?"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="where everything goes (demo)")
    parser.add_argument("--minutes", type=float, default=5.0, metavar="M", help="minutes of pretraining (5)")
    parser.set_defaults(action=demo)


class Story:
    """Runs commands in order, times them, and leaves out those whose result is there."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.seconds: dict[str, float] = {}
        self.started = time.monotonic()

    def tell(self, heading: str) -> None:
        print(f"\n── {heading}", flush=True)

    def run(self, made: str | None, *words: str | Path) -> None:
        """Run `trinity WORDS...` in this process unless `made` (a name under the demo's folder) exists."""
        from trinity.base.errors import TrinityError
        from trinity.cli.main import run_command

        arguments = [str(word) for word in words]
        if made and (self.out / made).exists():
            print(f"   {self.out / made} is there already", flush=True)
            return
        print(f"$ trinity {' '.join(arguments)}", flush=True)
        started = time.monotonic()
        if run_command(arguments[0], arguments[1:]):
            raise TrinityError(
                f"The demo stopped at `trinity {arguments[0]}`.", "Mend what the line above says; then run it again."
            )
        self.seconds[" ".join(arguments[:2])] = time.monotonic() - started


class Answer(NamedTuple):
    request: str
    text: str
    seconds: float


def demo(options: argparse.Namespace) -> None:
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    story = Story(out)
    make_data(story)
    train_model(story, options.minutes)
    release_truebase(story)
    fine_tune(story)
    story.tell("Serving it, and asking it through the OpenAI API")
    with serving(out / "chat") as url:
        answers = [complete(url, COMPLETION), ask(url, QUESTION)]
    for answer in answers:
        print(f"   {answer.request!r}\n   -> {answer.text!r}")
    from trinity.cli.demo_page import write_demo_page

    story.tell("One page that tells it all")
    verdict = write_demo_page(out, out / "page.html", answers, story.seconds)
    print(f"   {verdict}")
    show_end(out, time.monotonic() - story.started)


def make_data(story: Story) -> None:
    out = story.out
    story.tell("Text: the source and docstrings of this Python's standard library")
    story.run("documents", "data", "ingest", "stdlib", "--out", out / "documents")
    story.run("curated", "data", "curate", out / "documents", "--out", out / "curated")
    vocabulary = str(demo_config().model.vocab_size)
    story.run(
        "tokenizer", "tokenizer", "train", out / "curated", "--vocab-size", vocabulary, "--out", out / "tokenizer"
    )
    story.run(
        "tokens",
        *("data", "tokenize", out / "curated", "--tokenizer", out / "tokenizer"),
        *("--out", out / "tokens", "--heldout", HELDOUT),
    )


def demo_config():
    from trinity.recipes.table import recipe

    return recipe("demo")


def train_model(story: Story, minutes: float) -> None:
    story.tell(f"Pretraining a sparse mixture of experts for about {minutes:g} minutes")
    run, data = story.out / "run", story.out / "tokens"
    settings = settings_of(run) or settings_for(minutes, data)
    words = [word for setting in settings for word in ("--set", setting)]
    story.run(None, "train", "demo", "--data", data, "--out", run, *words)


def settings_of(run: Path) -> list[str]:
    """The horizon a stopped demo had chosen, so that it goes on and does not measure anew."""
    path = run / "config.json"
    if not path.exists():
        return []
    known = json.loads(path.read_text())["config"]
    keys = ("train.tokens", *SCALED)
    return [f"{key}={known[key.split('.')[0]][key.split('.')[1]]}" for key in keys]


def settings_for(minutes: float, data: Path) -> list[str]:
    """Turn minutes into a horizon: measure this machine's speed, keep the proportions of the recipe's schedule."""
    from trinity.train.calibrate import tokens_per_second

    config = demo_config()
    speed = tokens_per_second(config, data)
    batch = config.train.batch_tokens
    steps = max(10, round(60 * minutes * speed / batch))
    scale = steps * batch / config.train.tokens
    print(f"   measured {speed:,.0f} tokens/s here: {steps} steps of {batch:,} tokens")
    fixed = {"train.tokens": steps * batch}
    for key in SCALED:
        section, _, name = key.partition(".")
        fixed[key] = max(1, int(getattr(getattr(config, section), name) * scale))
    return [f"{key}={value}" for key, value in fixed.items()]


def release_truebase(story: Story) -> None:
    out = story.out
    raw, key = out / "run" / "checkpoints" / "pre-anneal", out / "keys" / "demo.pem"
    story.tell("TrueBase: the model before annealing and before any instruction, audited, signed, verified")
    story.run(
        "audit/truebase", "audit", raw, "--data", out / "tokens", *audit_context(), "--out", out / "audit/truebase"
    )
    signing = ("--key", key) if key.exists() else ("--new-key", key)
    story.run("truebase", "release", raw, "--audit", out / "audit/truebase", *signing, "--out", out / "truebase")
    story.run(None, "verify", out / "truebase", "--key", f"{key}.pub")


def audit_context() -> tuple[str, str]:
    return ("--context", str(demo_config().data.sequence_length))


def fine_tune(story: Story) -> None:
    out = story.out
    story.tell("Fine-tuning the annealed model on questions made from docstrings")
    story.run("questions", "data", "questions", "--out", out / "questions", "--heldout", HELDOUT)
    pairs = (out / "questions" / "train.jsonl").read_bytes().count(b"\n")
    epochs = min(2.0, FINE_TUNING_SECONDS * median_speed(out / "run") / (pairs * TOKENS_A_PAIR))
    story.run(
        "chat",
        *("align", "sft", out / "run", "--data", out / "questions" / "train.jsonl", "--out", out / "chat"),
        *("--set", f"epochs={epochs:.2f}", "--set", "batch_tokens=2048"),
        *("--set", "muon_lr=0.005", "--set", "adamw_lr=0.003"),  # high, as the rates of this small model's pretraining
    )
    story.run(
        "audit/chat", "audit", out / "chat", "--data", out / "tokens", *audit_context(), "--out", out / "audit/chat"
    )


def median_speed(run: Path) -> float:
    from trinity.report.read import read_run

    speeds = sorted(read_run(run).column("tokens_per_second")[1])
    return speeds[len(speeds) // 2]


@contextlib.contextmanager
def serving(model: Path) -> Iterator[str]:
    """`trinity serve MODEL` as a process of its own on a free port; its address, and its end."""
    from trinity.base.errors import TrinityError

    command = [sys.executable, "-m", "trinity.cli.main", "serve", str(model), "--port", "0"]
    print(f"$ trinity serve {model} --port 0", flush=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        seen = []
        for line in process.stdout:
            seen.append(line)
            found = re.search(r"http://\S+/v1", line)
            if found:
                yield found[0]
                return
        raise TrinityError(f"The server did not start: {' '.join(seen)[-300:]}", "Try `trinity serve` by hand.")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()


def complete(url: str, prompt: str) -> Answer:
    body = {"model": "chat", "prompt": prompt, "max_tokens": 48, "temperature": 0}
    return _post(f"{url}/completions", body, prompt, lambda answer: answer["choices"][0]["text"])


def ask(url: str, question: str) -> Answer:
    body = {
        "model": "chat",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 64,
        "temperature": 0,
    }
    return _post(f"{url}/chat/completions", body, question, lambda a: a["choices"][0]["message"]["content"])


def _post(url: str, body: dict, request: str, pick) -> Answer:
    import httpx

    started = time.monotonic()
    response = httpx.post(url, json=body, timeout=120)
    response.raise_for_status()
    return Answer(request, pick(response.json()), time.monotonic() - started)


def show_end(out: Path, seconds: float) -> None:
    from trinity.base.units import show_seconds

    places = {
        "page.html": "the page: open it in a browser",
        "truebase": "the signed TrueBase release, a Hugging Face folder",
        "run": "the pretraining run: config, metrics, checkpoints, TensorBoard events",
        "chat": "the fine-tuned model",
        "audit": "both audits, each number with an interval",
    }
    print(f"\nDone in {show_seconds(seconds)}. Everything is in {out}:")
    for name, what in places.items():
        print(f"   {out / name!s:<20} {what}")
    activate = "" if shutil.which("trinity") else " (first: source .venv/bin/activate)"
    print(f"\nThree things to try next{activate}:")
    print(f"   trinity chat {out / 'chat'}")
    print(f"   trinity serve {out / 'chat'} --port 8000")
    print(f"   trinity train demo --data {out / 'tokens'} --out runs/longer --set train.tokens=8M")
