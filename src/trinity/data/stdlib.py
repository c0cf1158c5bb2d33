"""The embedded default corpus: source and documentation of the running Python's own standard library.

Each module gives a `code` document (its source) and, where it has docstrings, a `docs` document (module, classes and
functions with their qualified names as headings), a child of the first, so that both land on the same side of the
held-out split. The language reference that `pydoc` carries as one table of escaped strings becomes one `docs`
document a topic.

Left out: tests (they repeat the library's code in every variation and would outweigh it), byte code and compiled
parts, installed packages, build-time data with paths of the machine that built this Python, and generated character
tables (`encodings/cp*.py` and their kind: a million bytes of numbers, in which nothing can be learnt but themselves).
"""

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from trinity.base.errors import DataError
from trinity.data.documents import Document

LICENCE = "PSF-2.0"
TOPICS = "pydoc_data/topics.py"
LEFT_OUT_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload"}
GENERATED_TABLE = ("decoding_table = (", "decoding_map = codecs.make_identity_dict")


def library_folder() -> Path:
    """Where the standard library's source lies. Raises DataError for a Python that was installed without it."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    if not (folder / "os.py").is_file():
        raise DataError(
            f"This Python has no standard library source in {folder}.", "Give a folder of text instead of 'stdlib'."
        )
    return folder


def library_files() -> list[tuple[str, int]]:
    """(name relative to the library folder, size in bytes) of every module that belongs to the corpus, sorted."""
    folder = library_folder()
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in LEFT_OUT_FOLDERS and not name.startswith("config-")]
        for name in files:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(place, name)
                found.append((path.relative_to(folder).as_posix(), path.stat().st_size))
    return sorted(found)


def module_documents(name: str) -> Iterator[Document]:
    """The documents one module gives: none for a table or an empty file, else its source and perhaps its docstrings.

    Raises DataError for a module that cannot be read.
    """
    text = module_text(name)
    if name == TOPICS:
        yield from topic_documents(text)
        return
    if not text.strip() or any(sign in text for sign in GENERATED_TABLE):
        return
    code = Document(text, name, "code", LICENCE)
    yield code
    described = docstrings(text, module_name(name))
    if described:
        yield Document(described, f"{name}:docs", "docs", LICENCE, (code.id,))


def module_text(name: str) -> str:
    """The source of a module. Raises DataError for one that cannot be read."""
    path = library_folder() / name
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.", "Mend this Python's installation.") from error


def topic_documents(source: str) -> Iterator[Document]:
    """The language reference topics inside pydoc's table, each as the text it was before it was escaped."""
    for statement in parsed(source).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for topic, text in sorted(ast.literal_eval(statement.value).items()):
                yield Document(text, f"{TOPICS}:{topic}", "docs", LICENCE)


def module_name(name: str) -> str:
    """'json/__init__.py' -> 'json', 'os.py' -> 'os'."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def parsed(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own invalid escapes are not ours to report
        return ast.parse(source)


def docstrings(source: str, module: str) -> str:
    """The docstrings of a module as one readable text, or '' where there is none or the source does not parse."""
    try:
        tree = parsed(source)
    except SyntaxError:
        return ""
    own = ast.get_docstring(tree)
    sections = ([own] if own else []) + list(described_members(tree, module, depth=2))
    return f"# {module}\n\n" + "\n\n".join(sections) + "\n" if sections else ""


def described_members(parent: ast.Module | ast.ClassDef, prefix: str, depth: int) -> Iterator[str]:
    """A heading and a text for each public class and function with a docstring, members after their class."""
    for node in parent.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("_") and not node.name.endswith("__"):
            continue
        name = f"{prefix}.{node.name}"
        text = ast.get_docstring(node)
        if text:
            call = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
            yield f"{'#' * min(depth, 6)} {name}{call}\n\n{text}"
        if isinstance(node, ast.ClassDef):
            yield from described_members(node, name, depth + 1)
