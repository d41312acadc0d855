"""The clause on conformance, conformance.md: what the test vectors are, and one case of them written out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from ..backend import Array
from ..vectors.answers import answers
from ..vectors.cases import VERSIONS, Case, all_cases
from ..vectors.files import LAYOUT
from ..vectors.operations import OPERATIONS, Operation

WRITTEN = ("L4", "one-token")  # the case that is written out: small, and with everything in it
COLUMNS = 6  # numbers in a line


class Asked(NamedTuple):
    """What the vectors of a clause ask for: an operation, and its cases."""

    operation: Operation
    cases: Sequence[Case]


class Written(NamedTuple):
    """A case, and its tensors in lines of text, inputs and what is expected."""

    case: Case
    operation: Operation
    scalars: str
    inputs: str
    expected: str


def text() -> str:
    """The clause, in Markdown."""
    layout = ["Tensors are:", "", "| name | tensor |", "| --- | --- |"]
    for names, what in LAYOUT.items():
        if names != "results":
            layout.append(f"| `{names.replace(', ', '`, `')}` | {what.replace('`', '')} |")
    text = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    for place, lines in (("{layout}", layout), ("{new}", _new())):
        text = text.replace(place, re.sub(r"2\^(-\d+)", r"$2^{\1}$", "\n".join(lines)))
    return text


def _new() -> list[str]:
    """What changed between the versions, in Markdown."""
    lines = []
    for version in VERSIONS[1:]:
        lines += [f"New in {version}:", "", "| clause | case | what it is |", "| --- | --- | --- |"]
        lines += [f"| {c.id} | `{c.name}` | {c.title} |" for c in all_cases(version) if c.since == version]
    return lines


def asked() -> dict[str, list[Asked]]:
    """What the vectors ask for, by the clause's id."""
    found: dict[str, list[Asked]] = {}
    for id, cases in groupby(all_cases(), key=lambda case: case.id):
        by_operation: dict[str, list[Case]] = {}
        for case in cases:
            by_operation.setdefault(case.operation, []).append(case)
        found[id] = [Asked(OPERATIONS[name], its) for name, its in by_operation.items()]
    return found


def written() -> Written:
    """The case WRITTEN."""
    case = next(case for case in all_cases() if (case.id, case.name) == WRITTEN)
    inputs = (line for name, a in case.inputs.items() for line in _lines(f"{case.name}/in/{name}", a))
    expected = (
        line for name, (value, bound) in answers(case).items() for line in _lines(f"{case.name}/{name}", value, bound)
    )
    return Written(
        case, OPERATIONS[case.operation], json.dumps(dict(case.scalars)), "\n".join(inputs), "\n".join(expected)
    )


def _lines(name: str, values: Array, bounds: Array | None = None) -> Iterator[str]:
    """A tensor: its name and shape, then its numbers, a row or a part of one a line. Inputs are exact.

    Of what is expected so many digits are shown as do not depend on the machine, with its bound behind it.
    """
    yield f"{name}  {values.shape}"
    if bounds is None:
        cells = [f"{value!r:>13}" for value in values.ravel().tolist()]
    else:
        pairs = zip(values.ravel().tolist(), bounds.ravel().tolist(), strict=True)
        cells = [f"{value:14.9f} ± {bound:.2e}" for value, bound in pairs]
    columns = min(values.shape[-1], COLUMNS if bounds is None else COLUMNS // 2)
    for row in range(0, len(cells), values.shape[-1]):
        for start in range(row, row + values.shape[-1], columns):
            yield "  " + " ".join(cells[start : min(start + columns, row + values.shape[-1])])
