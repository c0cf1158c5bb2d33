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
    return asdict(config)


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
        hint = hints[name]
        if isinstance(hint, type) and is_dataclass(hint):
            if not isinstance(value, dict):
                raise ConfigError(f"'{where}{name}' must be a table of settings.", f"Got {value!r}.")
            built[name] = from_dict(hint, value, f"{where}{name}.")
        else:
            built[name] = _as_type(hint, value, f"{where}{name}")
    try:
        return kind(**built)
    except TypeError as error:
        raise ConfigError(f"{where or kind.__name__} is incomplete: {error}.", "Add the missing keys.") from error


def override(config: Config, assignments: Iterable[str]) -> Config:
    """Apply `a.b=c` assignments in order; each names a key that exists. Cross-field rules are checked on the result."""
    values = to_dict(config)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"'{assignment}' is not a setting.", "Write --set section.key=value.")
        parts, table, hint = path.strip().split("."), values, type(config)
        for depth, part in enumerate(parts):
            where = ".".join(parts[:depth])
            if not (isinstance(hint, type) and is_dataclass(hint)):
                raise ConfigError(f"'{where}' holds a single value; '{path}' goes deeper.", "Drop the last part.")
            if part not in table:
                raise ConfigError(f"Unknown key '{path}'.", nearest(part, list(table)))
            hint = get_type_hints(hint)[part]
            if depth == len(parts) - 1:
                if isinstance(hint, type) and is_dataclass(hint):
                    raise ConfigError(f"'{path}' is a section.", f"Set one of its keys: {', '.join(table[part])}.")
                table[part] = _as_type(hint, _literal(text.strip(), hint), path)
            else:
                table = table[part]
    return from_dict(type(config), values)


def differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    """Keys whose values differ between two configs as dicts, as 'section.key: old -> new'."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{where}{name}.")
        elif a != b:
            found.append(f"{where}{name}: {a} -> {b}")
    return found


def _literal(text: str, hint: Any) -> Any:
    if hint is str or get_origin(hint) is Literal:
        return text
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if hint is int and text[:1].isdigit() and text[-1:].isalpha():
        return parse_count(text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


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
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    accepted = hint if isinstance(hint, type | UnionType) else object
    if not isinstance(value, accepted) or (hint in (int, float) and isinstance(value, bool)):
        remedy = _EXAMPLES.get(hint, "Check the value.")
        raise ConfigError(f"'{where}' must be {getattr(hint, '__name__', hint)}, not {value!r}.", remedy)
    return value
