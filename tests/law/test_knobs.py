"""Knobs are alive, the static part: every field of every config dataclass is read somewhere outside config.

That a training knob also changes the result is shown by tests/law/test_knobs_alive.py.
"""

import ast
import dataclasses
import importlib
import pkgutil
from pathlib import Path

import pytest

import trinity.config

SRC = Path(__file__).parents[2] / "src" / "trinity"

# Fields that nothing reads by name, each with the reason why that is right.
DECLARED: dict[str, str] = {
    "PhaseConfig.keep": "config/run.py names the checkpoint in RunConfig.named_checkpoints",
    "PhaseConfig.mix": "config/phases.py numbers them, and the loader opens RunConfig.mixes",
    "ExtensionConfig.mix": "config/phases.py numbers them, and the loader opens RunConfig.mixes",
}


def config_classes() -> list[type]:
    found = {}
    for module in pkgutil.iter_modules(trinity.config.__path__, "trinity.config."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and dataclasses.is_dataclass(value):
                found[value.__name__] = value
    return list(found.values())


def attributes_read() -> set[str]:
    """Names read as an attribute (`config.name`) anywhere in the package but in config itself."""
    return {
        node.attr
        for path in SRC.rglob("*.py")
        if path.relative_to(SRC).parts[0] != "config"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


READ = attributes_read()
FIELDS = [(kind, field) for kind in config_classes() for field in dataclasses.fields(kind)]


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=lambda value: getattr(value, "__name__", None) or value.name)
def test_every_knob_is_read(kind: type, field: dataclasses.Field):
    name = f"{kind.__name__}.{field.name}"
    assert field.name in READ or DECLARED.get(name), f"{name} is read nowhere outside config: remove it or read it"


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=lambda value: getattr(value, "__name__", None) or value.name)
def test_every_knob_says_what_it_means(kind: type, field: dataclasses.Field):
    assert field.metadata.get("meaning"), f"{kind.__name__}.{field.name} has no sentence of meaning"


@pytest.mark.parametrize("kind", config_classes(), ids=lambda kind: kind.__name__)
def test_configs_are_frozen_and_keyword_only(kind: type):
    assert kind.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(kind))


def test_declared_reasons_are_still_needed():
    known = {f"{kind.__name__}.{field.name}" for kind, field in FIELDS}
    assert set(DECLARED) <= known
    assert not [name for name in DECLARED if name.split(".")[1] in READ]
