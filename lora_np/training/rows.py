"""Rows of a file of examples: objects of JSON, in an array, in lines or one after another, and lines of a table.

A line ends with a line feed, before which a carriage return may stand, and nowhere else: U+2028, U+0085 and no-break
spaces are a text's own.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ..formats.files.json_file import each_once
from ..formats.files.messages import shown

DELIMITERS = {"csv": (",", ";"), "tsv": ("\t",)}
QUOTING: dict[str, dict[str, Any]] = {"csv": {}, "tsv": {"quoting": csv.QUOTE_NONE}}
SPACE = re.compile(r"[ \t\r\n]*")  # JSON's
BLANK = " \t\r"  # what is no part of a label, a word or a completion at its ends
Row: TypeAlias = tuple[int, dict[str, Any]]  # the number of its line, and its fields

DECODER = json.JSONDecoder(object_pairs_hook=each_once)


def numbered(text: str) -> Iterator[tuple[int, str]]:
    """A text's lines without their ends, and their numbers."""
    for number, line in enumerate(text.split("\n"), 1):
        yield number, line.removesuffix("\r")


def mostly_objects(lines: Sequence[str]) -> bool:
    """Whether half of the lines at least begin as JSON's objects do."""
    return 2 * sum(line.lstrip(BLANK)[0] == "{" for line in lines) >= len(lines)


def past_space(text: str, at: int) -> int:
    """Where JSON's white space from `at` on ends."""
    return SPACE.match(text, at).end()  # type: ignore[union-attr]


def json_rows(text: str, lines: Sequence[tuple[int, str]], path: Path) -> Iterator[Row]:
    """The objects of a JSON array, of JSON lines, or one after another."""
    start = past_space(text, 0)
    if text[start : start + 1] == "[":
        yield from _json_array(text, start, path)
    elif not lines or mostly_objects([line for _, line in lines]):
        for number, line in lines:
            begin = past_space(line, 0)
            value, end = _value(line, begin, number, f"{path}:{number}")
            if line[end:].strip(BLANK):
                raise ValueError(f"{path}:{number}: expected one object in the line, got more: {line[end:]!r:.60}")
            yield number, value
    else:
        yield from _json_values(text, start, path)


def _json_array(text: str, start: int, path: Path) -> Iterator[Row]:
    at, number = start + 1, 1 + text.count("\n", 0, start)
    comma = False
    while True:
        begin = past_space(text, at)
        number += text.count("\n", at, begin)
        if text[begin : begin + 1] == "]" and not comma:
            end = past_space(text, begin + 1)
            if end < len(text):
                number += text.count("\n", begin, end)
                raise ValueError(f"{path}:{number}: expected the end of the file behind the array, got more")
            return
        value, at = _value(text, begin, number, f"{path}:{number}")
        yield number, value
        number += text.count("\n", begin, at)
        begin = past_space(text, at)
        number += text.count("\n", at, begin)
        comma = text[begin : begin + 1] == ","
        if not comma and text[begin : begin + 1] != "]":
            raise ValueError(f"{path}:{number}: expected a comma or ] behind an object, got {text[begin:]!r:.60}")
        at = begin + comma


def _json_values(text: str, at: int, path: Path) -> Iterator[Row]:
    number = 1 + text.count("\n", 0, at)
    while at < len(text):
        value, end = _value(text, at, number, f"{path}:{number}")
        yield number, value
        after = past_space(text, end)
        number += text.count("\n", at, after)
        at = after


def _value(text: str, at: int, number: int, where: str) -> tuple[dict[str, Any], int]:
    """The object that begins at a place of a text, and where it ends."""
    try:
        value, end = DECODER.raw_decode(text, at)
    except RecursionError:
        raise ValueError(f"{where}: not valid JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        lines = text.count("\n", at, error.pos)
        place = where.removesuffix(f":{number}") + f":{number + lines}"
        raise ValueError(f"{place}: not valid JSON: {error.msg} at {text[error.pos : error.pos + 40]!r}") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {shown(str(error))}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {text[at:end]!r:.60}")
    return value, end


def table_rows(text: str, format: str, path: Path) -> Iterator[Row]:
    """The lines of a table under its header: CSV as RFC 4180 has it, with commas or semicolons; TSV without quoting."""
    lines = [line + "\n" for line in text.split("\n")]
    first = next((line for line in lines if line.strip(BLANK + "\n")), "")
    delimiter = max(DELIMITERS[format], key=first.count)
    reader = csv.reader(lines, delimiter=delimiter, strict=True, **QUOTING[format])
    names: list[str] = []
    number = 1
    try:
        for cells in reader:
            if not names:
                names = [name.strip(BLANK).lower() for name in cells]
            elif len(cells) != len(names) and any(cell.strip(BLANK) for cell in cells):
                raise ValueError(f"{path}:{number}: expected {len(names)} columns, as the header has, got {len(cells)}")
            elif any(cell.strip(BLANK) for cell in cells):
                yield number, dict(zip(names, cells, strict=True))
            number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{number}: not valid {format.upper()}: {shown(str(error))}") from None
