"""Question and answer pairs from the standard library's docstrings: conversations for a first fine-tuning.

Two questions a documented function, class or method: what it does (the first paragraph of its docstring) and how it is
called (its signature). The pairs of a module go to the held-out file exactly when `data tokenize` with the same share
holds out the module's source: a model fine-tuned on the others has not been told what it is later measured on. What
the library itself says in two modules, word for word, may be on both sides, here as in the token folder.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trinity.base.durable import folder_aside, sha256_text
from trinity.base.lineage import write_lineage
from trinity.data.stdlib import library_files, module_name, module_text, parsed
from trinity.data.tokenise import HELDOUT_FRACTION, hash_share, refuse_impossible_share

LONGEST_ANSWER = 400  # characters; a longer first paragraph is left out rather than cut in the middle of a thought


class Pair(NamedTuple):
    root: str  # id of the document that holds the module's source
    name: str
    question: str
    answer: str

    def as_line(self) -> str:
        messages = [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]
        return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def write_questions(out: Path, heldout_fraction: float = HELDOUT_FRACTION) -> dict[str, int]:
    """Write train.jsonl and heldout.jsonl into the folder `out`; returns the number of pairs of each.

    `heldout_fraction` must be that of the token folder the model was trained on.
    """
    refuse_impossible_share(heldout_fraction)
    counts = {"train": 0, "heldout": 0}
    with (
        folder_aside(out) as aside,
        (aside / "train.jsonl").open("w", encoding="utf-8") as train,
        (aside / "heldout.jsonl").open("w", encoding="utf-8") as held,
    ):
        for pair in docstring_pairs():
            side = "heldout" if hash_share(pair.root) < heldout_fraction else "train"
            (held if side == "heldout" else train).write(pair.as_line())
            counts[side] += 1
        made_by = {"command": "data questions", "heldout_fraction": heldout_fraction}
        write_lineage(aside, "conversations", {"source": "stdlib"}, made_by)
    return counts


def docstring_pairs() -> Iterator[Pair]:
    """Every pair of the library, in the order of modules and lines."""
    for name, _ in library_files():
        if name.startswith("_"):  # private modules answer nobody's question
            continue
        source = module_text(name)
        try:
            tree = parsed(source)
        except SyntaxError:
            continue
        yield from _pairs_inside(tree, sha256_text(source), module_name(name))


def _pairs_inside(parent: ast.Module | ast.ClassDef, root: str, prefix: str) -> Iterator[Pair]:
    for node in parent.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        if paragraph and len(paragraph) <= LONGEST_ANSWER:
            yield Pair(root, name, f"What does {name} do?", paragraph)
            if not isinstance(node, ast.ClassDef) and not _is_read(node):
                yield Pair(root, name, f"How is {name} called?", f"{name}({ast.unparse(node.args)})")
        if isinstance(node, ast.ClassDef):
            yield from _pairs_inside(node, root, name)


def _is_read(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function is a property: read, not called."""
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
