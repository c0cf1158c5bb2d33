"""`trinity`: the table of commands. Nothing heavy is imported before a command needs it.

A command module offers `configure(parser)`, which adds its arguments and sets `action`, a function of the parsed
arguments. A mistake ends in one clear line with the remedy: exit code 2 for usage, 1 for failure. Under a launcher that
starts failed processes again, what would fail again is not tried again (base/launch.py).
"""

import argparse
import importlib
import os
import re
import socket
import sys
from typing import NoReturn

from trinity.base import launch
from trinity.base.errors import TrinityError, nearest, out_of_memory

COMMANDS = {
    "demo": ("trinity.cli.demo", "the whole story on this machine, from raw text to a served model"),
    "data": ("trinity.cli.data", "ingest, curate, rewrite, tokenize, mix and inspect text"),
    "tokenizer": ("trinity.cli.tokenizer", "train a byte-level BPE tokenizer"),
    "plan": ("trinity.cli.plan", "what a run would cost: days, money, memory and layout; no GPU"),
    "train": ("trinity.cli.train", "pretrain a model; the same command again resumes"),
    "align": ("trinity.cli.align", "fine-tune a model on conversations"),
    "generate": ("trinity.cli.generate", "complete a prompt"),
    "chat": ("trinity.cli.chat", "talk to a model in the terminal"),
    "serve": ("trinity.cli.serve", "offer a model through an OpenAI-compatible API"),
    "bench": ("trinity.cli.bench", "measure how fast a model reads and writes on this machine"),
    "average": ("trinity.cli.average", "one model from several checkpoints of a run"),
    "import": ("trinity.cli.import_", "read a published checkpoint"),
    "export": ("trinity.cli.export", "write a model as a Hugging Face folder"),
    "audit": ("trinity.cli.audit", "measure what a model learnt, leaks and routes, with intervals"),
    "release": ("trinity.cli.release", "bundle, sign and seal a model"),
    "verify": ("trinity.cli.verify", "check a release's bytes and signature"),
    "report": ("trinity.cli.report", "one self-contained page about one or more runs"),
}

GO_ON = ("demo", "data", "train")  # where an end left them

HELP = """usage: trinity COMMAND ...

Own a frontier-style sparse language model, from raw text to a served token.

commands:
{rows}
example:   trinity train debug --out runs/debug && trinity generate runs/debug --prompt 'def '
           'trinity COMMAND --help' shows what a command takes, with an example."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line with a remedy."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        known = [option for action in self._actions for option in action.option_strings]
        remedy = f"Try '{self.prog} --help'."
        remedy = nearest(unknown[1], known, remedy, cutoff=0.6) if unknown else remedy
        complaint = f"{self.prog}: {message}. {remedy}"
        launch.note_end(complaint)
        self.exit(2, f"{complaint}\n")


def show_help() -> None:
    print(HELP.format(rows="".join(f"  {name:<10} {summary}\n" for name, (_, summary) in COMMANDS.items())))


def main(argv: list[str] | None = None) -> int:
    """Carry out one command line; the exit code. A reader that goes away (`| head`) ends it quietly."""
    # Threads that wait by spinning stall a machine that has other work: a busy core cost three quarters of the speed.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        try:
            return dispatch(sys.argv[1:] if argv is None else argv)
        finally:  # also when argparse ends the process after its help
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        show_help()
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"trinity {version('trinity')}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        print(f"trinity: unknown command '{name}'. {nearest(name, list(COMMANDS))}", file=sys.stderr)
        return 2
    return run_command(name, arguments[1:])


def run_command(name: str, arguments: list[str]) -> int:
    """Parse and carry out one command; turn every failure into one line and an exit code."""
    if launch.has_ended():
        return 1
    module_name, summary = COMMANDS[name]
    try:
        module = importlib.import_module(module_name)
        parser = Parser(
            prog=f"trinity {name}",
            description=summary[0].upper() + summary[1:] + ".",
            epilog=(module.__doc__ or "").partition("\n\n")[2],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.configure(parser)
        options = parser.parse_args(arguments)
        options.action(options)
    except TrinityError as error:
        if os.environ.get("RANK", "0") == "0" or not error.alike:  # of what all raise the first one tells
            print(f"trinity {name}{_process()}: {error}", file=sys.stderr)
        if error.lasting:
            launch.note_end(f"trinity {name}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        goes_on = " What was saved stays; the same command again goes on." if name in GO_ON else ""
        print(f"\ntrinity {name}: interrupted.{goes_on}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get("TRINITY_TRACEBACK"):
            raise
        print(f"trinity {name}{_process()}: {told(error)}", file=sys.stderr)
        return 1
    return 0


def _process() -> str:
    """Which of several processes speaks; nothing for the first."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f" (process {rank} on {socket.gethostname()})"


def told(error: Exception) -> str:
    """What went wrong, and a remedy. What the system refused, memory among it, is no defect of trinity; the rest is."""
    memory = out_of_memory(error)
    if memory is not None:
        return f"{memory}. Ask for less at once, take a smaller model, or free memory on this machine."
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        remedy = "Check that path, its permissions and the free space on its disk."
        if isinstance(error, TimeoutError | ConnectionError) and not where:
            remedy = "Check that the other side runs and can be reached, and try again."
        return f"{where}{error.strerror or error}. {remedy}"
    what = " ".join(str(error).split())[:300]
    return f"unexpected {type(error).__name__}: {what}. This is a defect of trinity; TRINITY_TRACEBACK=1 shows where."


if __name__ == "__main__":
    sys.exit(main())
