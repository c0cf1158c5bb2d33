"""A folder of real text to walk with: some of this Python's own library, and a few files with something wrong.

    .venv/bin/python tests/walk/text_folder.py walk/text

library/*.py are modules, guides/*.md their docstrings, questions.jsonl one question and answer a line. Wrong on
purpose: a guide that is there twice, a log of one repeated line, an empty note, a file in Latin-1, a cut-off JSON line.
"""

import ast
import json
import sys
from pathlib import Path

from trinity.data.stdlib import library_folder, module_documents, parsed

MODULES = (
    "abc bisect calendar cmd codecs colorsys contextlib copy csv dataclasses difflib dis enum fileinput fnmatch"
    " fractions functools gettext glob gzip heapq hmac inspect linecache mimetypes netrc numbers operator pprint queue"
    " random reprlib sched shelve shlex stat statistics string tempfile textwrap threading timeit traceback types uuid"
)
FOLLOWED = "textwrap"  # docs/walk.md follows its guide
DAMAGED = {
    "guides/wrapping-again.md": "duplicate",
    "notes/log.txt": "duplicate lines",
    "notes/nothing.txt": "empty",
    "notes/old.txt:2": "not UTF-8",
    "questions.jsonl:4": "broken JSON",
}


def write_text_folder(folder: Path) -> None:
    """Fill `folder`; equal Pythons make equal files."""
    for name in MODULES.split():
        for document in module_documents(f"{name}.py"):
            place = ("library", "py") if document.kind == "code" else ("guides", "md")
            write(folder / place[0] / f"{name}.{place[1]}", document.text.encode())
    write(folder / "guides" / "wrapping-again.md", (folder / "guides" / f"{FOLLOWED}.md").read_bytes())
    write(folder / "notes" / "log.txt", b"The walk went well today, nothing to report.\n" * 12)
    write(folder / "notes" / "nothing.txt", b"\n\n")
    write(folder / "notes" / "old.txt", "First line.\nCaf\u00e9 cr\u00e8me.\n".encode("latin-1"))
    lines = [json.dumps({"text": text, "kind": "qa"}) for text in questions()]
    lines.insert(3, lines[3][:20])
    write(folder / "questions.jsonl", "\n".join(lines).encode())


def questions() -> list[str]:
    """One question and answer for each documented function of the followed module and its neighbours."""
    found = []
    for name in (FOLLOWED, "heapq", "shlex", "glob"):
        for node in parsed((library_folder() / f"{name}.py").read_text()).body:
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                found.append(f"Q: What does {name}.{node.name} do?\nA: {' '.join(text.split())}")
    return found


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


if __name__ == "__main__":
    write_text_folder(Path(sys.argv[1]))
    print(f"{sum(path.is_file() for path in Path(sys.argv[1]).rglob('*'))} files in {sys.argv[1]}")
