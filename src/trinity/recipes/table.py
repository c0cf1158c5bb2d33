"""The table of recipes by name; a name that ends in .toml is a recipe file."""

from pathlib import Path

from trinity.base.errors import ConfigError, nearest
from trinity.config.run import RunConfig
from trinity.recipes.file import read_recipe
from trinity.recipes.small import debug, demo, lab256
from trinity.recipes.trinity_family import large, mini, nano

RECIPES = {"debug": debug, "demo": demo, "lab256": lab256, "nano": nano, "mini": mini, "large": large}


def recipe(name: str) -> RunConfig:
    """The recipe of that name or in that file; an unknown one is a ConfigError that offers the nearest."""
    if name.endswith(".toml"):
        return read_recipe(Path(name), {known: make() for known, make in RECIPES.items()})
    if name not in RECIPES:
        raise ConfigError(f"Unknown recipe '{name}'.", f"{nearest(name, list(RECIPES))} A recipe file ends in .toml.")
    return RECIPES[name]()
