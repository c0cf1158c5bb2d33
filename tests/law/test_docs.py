"""Docs are true: links and paths lead somewhere, and every `trinity` command they show is one that exists."""

import argparse
import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest

import trinity
from trinity.cli.main import COMMANDS, Parser

ROOT = Path(__file__).parents[2]
PAGES = [
    path
    for path in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "records").rglob("*.md"))]
    if path.is_file()
]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
OWN_PATH = re.compile(r"`((?:src|tests|docs|bench|lab|records)/[\w./-]+)`")
CONSOLE = re.compile(r"```console\n(.*?)```", re.DOTALL)
MAKE_TARGET = re.compile(r"^([a-z][a-z-]*):", re.MULTILINE)


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    """The page without its fenced blocks, whose brackets are not links."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def shown_commands(text: str) -> list[str]:
    """What a reader would type: the `$ ` lines of the console blocks, continued lines joined."""
    lines = [line for block in CONSOLE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    return [line.removeprefix("$ ").strip() for line in lines if line.startswith("$ ")]


def parser_of(name: str) -> argparse.ArgumentParser:
    module = importlib.import_module(COMMANDS[name][0])
    parser = Parser(prog=f"trinity {name}")
    module.configure(parser)
    return parser


def check_command(line: str) -> None:
    """Parse each `trinity ...` of a shell line against the real parser; an AssertionError says what does not exist."""
    words = [word.replace("...", "x") for word in shlex.split(line, comments=True)]
    ends = {"&&", "||", ";", "|", "&"}
    while words:
        stop = next((i for i, word in enumerate(words) if word in ends), len(words))
        command, words = words[:stop], words[stop + 1 :]
        while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
            command = command[1:]
        if not command or Path(command[0]).name != "trinity" or command[1:2] in ([], ["--help"], ["--version"]):
            continue
        if ">" in command:
            command = command[: command.index(">")]
        assert command[1] in COMMANDS, f"there is no command '{command[1]}': {line}"
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(io.StringIO()):
                parser_of(command[1]).parse_args(command[2:])
        except SystemExit as end:
            assert not end.code, f"{line}\n{complaint.getvalue()}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_and_paths_lead_somewhere(page: Path):
    text = page.read_text()
    links = [a or b for a, b in LINK.findall(without_code(text))]
    local = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    dead = [link for link in local if not (page.parent / link).exists()]
    dead += [path for path in OWN_PATH.findall(text) if not (ROOT / path).exists()]
    assert not dead, f"{page_id(page)} names what is not there: {dead}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_shown_commands_parse(page: Path):
    targets = set(MAKE_TARGET.findall((ROOT / "Makefile").read_text()))
    for line in shown_commands(page.read_text()):
        for target in re.findall(r"\bmake ([a-z][a-z-]*)", line):
            assert target in targets, f"the Makefile has no target '{target}': {line}"
        check_command(line)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_configures_and_shows_an_example(name: str):
    module = importlib.import_module(COMMANDS[name][0])
    example = (module.__doc__ or "").partition("Example")[2]
    lines = [line.strip().removeprefix("$ ") for line in example.replace("\\\n", " ").splitlines()]
    shown = [line for line in lines if line.startswith("trinity ")]
    assert shown, f"{module.__name__} shows no example in its docstring"
    assert any(line.split()[1] == name for line in shown), f"no example of 'trinity {name}' itself"
    for line in shown:
        check_command(line)


def test_the_help_example_parses(capsys: pytest.CaptureFixture[str]):
    from trinity.cli.main import show_help

    show_help()
    example = re.search(r"^example:\s+(.*)$", capsys.readouterr().out, re.MULTILINE)
    assert example
    check_command(example[1])


def test_a_wrong_flag_or_command_in_a_page_is_seen():
    with pytest.raises(AssertionError):
        check_command("trinity plan nano --no-such-flag")
    with pytest.raises(AssertionError):
        check_command("make demo && trinity trian debug")


def test_public_face():
    assert trinity.__all__ == ["load"]
    assert all(getattr(trinity, name) for name in trinity.__all__)
    with pytest.raises(AttributeError, match="nothing_here"):
        trinity.nothing_here  # noqa: B018
    public = {name for name in vars(trinity) if not name.startswith("_")} - {"TYPE_CHECKING"}
    modules = {path.name for path in (ROOT / "src" / "trinity").iterdir()}
    assert public - modules <= set(trinity.__all__)
