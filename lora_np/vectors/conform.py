"""What another implementation gave, beside the vectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..backend import Array
from ..formats.files.safetensors_file import open_tensors
from .answers import Answer, error_ratio
from .cases import Case
from .files import Vectors, read_tensor
from .mistakes import explained


class Found(NamedTuple):
    """One case beside its results.

    got       the tensors that are there, of the shapes asked for
    missing   those that are not
    misshapen those of another shape
    ratio     the largest error of all that was got, as a multiple of its bound, and in which tensor
    """

    case: Case
    got: Mapping[str, Array]
    missing: list[str]
    misshapen: list[str]
    ratio: float
    worst: str

    @property
    def failed(self) -> bool:
        """Whether anything is wrong; what is missing is not."""
        return bool(self.misshapen) or self.ratio > 1

    @property
    def absent(self) -> bool:
        """Whether nothing of the case is there."""
        return not self.got and not self.misshapen


class Verdict(NamedTuple):
    """One id.

    run         whether there is a file of its results
    found       its cases
    unread      the file's tensors that no case asks for: they may be misnamed
    looks_like  what the failing cases look like: a known mistake, and how many of them it explains
    """

    id: str
    run: bool
    found: list[Found]
    unread: list[str]
    looks_like: tuple[str, int] | None

    @property
    def failed(self) -> list[Found]:
        """The cases with something wrong."""
        return [one for one in self.found if one.failed]

    @property
    def missing(self) -> list[Found]:
        """The cases of which something is missing."""
        return [one for one in self.found if one.missing]

    @property
    def right(self) -> list[Found]:
        """The cases that are there whole, and right."""
        return [one for one in self.found if not one.failed and not one.missing]

    @property
    def passed(self) -> bool:
        """Whether every case is there and right."""
        return len(self.right) == len(self.found)

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong, and something right: of a file of which nothing is read, nothing is known."""
        return bool(self.right) and not self.failed

    @property
    def worst(self) -> Found:
        """The case with the largest error beside its bound."""
        return max(self.found, key=lambda one: one.ratio)


def compare(folder: Path, vectors: Vectors, *, name_mistakes: bool = True) -> list[Verdict]:
    """Each id of the vectors beside its file in a folder of results, ID.safetensors.

    name_mistakes: whether to try which known mistake a failing case looks like; the vectors' definitions must be this
    version's. A ValueError says which file is damaged.
    """
    verdicts = []
    for id in dict.fromkeys(case.id for case, _ in vectors.cases):
        path = folder / f"{id}.safetensors"
        cases = [one for one in vectors.cases if one[0].id == id]
        found, unread = _found(path, cases)
        failing = [(one.case, one.got) for one in found if one.failed and one.got]
        looks_like = explained(failing) if name_mistakes and failing else None
        verdicts.append(Verdict(id, path.is_file(), found, unread, looks_like))
    return verdicts


def _found(path: Path, cases: list[tuple[Case, Mapping[str, Answer]]]) -> tuple[list[Found], list[str]]:
    """The cases beside a file's tensors, and those of them that no case asks for."""
    if not path.is_file():
        return [Found(case, {}, list(wanted), [], 0.0, "") for case, wanted in cases], []
    with open_tensors(path) as file:
        found = []
        unread = dict.fromkeys(file.shapes)
        for case, wanted in cases:
            there = [name for name in wanted if f"{case.name}/{name}" in file.shapes]
            for name in there:
                del unread[f"{case.name}/{name}"]
            fitting = [name for name in there if file.shapes[f"{case.name}/{name}"] == wanted[name].shape]
            got = {name: read_tensor(file, f"{case.name}/{name}") for name in fitting}
            ratios = {name: error_ratio(a, *wanted[name], case.precision) for name, a in got.items()}
            worst = max(ratios, key=lambda name: ratios[name], default="")
            missing = [name for name in wanted if name not in there]
            misshapen = [name for name in there if name not in fitting]
            found.append(Found(case, got, missing, misshapen, ratios.get(worst, 0.0), worst))
        return found, list(unread)
