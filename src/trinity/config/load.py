"""Strict loading: dicts and `--set a.b=c` become dataclasses; an unknown key is refused with the nearest name."""

import ast
from collections.abc import Iterable
from dataclasses import asdict, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from trinity.base.errors import ConfigError, UsageError, nearest
from trinity.base.lineage import fingerprint
from trinity.base.units import parse_count

Config = TypeVar("Config")
_EXAMPLES = {
    int: "Write a whole number, such as 4096 or 2M.",
    float: "Write a number, such as 0.02.",
    bool: "Write true or false.",
}


def to_dict(config: Any) -> dict[str, Any]:
    """As JSON would give it back: sections are dicts, tuples are lists."""
    return asdict(config, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items})


def config_fingerprint(config: Any) -> str:
    return fingerprint(to_dict(config))


def from_dict(kind: type[Config], values: dict[str, Any], where: str = "") -> Config:
    """Build a config from a dict. Unknown and missing keys, and values of the wrong type, are ConfigErrors."""
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ConfigError(f"Unknown key '{where}{name}'.", nearest(name, list(known)))
    built: dict[str, Any] = {}
    for name, value in values.items():
        built[name] = _built(hints[name], value, f"{where}{name}")
    try:
        return kind(**built)
    except TypeError as error:
        raise ConfigError(f"{where or kind.__name__} is incomplete: {error}.", "Add the missing keys.") from error


def _built(hint: Any, value: Any, where: str) -> Any:
    """A section, a tuple of sections, or a single value."""
    if is_section(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"'{where}' must be a table of settings.", f"Got {value!r}.")
        return from_dict(hint, value, f"{where}.")
    if each := sections_of(hint):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"'{where}' must be a list of tables.", f"Got {value!r}.")
        return tuple(_built(each, entry, f"{where}.{number}") for number, entry in enumerate(value))
    return _as_type(hint, value, where)


def is_section(hint: Any) -> bool:
    return isinstance(hint, type) and is_dataclass(hint)


def sections_of(hint: Any) -> Any:
    """X of a setting declared as tuple[X, ...] of sections; None of any other."""
    return get_args(hint)[0] if get_origin(hint) is tuple and is_section(get_args(hint)[0]) else None


def override(config: Config, assignments: Iterable[str]) -> Config:
    """Apply `a.b=c` assignments in order; each names a key that exists. Cross-field rules are checked on the result.

    Entries of a list of sections go by their number: `phases.0.batch_tokens=1M`.
    """
    values = to_dict(config)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"'{assignment}' is not a setting.", "Write --set section.key=value.")
        parts, table, inside, hint = path.strip().split("."), values, values, type(config)
        for depth, part in enumerate(parts):
            table = inside
            if len(parts) == 1 and part not in table and (whole := _settings_called(part, values)):
                raise ConfigError(f"Unknown key '{path}'.", f"Did you mean {' or '.join(whole)}?")
            inside, hint = _inside(table, hint, ".".join(parts[:depth]), part, path)
        if is_section(hint):
            raise ConfigError(f"'{path}' is a section.", f"Set one of its keys: {', '.join(inside)}.")
        if sections_of(hint):
            raise ConfigError(f"'{path}' is a list of sections.", f"Set a key of one, such as {path}.0.name.")
        table[parts[-1]] = _as_type(hint, _literal(text.strip(), hint), path)
    return from_dict(type(config), values)


def _settings_called(name: str, values: dict[str, Any]) -> list[str]:
    """The settings whose last part is `name`, with their sections and in quotes."""
    return [f"'{section}.{name}'" for section, keys in values.items() if isinstance(keys, dict) and name in keys]


def _inside(table: Any, hint: Any, where: str, part: str, path: str) -> tuple[Any, Any]:
    """What `part` names inside the section, or list of sections, `table`; and how it is declared."""
    if each := sections_of(hint):
        if not part.isdecimal() or int(part) >= len(table):
            raise ConfigError(
                f"There is no '{where}.{part}'; '{where}' has {len(table)} entries, numbered from 0.",
                "Entries are added and removed in a recipe file.",
            )
        return table[int(part)], each
    if not is_section(hint):
        raise ConfigError(f"'{where}' holds a single value; '{path}' goes deeper.", "Drop the last part.")
    if part not in table:
        raise ConfigError(f"Unknown key '{path}'.", nearest(part, list(table)))
    return table[part], get_type_hints(hint)[part]


def differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    """Keys whose values differ between two configs as dicts, as 'section.key: old -> new'."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = (_by_number(side.get(name)) for side in (old, new))
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{where}{name}.")
        elif a != b:
            found.append(f"{where}{name}: {a} -> {b}")
    return found


def _by_number(value: Any) -> Any:
    """A list of sections as a section whose keys are numbers."""
    sections = isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
    return {str(number): entry for number, entry in enumerate(value)} if sections else value


def _literal(text: str, hint: Any) -> Any:
    if hint is str or get_origin(hint) is Literal:
        return text
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if hint is int and _is_count(text):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _is_count(text: str) -> bool:
    return text[:1].isdigit() and text[-1:].isalpha()


def _as_type(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"'{where}' cannot be {value!r}.", nearest(str(value), [str(v) for v in get_args(hint)]))
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise ConfigError(f"'{where}' has {len(str(value))} digits.", _EXAMPLES[float]) from error
    if hint is int and isinstance(value, str) and _is_count(value):
        return parse_count(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    accepted = hint if isinstance(hint, type | UnionType) else object
    if not isinstance(value, accepted) or (hint in (int, float) and isinstance(value, bool)):
        remedy = _EXAMPLES.get(hint, "Check the value.")
        raise ConfigError(f"'{where}' must be {getattr(hint, '__name__', hint)}, not {value!r}.", remedy)
    return value
