"""A file that is read in parts, and must be one and the same all the while.

It is read, never mapped: a map of a file that another program cuts short ends this one by a signal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from .regular import expect_file


class Stamp(NamedTuple):
    """What tells a file from what it is after somebody wrote to it, or put another in its place."""

    device: int
    number: int
    size: int
    modified: int  # nanoseconds


def stamp(file: BufferedReader) -> Stamp:
    """The stamp of an open file."""
    found = os.fstat(file.fileno())
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@contextmanager
def open_unchanged(path: Path, known: Stamp | None = None) -> Iterator[BufferedReader]:
    """A file to read; a ValueError if it is another, or was written to, by the end of the block.

    known: its stamp when it was opened before, which it must have still.
    """
    expect_file(path)
    with open(path, "rb") as file:
        before = stamp(file) if known is None else known
        if stamp(file) != before:
            raise changed(path)
        yield file
        if stamp(file) != before:
            raise changed(path)


def changed(path: Path) -> ValueError:
    """The error that says so."""
    return ValueError(f"{path}: the file was changed while it was read")
