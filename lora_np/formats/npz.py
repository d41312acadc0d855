"""Adapters as .npz: our own names, and a header that says the rest. NumPy alone reads and writes it."""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, asnumpy
from ..lora import Adapter
from ..model import Model
from .about import check_about, check_savable, read_about, write_about
from .atomic import new_file
from .base import Base
from .layout import param_shapes
from .plain import MAX_JSON_BYTES
from .safe import DTYPES, check_widens, shown

HEADER = "header"
KINDS = {np.dtype(dtype).str: name for name, dtype in DTYPES.items()}  # "<f4" -> "F32"

# An array's head as savez writes it: 10 bytes, the last two of them the length of what follows, up to the numbers.
HEAD = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '(<f4|<f8|\|u1)', 'fortran_order': False, 'shape': \(([\d, ]{0,40})\), \} *\n",
    re.DOTALL,
)
DAMAGED = (KeyError, EOFError, RuntimeError, zipfile.BadZipFile)  # what reading an archive may raise


def save_adapter(path: str | os.PathLike[str], adapter: Adapter, model: Model) -> None:
    """Writes an adapter of `model` as a new .npz file: its parameters, each under its name, and a header in JSON.

    A FileExistsError if there is anything at `path`; a ValueError or TypeError if the adapter does not fit the model.
    """
    check_savable(adapter, model)
    param_shapes(model.config, adapter.config, list(adapter.params))
    header = np.frombuffer(write_about(adapter, model).encode(), dtype=np.uint8)
    arrays = {name: np.ascontiguousarray(asnumpy(value)) for name, value in adapter.params.items()}
    with new_file(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez(file, **{HEADER: header}, **arrays)  # type: ignore[arg-type]


def load_adapter(path: str | os.PathLike[str], model: Base) -> Adapter:
    """Reads an adapter of `model` from a file that `save_adapter` wrote: the same bits, float32 widened for float64.

    A FileNotFoundError or ValueError, in one line, says what is missing, damaged, or made for another base. Nothing in
    the file is executed, and no more memory taken than the file is long.
    """
    path = Path(path)
    with open_arrays(path) as file:
        about = file.about()
        members = {name: member for name, member in file.members.items() if name != HEADER}
        kinds = [KINDS.get(member.dtype.str, "") for member in members.values()]
        lora_config, names = check_about(about, model, kinds, str(path))
        try:
            shapes = param_shapes(model.config, lora_config, names)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        for name in sorted(shapes.keys() ^ members.keys()):
            missing = "is missing" if name in shapes else "has no place in this adapter"
            raise ValueError(f"{path}: the array {shown(name)} {missing}")
        params = {}
        for name, shape in shapes.items():
            where, member = f"{path}: {name}", members[name]
            if member.dtype.str not in KINDS or member.shape != shape:
                raise ValueError(f"{where}: expected floats {shape}, got {member.dtype} {member.shape}")
            check_widens(member.dtype.name, model.dtype, where)
            params[name] = file.read(name).astype(model.dtype, copy=False)
            if not np.isfinite(params[name]).all():
                raise ValueError(f"{where}: holds NaN or infinite numbers")
        return Adapter(lora_config, params)


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

    def about(self) -> dict[str, Any]:
        """What the header says."""
        if HEADER not in self.members:
            raise ValueError("it has no header: it is not an adapter of this package")
        with self._archive.open(f"{HEADER}.npy") as file:
            text = file.read(MAX_JSON_BYTES + self.members[HEADER].start + 1)
        return read_about(text[self.members[HEADER].start :], f"{self._path}: {HEADER}")

    def read(self, name: str) -> Array:
        """An array, in host memory."""
        member = self.members[name]
        with self._archive.open(f"{name}.npy") as file:
            data = file.read()
        return np.frombuffer(data, dtype=member.dtype, offset=member.start).reshape(member.shape).copy()


@contextmanager
def open_arrays(path: Path) -> Iterator[ArrayFile]:
    """An .npz file, each array's header checked before any is read."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            yield ArrayFile(path, archive)
    except (OSError, ValueError, *DAMAGED) as error:
        text = str(error)
        named = text if text.startswith(str(path)) else f"{path}: not an adapter in .npz: {shown(text)}"
        raise ValueError(named) from None
