"""What goes wrong with a file names the file: for whatever reads one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from .safetensors_file import shown

MAX_LINE = 4000  # characters: what is said of a file, with paths as long as they may be

Reader = TypeVar("Reader", bound=Callable[..., Any])


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
        with naming(path):
            return read(path, *args, **kwargs)

    return cast(Reader, reading)
