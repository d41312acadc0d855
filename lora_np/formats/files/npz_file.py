"""Arrays in an .npz file, read as what they are: bytes that anyone may have written."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...backend import Array
from .json_file import MAX_JSON_BYTES
from .messages import shown
from .regular import expect_file

HEADER = "header"  # the array of bytes that says in JSON what the others are

# An array's head as savez writes it: 10 bytes, the last two of them the length of what follows, up to the numbers.
HEAD = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '(<f4|<f8|\|u1)', 'fortran_order': False, 'shape': \(([\d, ]{0,40})\), \} *\n",
    re.DOTALL,
)
DAMAGED = (KeyError, EOFError, RuntimeError, zipfile.BadZipFile)  # what reading an archive may raise


class Member(NamedTuple):
    """An array of the file, as its own header has it."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int  # of its numbers, in the bytes of the member


class ArrayFile:
    """An open .npz file whose arrays are as long as they say, none longer than the file."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path = path
        self._archive = archive
        infos = archive.infolist()
        # savez does not compress: a file that does might swell without end.
        if any(info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size for info in infos):
            raise ValueError("expected arrays that are not compressed")
        if sum(info.file_size for info in infos) > path.stat().st_size:
            raise ValueError("it says that it holds more than its own size")
        names = [info.filename.removesuffix(".npy") for info in infos]
        if len(set(names)) < len(names):
            raise ValueError("an array is there twice")
        self.members = {name: self._member(info) for name, info in zip(names, infos, strict=True)}

    def _member(self, info: zipfile.ZipInfo) -> Member:
        with self._archive.open(info) as file:
            found = HEAD.match(file.read(512))
        if found is None or int.from_bytes(found[1], "little") != found.end() - 10:
            raise ValueError(f"{info.filename}: expected an array of floats, row by row")
        shape, dtype = tuple(int(n) for n in re.findall(rb"\d+", found[3])), np.dtype(found[2].decode())
        if math.prod(shape) * dtype.itemsize != info.file_size - found.end():
            raise ValueError(f"{info.filename}: shape {shape} does not fit its {info.file_size} bytes")
        return Member(dtype, shape, found.end())

    def header(self) -> bytes:
        """The bytes of the array HEADER: text that says what the others are, cut off where JSON ends to be read."""
        if HEADER not in self.members:
            raise ValueError("it has no header: it is none of this package's")
        with self._archive.open(f"{HEADER}.npy") as file:
            text = file.read(MAX_JSON_BYTES + self.members[HEADER].start + 1)
        return text[self.members[HEADER].start :]

    def read(self, name: str) -> Array:
        """An array, in host memory; a ValueError if an element is NaN or infinite."""
        member = self.members[name]
        with self._archive.open(f"{name}.npy") as file:
            data = file.read()
        values = np.frombuffer(data, dtype=member.dtype, offset=member.start).reshape(member.shape).copy()
        if not np.isfinite(values).all():
            raise ValueError(f"{self._path}: {name}: holds NaN or infinite numbers")
        return values


@contextmanager
def open_arrays(path: Path) -> Iterator[ArrayFile]:
    """An .npz file, each array's header checked before any is read."""
    expect_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            yield ArrayFile(path, archive)
    except (OSError, ValueError, *DAMAGED) as error:
        text = str(error)
        named = text if text.startswith(str(path)) else f"{path}: damaged, or not a file of ours: {shown(text)}"
        raise ValueError(named) from None
