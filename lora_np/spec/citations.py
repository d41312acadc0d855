"""Which statements a text cites, which ones a docstring states, and which tests prove them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple

from ..vectors.statements import STATEMENTS

_NAMES = "|".join(sorted(STATEMENTS, key=len, reverse=True))

# An id in a text. A1 = ... and A1 (r, in) are matrices; L8 (paper, tables 2 to 4) is a statement with its source.
ID = re.compile(rf"\b(?:{_NAMES})\b(?!\s*=|\s*\((?!paper))")

# What a docstring begins with where it states something: "T3, T4: ", "L2 (paper 4.1, eq. 3): ", "L4 on a look-up: ".
_HEAD = re.compile(rf"((?:{_NAMES})\b(?:(?:, | or | and | to )(?:{_NAMES})\b)*)(?:[^:.()]|\([^()]*\))*:")


class Proof(NamedTuple):
    """A test, and the ids that its marker @proves(...) says; None where it has none."""

    path: PurePath
    test: str
    ids: tuple[str, ...] | None


def stated(docstring: str) -> tuple[str, ...]:
    """The ids that a docstring begins with, "T9 to T11" as all three; none where it begins otherwise."""
    head = _HEAD.match(docstring)
    if head is None:
        return ()
    ids: list[str] = []
    for joint, name in re.findall(rf"(^|, | or | and | to )({_NAMES})\b", head[1]):
        if joint == " to ":
            letter, start = ids[-1][0], int(ids[-1][1:])
            ids += [f"{letter}{n}" for n in range(start + 1, int(name[1:]))]
        ids.append(name)
    return tuple(ids)


def proofs(tests: Path) -> Iterator[Proof]:
    """Every test function in the folder `tests` and below."""
    for path in sorted(tests.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield Proof(path.relative_to(tests), node.name, _marked(node))


def kept(proofs: Iterable[Proof]) -> str:
    """The proofs that name ids as JSON: by file and test, the ids."""
    found: dict[str, dict[str, list[str]]] = {}
    for proof in proofs:
        if proof.ids:
            found.setdefault(proof.path.as_posix(), {})[proof.test] = list(proof.ids)
    return json.dumps(found, indent=0) + "\n"


def read_kept(text: str) -> Iterator[Proof]:
    """The proofs that such a text holds."""
    for path, tests in json.loads(text).items():
        for test, ids in tests.items():
            yield Proof(PurePosixPath(path), test, tuple(ids))


def _marked(node: ast.FunctionDef) -> tuple[str, ...] | None:
    """The ids of @proves(...) or @pytest.mark.proves(...), which stand there as strings."""
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) in ("proves", "pytest.mark.proves"):
            return tuple(ast.literal_eval(a) for a in decorator.args)
    return None
