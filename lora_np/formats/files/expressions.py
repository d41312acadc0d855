"""Regular expressions that a file brings, as Python's re has them, in bounded time and memory.

Nothing stops re once it compiles or matches. So a process of its own does both, for all expressions of a file at once,
and ends when its time is up.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import bounded
from .messages import shown

SECONDS, MEMORY = 2.0, 2**28  # for all expressions of a file together
MATCHER = Path(__file__).with_name("matcher.py")


class Expression(NamedTuple):
    """One of a file, and the key that it stands under. at_end: it may fit the end of a name alone, as in PEFT."""

    key: str
    text: str
    at_end: bool = False


def fitting(expressions: Sequence[Expression], names: Sequence[str], where: str) -> dict[Expression, set[str]]:
    """The names that each expression fits. A ValueError, of the file `where`, says which is none, or takes too long."""
    if not expressions:
        return {}
    request = {
        "names": names,
        "expressions": [(rf"(.*\.)?({e.text})$" if e.at_end else e.text, not e.at_end) for e in expressions],
    }  # fmt: skip
    failed = f"{where}: no expression was matched"
    answers = bounded.answers(MATCHER, request, failed, seconds=SECONDS, memory=MEMORY)
    found = {}
    for expression, answer in zip(expressions, answers, strict=False):
        if isinstance(answer, str):
            raise _refused(expression, where, f"no regular expression that is supported: {answer}")
        found[expression] = {names[n] for n in answer}
    if len(answers) < len(expressions):
        raise _refused(expressions[len(answers)], where, f"takes too long to match: more than {SECONDS:g} seconds")
    return found


def _refused(expression: Expression, where: str, why: str) -> ValueError:
    return ValueError(f"{where}: {expression.key}: {expression.text!r:.60}: {shown(why)}")
