"""The table of recipes by name."""

from trinity.base.errors import ConfigError, nearest
from trinity.config.run import RunConfig
from trinity.recipes.small import debug, demo, lab256
from trinity.recipes.trinity_family import large, mini, nano

RECIPES = {"debug": debug, "demo": demo, "lab256": lab256, "nano": nano, "mini": mini, "large": large}


def recipe(name: str) -> RunConfig:
    """The recipe of that name; an unknown one is a ConfigError that offers the nearest."""
    if name not in RECIPES:
        raise ConfigError(f"Unknown recipe '{name}'.", nearest(name, list(RECIPES)))
    return RECIPES[name]()
