"""Talk to a model in the terminal. /reset forgets the conversation, /quit ends; piped lines are answered in turn.

Example:
  trinity chat runs/tuned --system 'Answer in one sentence.'
  echo 'What does os.path.join do?' | trinity chat runs/tuned
"""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from trinity.base.errors import CheckpointError, RequestError
from trinity.cli.generate import add_sampling, loaded, sampling_of, tell_reads

if TYPE_CHECKING:
    from trinity.engine.loaded import LoadedModel


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder or a run folder")
    parser.add_argument("--system", help="instructions that precede the conversation")
    add_sampling(parser, max_new_tokens=256, temperature=0.7)
    parser.add_argument("--json", action="store_true", help="print each answer as one JSON object a line")
    parser.set_defaults(action=chat)


def chat(options: argparse.Namespace) -> None:
    from trinity.engine.loaded import sampling_from

    sampling = sampling_of(options)
    sampling_from(sampling)
    model = loaded(options)
    beginning = [{"role": "system", "content": options.system}] if options.system else []
    messages = list(beginning)
    typed = sys.stdin.isatty()
    if typed:
        print(f"{model.name}: /reset forgets, /quit ends.", file=sys.stderr)
    while (line := _read(typed)) is not None:
        if line == "/quit":
            break
        if line == "/reset":
            messages = list(beginning)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                answer = _answer(model, messages, sampling, options.json)
            except (RequestError, CheckpointError) as error:  # the latter: experts on the disk that cannot be read
                print(f"trinity chat: {error} /reset starts anew.", file=sys.stderr)
                messages.pop()
            else:
                # A turn without content has no form in the template; the question goes with it.
                messages = [*messages, {"role": "assistant", "content": answer}] if answer else messages[:-1]
    tell_reads(model)


def _read(typed: bool) -> str | None:
    """The next line, or None at the end of input."""
    try:
        return (input("> ") if typed else input()).strip()
    except EOFError:
        return None


def _answer(model: "LoadedModel", messages: list[dict[str, str]], sampling: dict[str, Any], as_json: bool) -> str:
    """Generate and print one turn; Ctrl-C ends the turn and keeps what was said."""
    from trinity.engine.loaded import sampling_from

    parts, reason = [], "abort"
    try:
        for piece in model.stream(model.chat_prompt(messages), sampling_from(sampling)):
            parts.append(piece.text)
            reason = piece.finish_reason or reason
            if not as_json:
                print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        pass
    content = "".join(parts)
    print(
        json.dumps({"role": "assistant", "content": content, "finish_reason": reason}, ensure_ascii=False)
        if as_json
        else ""
    )
    sys.stdout.flush()
    return content
