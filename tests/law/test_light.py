"""Light stays light: help, the bare import and the lower floors load nothing heavy. No clock is read here."""

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "numpy", "rich", "pyarrow", "tokenizers", "safetensors", "matplotlib", "fastapi", "jinja2", "httpx"}
LIGHT_FLOORS = ["base", "config", "plan", "report", "recipes", "text"]


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running `code`."""
    report = "\nimport json, sys; print('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import trinity",
        "from trinity.cli.main import main; main(['--help'])",
        "from trinity.cli.main import main; main(['trian'])",
        "from trinity.cli.main import main; main(['--version'])",
    ],
)
def test_nothing_heavy_is_imported(code: str):
    heavy = loaded_by(code) & HEAVY
    assert not heavy, f"{code!r} imported {sorted(heavy)}"


def test_help_of_every_command_imports_no_torch():
    from trinity.cli.main import COMMANDS

    code = (
        "from trinity.cli.main import main\n"
        f"for name in {list(COMMANDS)!r}:\n"
        "    try:\n        main([name, '--help'])\n"
        "    except SystemExit:\n        pass\n"
    )
    heavy = loaded_by(code) & HEAVY
    assert not heavy, f"a command module imports {sorted(heavy)} at its top; import inside the action"


def test_light_floors_import_no_torch():
    code = (
        "import importlib, pkgutil, trinity\n"
        f"for floor in {LIGHT_FLOORS!r}:\n"
        "    package = importlib.import_module(f'trinity.{floor}')\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
    )
    assert "torch" not in loaded_by(code)
