"""What another implementation made of the adapters' files, beside what they are: updates, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..formats.files.json_file import read_json
from ..formats.files.messages import named, shown
from ..formats.files.safetensors_file import TensorFile, open_tensors
from .adapter_files import FILES, FileCase, base_tensor, bases, file_cases
from .answers import Answer, error_ratio
from .cases import Case
from .conform import Found, Verdict
from .files import read_tensor
from .precision import U
from .refusals import refusals


def judge_files(path: Path) -> Verdict:
    """The cases beside a file of results; a ValueError if it is damaged."""
    with open_tensors(path) as file:
        read: set[str] = set()
        found = [_found(file, case, read) for case in file_cases()]
        return Verdict(FILES, True, found, [name for name in file.shapes if name not in read], None)


def _found(file: TensorFile, case: FileCase, read: set[str]) -> Found:
    """One case; `read` gains the tensors that belong to it."""
    wanted = {**_expected(case), **_kept(case, file)}
    got = {name: read_tensor(file, f"{case.name}/{name}") for name in wanted if f"{case.name}/{name}" in file.shapes}
    read |= {f"{case.name}/{name}" for name in got}
    misshapen = [name for name, a in got.items() if a.shape != wanted[name].shape]
    got = {name: a for name, a in got.items() if name not in misshapen}
    ratios = {name: error_ratio(a, *wanted[name]) for name, a in got.items()}
    worst = max(ratios, key=lambda name: ratios[name], default="")
    there = {name.partition("/")[2] for name in (*got, *misshapen)}
    missing = [key for key in (*case.added, *case.replaced) if key not in there]
    as_case = Case(FILES, case.name, FILES, case.title, {}, {})
    return Found(as_case, got, missing, misshapen, ratios.get(worst, 0.0), worst)


def _expected(case: FileCase) -> dict[str, Answer]:
    """By the names in a file of results what each may be: the update, or its sum with the base's tensor."""
    answers: dict[str, Answer] = {f"W/{key}": Answer(a, np.zeros(a.shape)) for key, a in case.replaced.items()}
    for key, answer in case.added.items():
        W0 = base_tensor(bases()[case.base], key)
        assert W0 is not None
        W = W0 + answer.value
        answers[f"dW/{key}"] = answer
        answers[f"W/{key}"] = Answer(W, answer.bound + U * (np.abs(W) + answer.bound))
    return answers


def _kept(case: FileCase, file: TensorFile) -> dict[str, Answer]:
    """What results have of tensors that no update is for: nothing may have been added."""
    answers = {}
    for name in file.shapes:
        stem, _, rest = name.partition("/")
        kind, _, key = rest.partition("/")
        W0 = base_tensor(bases()[case.base], key)
        if stem == case.name and kind in ("dW", "W") and W0 is not None and key not in {**case.added, **case.replaced}:
            answers[rest] = Answer(W0 if kind == "W" else np.zeros(W0.shape), np.zeros(W0.shape))
    return answers


class Refused(NamedTuple):
    """What must be refused: the cases that were, with the words, those that were not, and those that are not there."""

    refused: dict[str, str]
    accepted: list[str]
    missing: list[str]
    unread: list[str]

    @property
    def holds(self) -> bool:
        """Whether nothing was accepted, and something refused."""
        return bool(self.refused) and not self.accepted


@named
def judge_refusals(path: Path) -> Refused:
    """The cases beside a file of results; a ValueError if it is damaged."""
    said = read_json(path)
    for name, words in said.items():
        if not (words is None or (isinstance(words, str) and words.strip())):
            raise ValueError(
                f"{path}: {shown(name)}: expected an error's words, or null where there was none, got {words!r:.60}"
            )
    names = [case.name for case in refusals()]
    return Refused(
        {name: said[name] for name in names if said.get(name) is not None},
        [name for name in names if name in said and said[name] is None],
        [name for name in names if name not in said],
        [name for name in said if name not in names],
    )
