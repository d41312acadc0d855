"""Standard output and error as they may be: closed, full, without a reader, or in an encoding that lacks characters."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _Lossy(io.FileIO):
    """A stream that drops what it cannot write: no line of progress is worth a run."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare() -> None:
    """Standard error takes all, shown or not; characters that an encoding lacks are shown as escapes.

    The descriptors 0 to 2 are open afterwards, so that no file gets the number of one that was closed, and with it
    what libraries print.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is sys.__stderr__:  # the process's own, not a caller's
        encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
        lossy: Any = _Lossy(2, "w", closefd=False)
        sys.stderr = io.TextIOWrapper(lossy, encoding=encoding, errors="backslashreplace", write_through=True)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def show(text: str) -> None:
    """A result on standard output, all of it; an OSError that names it if that cannot be."""
    try:
        print(text, flush=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None
