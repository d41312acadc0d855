"""What a part of the report holds: claims with their figures and verdicts, tables, pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

Verdict: TypeAlias = Literal["holds", "holds in part", "does not hold", "not checked"]


class Claim(NamedTuple):
    """A claim, where it is made, what was found here, and the verdict that follows."""

    claim: str
    source: str
    figure: str
    verdict: Verdict


class Table(NamedTuple):
    """Rows of cells under a head; the first column is text, the others are figures."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Picture(NamedTuple):
    """A picture: what it shows, in words, and what draws it as SVG, on a light page or a dark one (matplotlib)."""

    caption: str
    draw: Callable[[bool], str]


@dataclass(frozen=True)
class Section:
    """A topic: its claims, what was done to check them, and the figures, also as plain data for JSON."""

    id: str
    title: str
    about: str
    claims: Sequence[Claim]
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


def graded(whole: bool, part: bool) -> Verdict:
    """The verdict of a claim that holds as a whole, or at least in part, or not."""
    return "holds" if whole else "holds in part" if part else "does not hold"


def listed(items: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
