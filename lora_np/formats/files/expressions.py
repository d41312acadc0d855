"""Regular expressions that a file brings, as Python's re has them, in bounded time and memory.

re itself cannot be stopped once it runs, so it only says whether an expression is one; the regex package matches, with
a time limit. That one unrolls counted repeats as it compiles, and gives braces meanings of its own: so a brace may only
be a counted repeat here, and all counts multiplied stay small.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Iterable
from typing import Any

from .safe import shown

MAX_LENGTH = 2000
MAX_UNROLLED = 200_000  # characters, if each count repeated the whole expression: at most some 40 MB when compiled
SECONDS = 2.0
COUNT = r"(?a)\{(\d*)(?:,(\d*))?\}"


def import_regex() -> Any:
    """The regex package; an ImportError says how to get it."""
    try:
        import regex
    except ImportError as error:
        raise ImportError("reading regular expressions needs regex: pip install 'lora-np[models]'") from error
    return regex


class Expressions:
    """Matches the expressions of one key of a file, SECONDS for all of them; `where` names the key in a ValueError."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._left = SECONDS

    def fitting(self, text: str, names: Iterable[str], *, whole: bool = True) -> set[str]:
        """The names that an expression fits: all of a name, or only a beginning."""
        regex = import_regex()
        self._check(text)
        began = time.monotonic()
        try:
            compiled = regex.compile(text)
            method = compiled.fullmatch if whole else compiled.match
            found = set()
            for name in names:
                left = self._left - (time.monotonic() - began)
                if left <= 0:
                    raise TimeoutError
                found |= {name} if method(name, timeout=left) else set()
        except TimeoutError:
            raise ValueError(
                f"{self._where}: {text!r:.60}: takes too long to match: more than {SECONDS:g} seconds"
            ) from None
        except (regex.error, RecursionError, MemoryError) as error:
            raise self._refused(text, error) from None
        self._left -= time.monotonic() - began
        return found

    def _check(self, text: str) -> None:
        """A ValueError unless it is an expression of re's, short, and of few counted repeats."""
        if len(text) > MAX_LENGTH:
            raise ValueError(
                f"{self._where}: expected a regular expression of at most {MAX_LENGTH} characters, got {len(text)}"
            )
        if re.search(r"[{}]", re.sub(COUNT, "", text)):
            raise ValueError(f"{self._where}: {text!r:.60}: expected braces only as a counted repeat")
        counts = [max(int(n or 0) for n in found) for found in re.findall(COUNT, text)]
        if len(text) * math.prod(max(n, 1) for n in counts) > MAX_UNROLLED:
            raise ValueError(f"{self._where}: {text!r:.60}: expected fewer or smaller counted repeats")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a meaning that is about to change, or that regex does not share
                re.compile(text)
        except (re.error, Warning, RecursionError, OverflowError) as error:
            raise self._refused(text, error) from None

    def _refused(self, text: str, error: BaseException) -> ValueError:
        return ValueError(f"{self._where}: {text!r:.60}: no regular expression that is supported: {shown(str(error))}")
