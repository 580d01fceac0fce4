"""Options of block devices: nested mappings, and the two spellings by which people write them in one string.

    json:{"driver": "qcow2", "file": {"driver": "file", "filename": "a.qcow2"}}
    driver=qcow2,file.driver=file,file.filename=a.qcow2          (",," is a literal comma)

``build`` turns a flat mapping into a driver's options dataclass: unknown keys are refused, strings become the
type that the field has. Keys may be spelled with "-" (as QEMU does) or with "_".
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import TypeVar

from blocklayer.base.errors import OptionError
from blocklayer.base.units import parse_size

Options = Mapping[str, object]
"""Keys are option names; values are strings, numbers, booleans, nested ``Options`` or open nodes."""

JSON_PREFIX = "json:"
DEPTH_MAX = 256
"""Nesting deeper than any real chain: bounds the recursion that a string can cause."""

_PARTS = re.compile(r"(?:\A|,)((?:[^,]|,,)*)")
"""From the left, two commas are one of the text: in "a=x,,,b=y" the third one ends the value "x,"."""

_KEY = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")

_BOOLS = {"on": True, "yes": True, "true": True, "y": True, "off": False, "no": False, "false": False, "n": False}

T = TypeVar("T")


def parse_options(text: str) -> dict[str, object]:
    """Parse either spelling into nested dicts. Raises ``OptionError`` that says where the text is wrong."""
    return parse_json(text) if text.startswith(JSON_PREFIX) else parse_keyval(text)


def parse_json(text: str) -> dict[str, object]:
    """Parse ``json:{...}``; dotted keys are nested like in the other spelling."""
    try:
        value = json.loads(text.removeprefix(JSON_PREFIX), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"not a json: name: {error}") from None
    if not isinstance(value, dict):
        raise OptionError("a json: name must hold an object")
    return nest(value)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise OptionError(f"option {key!r} is given twice")
        found[key] = value
    return found


def parse_keyval(text: str) -> dict[str, object]:
    """Parse ``key=value,key.sub=value``; a key without "=" means ``key=on``; of equal keys the last one holds."""
    flat: dict[str, object] = {}
    for part in _PARTS.findall(text):
        key, equals, value = part.replace(",,", ",").partition("=")
        if not _KEY.fullmatch(key):
            raise OptionError(f"{part!r} in {text!r} is not key=value")
        flat[key] = value if equals else "on"
    return nest(flat)


def nest(flat: Options, *, depth: int = 0) -> dict[str, object]:
    """Turn dotted keys into nested dicts: ``{"file.filename": x}`` becomes ``{"file": {"filename": x}}``."""
    tree: dict[str, object] = {}
    for dotted, raw in flat.items():
        *path, last = dotted.split(".")
        inner = depth + len(path) + 1
        if inner > DEPTH_MAX:
            raise OptionError(f"option {dotted[:40]!r}... is nested deeper than {DEPTH_MAX}")
        value = nest(raw, depth=inner) if isinstance(raw, Mapping) else raw
        _put(_descend(tree, path, dotted), last, value, dotted)
    return tree


def _descend(tree: dict[str, object], path: list[str], dotted: str) -> dict[str, object]:
    for name in path:
        inner = tree.setdefault(name, {})
        if not isinstance(inner, dict):
            raise OptionError(f"option {dotted!r} needs {name!r} to be a group, but it has a value of its own")
        tree = inner
    return tree


def _put(group: dict[str, object], name: str, value: object, dotted: str) -> None:
    present = group.get(name)
    if isinstance(present, dict) and isinstance(value, dict):
        for key, inner in value.items():
            _put(present, key, inner, f"{dotted}.{key}")
    elif name in group:
        raise OptionError(f"option {dotted!r} is given twice")
    else:
        group[name] = value


def build(kind: type[T], options: Options) -> T:
    """Make the options dataclass ``kind`` from ``options``. Raises ``OptionError`` for unknown, missing or wrong ones."""
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]  # T is a dataclass
    values: dict[str, object] = {}
    for key, raw in options.items():
        name = key.replace("-", "_")
        if name not in fields:
            known = ", ".join(sorted(fields)) or "none"
            raise OptionError(f"unknown option {key!r}; known options: {known}")
        if name in values:
            raise OptionError(f"option {key!r} is given twice")
        values[name] = convert(key, raw, hints[name])
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise OptionError(f"option {missing[0]!r} is required")
    return kind(**values)


def convert(key: str, raw: object, hint: object) -> object:
    """Convert one value to the type ``hint`` (int as a size, bool as on/off, an Enum by value, float, str, X | None)."""
    if isinstance(hint, types.UnionType):
        if raw is None:
            return None
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if not isinstance(hint, type) or (isinstance(raw, hint) and hint not in (int, float)):
        return raw
    try:
        return _CONVERTERS.get(hint, _convert_other)(raw, hint)
    except (ValueError, KeyError, TypeError, OverflowError):
        raise OptionError(f"option {key!r} cannot be {raw!r}; it takes {_expected(hint)}") from None


def _convert_other(raw: object, hint: type) -> object:
    if issubclass(hint, enum.Enum):
        return hint(raw)
    raise TypeError(raw)


def _convert_bool(raw: object, _hint: type) -> object:
    return _BOOLS[str(raw).lower()]


def _convert_int(raw: object, _hint: type) -> object:
    if not isinstance(raw, str | int) or isinstance(raw, bool):
        raise TypeError(raw)
    return parse_size(raw)


def _convert_float(raw: object, _hint: type) -> object:
    if not isinstance(raw, str | int | float) or isinstance(raw, bool):
        raise TypeError(raw)
    value = float(raw)
    if not math.isfinite(value):
        raise ValueError(raw)
    return value


def _convert_str(raw: object, _hint: type) -> object:
    raise TypeError(raw)


_CONVERTERS = {bool: _convert_bool, int: _convert_int, float: _convert_float, str: _convert_str}


def _expected(hint: type) -> str:
    if issubclass(hint, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    return {bool: "on or off", int: "a number or size", float: "a number", str: "text"}.get(hint, hint.__name__)
