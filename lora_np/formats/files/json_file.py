"""JSON in and out: small files that anyone may have written, and the dataclasses that they describe."""

from __future__ import annotations

import json
import sys
import types
import typing
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from .messages import shown
from .regular import expect_file

MAX_JSON_BYTES = 4 * 2**20  # far more than any configuration needs, far less than would hurt

T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a ValueError in one line if it is too large, not JSON, or not an object."""
    expect_file(path)
    with open(path, "rb") as file:
        return parse_json(file.read(MAX_JSON_BYTES + 1), str(path))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """The object that a JSON text describes, in UTF-8; `where` names the text in a ValueError.

    It must mean one thing to every reader: no key twice in one object, no number that a float cannot hold, no NaN.
    """
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{where}: expected at most {MAX_JSON_BYTES} bytes of JSON, got more")
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")  # json itself would guess at the encoding
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"{where}: the JSON is nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, an integer of thousands of digits
        raise ValueError(f"{where}: not valid JSON: {shown(str(error))}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; a ValueError names a key that stands there twice, or whose number no float holds."""
    for key, value in pairs:
        _check_numbers(key, value)
    return each_once(pairs)


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; a ValueError names a key that stands there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = Counter(key for key, _ in pairs)
        raise ValueError(f"{next(key for key in keys if keys[key] > 1)!r:.60} stands there twice")
    return found


def _check_numbers(key: str, value: Any) -> None:
    """A ValueError if a number, or one of a list, is NaN, infinite, or an integer beyond every float."""
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, list):
            _check_numbers(key, one)
        elif isinstance(one, (int, float)) and not abs(one) <= sys.float_info.max:
            raise ValueError(f"{key!r:.60}: expected a number, got one that no float holds: {one!r:.20}")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON of plain values, mappings and NumPy's scalars. Floats come back to the bit; NaN is a ValueError."""
    return json.dumps(value, indent=indent, allow_nan=False, default=_plain)


def write_json(path: Path, value: Any) -> None:
    """A JSON file, indented."""
    path.write_text(to_json(value, indent=2) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value.item()


def to_fields(value: Any) -> dict[str, Any]:
    """A dataclass as a dict for JSON, by its fields' names."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def from_fields(cls: type[T], data: object, where: str) -> T:
    """The dataclass whose fields JSON gave; a ValueError names a field that is unknown, of another type, or missing."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object with {cls.__name__}'s fields, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    for name, value in data.items():
        if name not in hints:
            raise ValueError(f"{where}: {cls.__name__} has no field {name!r:.60}")
        if not _fits(value, hints[name]):
            raise ValueError(f"{where}: {cls.__name__}.{name}: a value of the wrong type: {value!r:.60}")
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name not in data and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where}: {cls.__name__}.{field.name} is missing")
    try:
        return cls(**data)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {shown(str(error))}") from None


def _fits(value: object, hint: Any) -> bool:
    """Whether a JSON value is of a field's type; an integer will do for a float, a list for a tuple."""
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if kind is Literal:
        return isinstance(value, str)  # the dataclass names the choices
    if kind is tuple:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if kind is Mapping:
        return isinstance(value, dict) and all(_fits(item, args[1]) for item in value.values())
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)
