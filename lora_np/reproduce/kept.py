"""What is done of a report, as files: a run that was stopped goes on from them.

In the report's folder, `parts/KEY/` has what was made under one KEY, which stands for all that figures depend on:

    counts.json        a section, with the seconds that it took and the day
    trainings/*.npz    adapters with their scores; gone once every section that needs them is there

Each file is written whole or not at all. What was made under another key stays where it is, and is not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from ..backend import Array, asnumpy, xp
from ..formats.files.atomic import discard, replaced_files
from ..formats.files.json_file import read_json, to_fields, write_json
from ..formats.files.messages import shown
from ..formats.files.npz_file import open_arrays
from ..training.loop import Score
from .section import KINDS, Claim, Picture, Section, Table, Verdict

PARTS, TRAININGS = "parts", "trainings"
_SCORE = "score"  # the array that stands beside a training's parameters


class Done(NamedTuple):
    """A section, the seconds that it took, and the day on which it was measured."""

    section: Section
    seconds: float
    day: str


class Kept:
    """The parts of one report under one key."""

    def __init__(self, report: Path, key: str) -> None:
        self.folder = report / PARTS / key

    def section(self, id: str) -> Done | None:
        """A section that is done. A ValueError names a file that does not hold one."""
        path = self.folder / f"{id}.json"
        if not path.exists():
            return None
        found = read_json(path)
        try:
            return Done(_section(found["section"]), float(found["seconds"]), str(found["day"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected a section of a report; remove the file: {shown(str(error))}") from None

    def keep_section(self, done: Done) -> None:
        """Writes a section's file."""
        section = to_fields(done.section) | {
            name: [one._asdict() for one in getattr(done.section, name)] for name in ("claims", "tables", "pictures")
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with replaced_files(self.folder, last="") as new:
            write_json(new / f"{done.section.id}.json", {"section": section, "seconds": done.seconds, "day": done.day})

    def training(self, name: str) -> tuple[Mapping[str, Array], Score] | None:
        """What a training gave: its parameters, none where every weight was trained, and its score."""
        path = self.folder / TRAININGS / f"{name}.npz"
        if not path.exists():
            return None
        with open_arrays(path) as file:
            arrays = {name: file.read(name) for name in file.members}
        score = arrays.pop(_SCORE, np.empty(0))
        if score.shape != (len(Score._fields),):
            raise ValueError(f"{path}: expected a training with its score; remove the file")
        return {name: xp.asarray(a) for name, a in arrays.items()}, Score(*score.tolist())

    def keep_training(self, name: str, params: Mapping[str, Array], score: Score) -> None:
        """Writes a training's file."""
        folder = self.folder / TRAININGS
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {name: asnumpy(p) for name, p in params.items()} | {_SCORE: np.array(score)}
        with replaced_files(folder, last="") as new:
            np.savez(new / f"{name}.npz", **arrays)

    def discard_trainings(self) -> None:
        """Removes the trainings' files: every section that needs them is there."""
        if (self.folder / TRAININGS).exists():
            discard(self.folder / TRAININGS)


def _section(found: Mapping[str, Any]) -> Section:
    names = {field.name for field in dataclasses.fields(Section)}
    if found.keys() != names:
        raise ValueError(f"expected {', '.join(sorted(names))}")
    claims = [Claim(**one) for one in found["claims"]]
    pictures = [Picture(**one) for one in found["pictures"]]
    if not {c.verdict for c in claims} <= set(get_args(Verdict)) or not {p.kind for p in pictures} <= set(KINDS):
        raise ValueError("a verdict or a kind of picture that there is not")
    tables = [Table(**one) for one in found["tables"]]
    return Section(**{**found, "claims": claims, "tables": tables, "pictures": pictures})
