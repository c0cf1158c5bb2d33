"""Recipe files: a recipe as TOML that a person can read, write and diff. Strict, and mistakes are named by their line.

base = "lab256"              what is not written here is as in this recipe; without it, everything is written here
[train]                      the sections and keys of RunConfig; counts may be written as "4.9T"
tokens = "64M"
[[phases]]                   all phases of the run, in order: those of the base are replaced
name = "late"
from_tokens = "48M"
mix = "mixes/late"           relative to the file
"""

import json
import os
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from trinity.base.durable import write_durably
from trinity.base.errors import ConfigError, nearest
from trinity.config.load import from_dict, is_section, sections_of, to_dict
from trinity.config.run import RunConfig

_HEADER = re.compile(r"\s*(\[\[?)\s*([\w.-]+)\s*\]\]?")
_KEY = re.compile(r"\s*([\w.-]+)\s*=")


def read_recipe(path: Path, bases: dict[str, RunConfig]) -> RunConfig:
    """The recipe that a file writes down, over one of `bases`. Raises ConfigError naming file and line."""
    if not path.exists():
        raise ConfigError(
            f"There is no recipe file {path}.",
            f"Write one down with 'trinity train RECIPE --write-recipe {path}', or name a recipe: {', '.join(bases)}.",
        )
    try:
        text = path.read_text(encoding="utf-8")
        written = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read as a recipe: {getattr(error, 'strerror', error)}.", "Name a .toml file."
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}.", "Mend that line.") from error
    try:
        return from_dict(RunConfig, _whole(written, path, bases))
    except ConfigError as error:
        line = _line_of(error.what, text)
        place = f"{path}, line {line}" if line else str(path)
        raise ConfigError(f"{place}: {error.what}", error.remedy) from error


def _whole(written: dict[str, Any], path: Path, bases: dict[str, RunConfig]) -> dict[str, Any]:
    """Everything a RunConfig is made of: what the file writes, over its base."""
    written = {"name": path.stem, **written}
    base = written.pop("base", None)
    if base is not None and base not in bases:
        raise ConfigError(f"Unknown recipe 'base' = {base!r}.", nearest(str(base), list(bases)))
    _place_mixes(written, path.parent)
    values = to_dict(bases[base]) if base else {}
    hints = get_type_hints(RunConfig)
    for name, value in written.items():
        over = is_section(hints.get(name)) and isinstance(value, dict)
        values[name] = {**values.get(name, {}), **value} if over else value
    return values


def _place_mixes(written: dict[str, Any], folder: Path) -> None:
    """Make paths that are relative to the recipe file relative to the working directory."""
    phases = written.get("phases")
    for section in [*(phases if isinstance(phases, list) else []), written.get("extension")]:
        if isinstance(section, dict) and isinstance(section.get("mix"), str) and section["mix"]:
            section["mix"] = os.path.normpath(folder / section["mix"])


def _line_of(what: str, text: str) -> int | None:
    """The line (from 1) that writes the longest setting whose name occurs in `what`."""
    section, counts, found = "", {}, {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            section = f"{header[2]}."
            if header[1] == "[[":
                section += f"{counts.setdefault(header[2], 0)}."
                counts[header[2]] += 1
            found[section.rstrip(".")] = number
        elif key := _KEY.match(line):
            found[f"{section}{key[1]}"] = number
    named = [name for name in found if _names(what, name)]
    return found[max(named, key=len)] if named else None


def _names(what: str, setting: str) -> bool:
    """Whether a message names a setting: as it stands when it has a dot, in quotes when it might be any word."""
    return bool(re.search(rf"(?<![\w.]){re.escape(setting)}(?!\w)" if "." in setting else f"'{setting}'", what))


def write_recipe(config: RunConfig, path: Path) -> None:
    """Every setting of a recipe, each with its meaning, as a file that `read_recipe` reads back to the same."""
    lines = [
        f"# Every setting of a recipe with its meaning. Train it: trinity train {path.name} --out RUN",
        "",
        f"name = {_toml(config.name)}",
    ]
    hints, values = get_type_hints(RunConfig), to_dict(config)
    for setting in fields(RunConfig):
        name = setting.name
        if each := sections_of(hints[name]):
            for entry in values[name]:
                lines += ["", f"# {setting.metadata['meaning']}", f"[[{name}]]", *_keys(each, entry, path)]
        elif is_section(hints[name]):
            lines += ["", f"# {setting.metadata['meaning']}", f"[{name}]", *_keys(hints[name], values[name], path)]
    write_durably(path, "\n".join(lines) + "\n")


def _keys(kind: Any, values: dict[str, Any], path: Path) -> list[str]:
    lines = []
    for setting in fields(kind):
        value = values[setting.name]
        if setting.name == "mix" and value:
            value = os.path.relpath(value, path.parent)
        lines.append(f"{setting.name} = {_toml(value)}  # {setting.metadata['meaning']}")
    return lines


def _toml(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:_}" if isinstance(value, int) and value >= 100_000 else repr(value)
