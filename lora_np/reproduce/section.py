"""What a part of the report holds: claims with their figures and verdicts, tables, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias

from ..training import plot

Verdict: TypeAlias = Literal["holds", "holds in part", "does not hold", "not decided", "not checked"]
KINDS = ("spread_curves", "spread_points", "heat_maps")
QUICK = "Quick form"  # what each of its tables and pictures begins with


class Claim(NamedTuple):
    """A claim, where it is made, what was found here, and the verdict that follows.

    exact: it follows from sizes or bits alone, and no training or timing can be too short for it.
    """

    claim: str
    source: str
    figure: str
    verdict: Verdict
    exact: bool = False


class Table(NamedTuple):
    """Rows of cells under a head; the first column is text, the others are figures."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Picture(NamedTuple):
    """A picture: what it shows, in words; which function of `plot` draws it, and what that takes, as plain data."""

    caption: str
    kind: str  # one of KINDS
    arguments: Sequence[Any]

    def draw(self, dark: bool) -> str:
        """The picture as SVG, on a light page or a dark one (matplotlib)."""
        svg: str = getattr(plot, self.kind)(*self.arguments, dark)
        return svg


@dataclass(frozen=True, eq=False)
class Section:
    """A topic: its claims, what was done to check them, and the figures, also as data; all of it plain, for JSON."""

    id: str
    title: str
    about: str
    claims: Sequence[Claim]
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


def told(difference: float, least: float, error: float) -> bool | None:
    """Whether a difference is more than `least`; None where it is lost in an error that is larger than both."""
    if error > least and abs(difference) <= error:
        return None
    return difference > least


def some(found: Sequence[bool | None]) -> bool | None:
    """Whether one of them is true; None where that hangs on one that is not decided."""
    return True if True in found else None if None in found else False


def every(found: Sequence[bool | None]) -> bool | None:
    """Whether all of them are true; None where that hangs on one that is not decided."""
    return False if False in found else None if None in found else True


def graded(whole: bool | None, part: bool | None) -> Verdict:
    """The verdict of a claim that holds as a whole, or at least in part, or not; None: not decided."""
    if whole is None or (part is None and not whole):
        return "not decided"
    return "holds" if whole else "holds in part" if part else "does not hold"


def as_quick(section: Section) -> Section:
    """The section as ten steps can carry it: figures are marked, and only what is exact has a verdict."""
    claims = [claim if claim.exact else claim._replace(verdict="not decided") for claim in section.claims]
    return replace(
        section, claims=claims, about=f"{QUICK}: trained and timed for seconds, to show that all runs. {section.about}",
        tables=[table._replace(caption=f"{QUICK}. {table.caption}") for table in section.tables],
        pictures=[picture._replace(caption=f"{QUICK}. {picture.caption}") for picture in section.pictures],
    )  # fmt: skip


def listed(items: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
