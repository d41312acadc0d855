"""What another implementation gave, beside the vectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..backend import Array
from ..formats.files.safe import open_tensors
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
    """One id: its cases, and what the failing ones look like: a known mistake, and how many of them it explains."""

    id: str
    found: list[Found]
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
    def run(self) -> bool:
        """Whether there is a result at all."""
        return not all(one.absent for one in self.found)

    @property
    def passed(self) -> bool:
        """Whether every case is there and right."""
        return not self.failed and not self.missing

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
        found = _found(folder / f"{id}.safetensors", [one for one in vectors.cases if one[0].id == id])
        failing = [(one.case, one.got) for one in found if one.failed and one.got]
        verdicts.append(Verdict(id, found, explained(failing) if name_mistakes and failing else None))
    return verdicts


def _found(path: Path, cases: list[tuple[Case, Mapping[str, Answer]]]) -> list[Found]:
    if not path.is_file():
        return [Found(case, {}, list(wanted), [], 0.0, "") for case, wanted in cases]
    with open_tensors(path) as file:
        found = []
        for case, wanted in cases:
            there = [name for name in wanted if f"{case.name}/{name}" in file.shapes]
            fitting = [name for name in there if file.shapes[f"{case.name}/{name}"] == wanted[name].shape]
            got = {name: read_tensor(file, f"{case.name}/{name}") for name in fitting}
            ratios = {name: error_ratio(a, *wanted[name]) for name, a in got.items()}
            worst = max(ratios, key=lambda name: ratios[name], default="")
            missing = [name for name in wanted if name not in there]
            misshapen = [name for name in there if name not in fitting]
            found.append(Found(case, got, missing, misshapen, ratios.get(worst, 0.0), worst))
        return found
