"""What is said of a file: its own words fit for a line, and errors that name it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

from ...checks import expect

MAX_LINE = 4000  # characters: what is said of a file, with paths as long as they may be

Reader = TypeVar("Reader", bound=Callable[..., Any])

# What moves a terminal's cursor, ends a line, turns its direction, or is no character: control codes but the tab, line
# and paragraph ends, embeddings and isolates of direction, halves of surrogate pairs.
UNSAFE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MAX_SHOWN = 200
CANDIDATES = 5000  # names that are compared letter by letter, for a message


def shown(text: str, most: int = MAX_SHOWN) -> str:
    """A text that came from a file, fit to be a part of one line: escapes for what is unsafe, the middle left out.

    most: how long it may be. What is shown already stays as it is.
    """
    text = UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
    return text if len(text) <= most else f"{text[: most // 2 - 2]} ... {text[-(most - most // 2 - 3) :]}"


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """A ValueError that is raised within says where, in one line: `path` stands before it, if it does not yet.

    A number that no float or integer holds, or what is nested deeper than Python reads, becomes one.
    """
    try:
        yield
    except (ValueError, OverflowError, RecursionError) as error:
        text, name = str(error), str(Path(path))
        line = shown(text if text.startswith(name) else f"{name}: {text}", MAX_LINE)
        if not isinstance(error, ValueError) or isinstance(error, UnicodeError):  # whose text is not its argument
            raise ValueError(line) from None
        error.args = (line,)
        raise


def named(read: Reader) -> Reader:
    """A function that reads the file or folder of its first argument, `path`: its errors then name it."""

    @wraps(read)
    def reading(path: Any, *args: Any, **kwargs: Any) -> Any:
        expect(f"{read.__name__}: path", path, (str, os.PathLike), "a path")
        with naming(path):
            return read(path, *args, **kwargs)

    return cast(Reader, reading)


def nearest(name: str, known: Collection[str]) -> str:
    """What to say of a name that is not known: the names most like it."""
    some = list(islice(known, CANDIDATES))
    close = get_close_matches(name[-200:], some, n=3, cutoff=0.6)
    return f"; nearest are {' '.join(map(shown, close))}" if close else ""


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    return " ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
