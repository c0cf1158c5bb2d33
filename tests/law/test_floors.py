"""The import law: every import points strictly down, and a third-party package has an address.

Imports inside functions and under TYPE_CHECKING count too: a hidden knot is still a knot.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FLOORS = [
    {"base"},
    {"config"},
    {"kernels"},
    {"plan", "report", "recipes", "text", "model", "balance", "optim"},
    {"data", "parallel", "ckpt"},
    {"train", "engine"},
    {"align", "serve", "audit", "bench"},
    {"release"},
    {"cli"},
]
SRC = Path(__file__).parents[2] / "src" / "trinity"
FLOOR = {package: level for level, floor in enumerate(FLOORS) for package in floor}
PACKAGES = sorted(path.name for path in SRC.iterdir() if (path / "__init__.py").exists())

NO_TORCH = {"base", "config", "plan", "report", "recipes", "text"}

# Where a third-party package may be imported: nowhere else, not even lazily.
ONLY_IN = {
    "transformers": {"bench"},
    "openai": set(),
    "llama_cpp": {"bench"},
    "fastapi": {"serve"},
    "starlette": {"serve"},
    "uvicorn": {"serve"},
    "matplotlib": {"report"},
    "llguidance": {"engine"},
    "model_signing": {"release"},
    "gguf": {"ckpt"},
    "torch": {package for package in FLOOR if package not in NO_TORCH},
}


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a source text imports, anywhere in it; literal import_module calls as well."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write trinity.package.module"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def breaches_in(source: str, home: str) -> list[str]:
    """What a file of package `home` imports against the law, one sentence each."""
    found = []
    for line, name in imports(source):
        top, _, rest = name.partition(".")
        if top == "trinity":
            other = rest.split(".")[0]
            if other in FLOOR and other != home and FLOOR[other] >= FLOOR[home]:
                found.append(f"line {line}: {home} (floor {FLOOR[home]}) imports {other} (floor {FLOOR[other]})")
            if other == "recipes" and home not in ("recipes", "cli"):
                found.append(f"line {line}: only cli and tests import recipes")
        elif home not in ONLY_IN.get(top, {home}):
            found.append(f"line {line}: {top} has no place in {home}")
    return found


def test_every_package_has_a_floor():
    assert set(PACKAGES) <= set(FLOOR), f"give these a floor: {sorted(set(PACKAGES) - set(FLOOR))}"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_points_down(package: str):
    breaches = [
        f"{path.relative_to(SRC)} {breach}"
        for path in sorted((SRC / package).rglob("*.py"))
        for breach in breaches_in(path.read_text(), package)
    ]
    assert not breaches, "\n".join(breaches)


def test_the_top_face_imports_lazily():
    """src/trinity/__init__.py may name any floor, but only inside its __getattr__ or for type checkers."""
    tree = ast.parse((SRC / "__init__.py").read_text())
    statements = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [name for node in statements for _, name in imports(ast.unparse(node)) if name.startswith("trinity")]


@pytest.mark.parametrize("package", PACKAGES)
def test_an_init_file_holds_a_docstring_only(package: str):
    tree = ast.parse((SRC / package / "__init__.py").read_text())
    assert ast.get_docstring(tree), f"{package}/__init__.py has no docstring"
    assert len(tree.body) == 1, f"{package}/__init__.py holds more than its docstring"


def test_no_package_has_a_cycle():
    """Inside a package the modules are in order too."""
    needs = {}
    for path in SRC.rglob("*.py"):
        name = ".".join(("trinity", *path.relative_to(SRC).with_suffix("").parts))
        needs[name] = {imported for _, imported in imports(path.read_text())}
    edges = {
        name: {
            other for other in needs if other != name and any(i == other or i.startswith(f"{other}.") for i in found)
        }
        for name, found in needs.items()
        if name != "trinity.__init__"
    }
    while leaves := [name for name, others in edges.items() if not others & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert not edges, f"these modules import each other: {sorted(edges)}"


@pytest.mark.parametrize(
    ("home", "source"),
    [
        ("base", "from trinity.config.load import override"),
        ("model", "def f():\n    import trinity.balance.update"),
        ("plan", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from trinity.model.block import Block"),
        ("config", "from trinity import plan"),
        ("train", "import importlib\nimportlib.import_module('trinity.serve.app')"),
        ("text", "import torch.nn as nn"),
        ("engine", "from transformers import AutoModel"),
        ("audit", "import matplotlib.pyplot"),
        ("data", "from fastapi import FastAPI"),
        ("train", "from trinity.recipes.table import recipe"),
    ],
)
def test_the_law_sees_a_breach(home: str, source: str):
    assert breaches_in(source, home)
