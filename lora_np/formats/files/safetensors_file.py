"""Safetensors files, read as what they are: bytes that anyone may have written.

What is wrong with a file is one ValueError that names the file, and the tensor if it is one's fault. Nothing is read
before its type and shape are known, and nothing is ever executed: pickle files are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from ...backend import Array
from .blocks import Block, row_blocks
from .extras import missing
from .json_file import each_once
from .messages import shown
from .stamp import Stamp, changed, open_unchanged, stamp

METADATA = "__metadata__"
MAX_HEADER_BYTES = 16 * 2**20  # room for 100,000 tensors
MAX_AXES = 64  # NumPy's
PART = 2**20  # bytes
# Every dtype of the format: NumPy's name, and None where NumPy has none; its bits.
STORED: dict[str, tuple[str | None, int]] = {
    "F64": ("<f8", 64), "F32": ("<f4", 32), "F16": ("<f2", 16), "BF16": ("bfloat16", 16),
    "I64": ("<i8", 64), "I32": ("<i4", 32), "I16": ("<i2", 16), "I8": ("i1", 8),
    "U64": ("<u8", 64), "U32": ("<u4", 32), "U16": ("<u2", 16), "U8": ("u1", 8), "BOOL": ("?", 8), "C64": ("<c8", 64),
    "F8_E5M2": (None, 8), "F8_E4M3": (None, 8), "F8_E8M0": (None, 8), "F8_E4M3FNUZ": (None, 8),
    "F8_E5M2FNUZ": (None, 8), "F6_E2M3": (None, 6), "F6_E3M2": (None, 6), "F4": (None, 4),
}  # fmt: skip
DTYPES = {"F32": "float32", "F64": "float64"}
WIDENED = {**DTYPES, "F16": "float32", "BF16": "float32"}  # what we compute in
FLOATS = ("F64", "F32", "F16", "BF16")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
UNGATHERED = "shards of a training were not gathered before it was saved"  # what leaves tensors of no element


def import_safetensors() -> Any:
    """The safetensors package, which writes; an ImportError says how to get it."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise missing("writing safetensors files", "safetensors", "cli") from error
    return safetensors


def import_bfloat16() -> None:
    """Makes bfloat16 known to NumPy; an ImportError says how."""
    try:
        import ml_dtypes  # noqa: F401 (its import is all that is needed)
    except ImportError as error:
        raise missing("reading bfloat16", "ml_dtypes", "models") from error


class Entry(NamedTuple):
    """What the header says of a tensor; its bytes lie from `start` to `end`, counted from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Header(NamedTuple):
    """A file's first bytes as they stand, and what they say: the tensors in the header's order, and the metadata."""

    raw: bytes
    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str] | None

    @property
    def by_place(self) -> list[str]:
        """The names of the tensors, in the order of their bytes."""
        return sorted(self.tensors, key=lambda name: self.tensors[name][2:])


def read_header(path: Path, file: BufferedReader) -> Header:
    """The header of an open file: 8 bytes, its length, and JSON, which must fit the file's size; else a ValueError."""
    size = stamp(file).size
    raw = file.read(8)
    length = int.from_bytes(raw, "little")
    if size < 8 or length > size - 8:
        raise ValueError(
            f"{path}: truncated, or not a safetensors file: it is {size} bytes long and says that its header alone "
            f"takes {length}"
        )
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"{path}: expected a header of at most {MAX_HEADER_BYTES} bytes, got {length}")
    raw += file.read(length)
    try:
        found = json.loads(raw[8:].decode("utf-8"), object_pairs_hook=each_once)
        if not isinstance(found, dict):
            raise ValueError("expected an object")
        metadata = _metadata(found.pop(METADATA, None))
        header = Header(raw, {_text(name): _entry(name, value) for name, value in found.items()}, metadata)
        end = 0
        for name in header.by_place:
            entry = header.tensors[name]
            if entry.start != end:
                raise ValueError(f"{shown(name)}: expected its bytes from {end} on, got {entry.start}")
            end = entry.end
        if end != size - len(raw):
            raise ValueError(f"the tensors take {end} bytes, the file has {size - len(raw)}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file: {shown(str(error))}") from None
    return header


def _text(value: object) -> str:
    """A string that UTF-8 can hold: JSON's escapes may make others."""
    if not isinstance(value, str):
        raise ValueError(f"expected a string, got {value!r:.60}")
    value.encode()
    return value


def _metadata(found: object) -> dict[str, str] | None:
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{METADATA}: expected an object, got {found!r:.60}")
    return None if found is None else {_text(key): _text(value) for key, value in found.items()}


def _entry(name: str, found: object) -> Entry:
    """A tensor's entry, whose dtype and shape fit its number of bytes."""
    if not isinstance(found, dict) or str(found.get("dtype")) not in STORED:
        raise ValueError(f"{shown(name)}: expected a known dtype, a shape and data_offsets, got {found!r:.100}")
    shape, offsets = found.get("shape"), found.get("data_offsets")
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2 and len(shape) <= MAX_AXES):
        raise ValueError(f"{shown(name)}: expected a shape and two offsets, got {shape!r:.60} and {offsets!r:.60}")
    bits, (start, end) = STORED[found["dtype"]][1] * math.prod(shape), offsets
    if bits != 8 * (end - start) or math.prod(filter(None, shape)) > 2**59:  # NumPy has no larger, even of nothing
        raise ValueError(f"{shown(name)}: {found['dtype']} of shape {shape!r:.60} does not take {end - start} bytes")
    return Entry(found["dtype"], tuple(shape), start, end)


def _are_counts(found: object) -> TypeGuard[list[int]]:
    return isinstance(found, list) and all(type(n) is int and 0 <= n < 2**60 for n in found)


@dataclass(frozen=True, eq=False)
class TensorFile:
    """A safetensors file, open while `open_tensors` or `again` has it: its header, and the tensors' values."""

    path: Path
    header: Header
    stamp: Stamp
    _file: BufferedReader

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.header.metadata or {}

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """The dtypes of its tensors, as the format calls them."""
        return {name: entry.dtype for name, entry in self.header.tensors.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors."""
        return {name: entry.shape for name, entry in self.header.tensors.items()}

    @contextmanager
    def again(self) -> Iterator[TensorFile]:
        """The file, opened once more; a ValueError unless it is what it was when its header was read."""
        with open_unchanged(self.path, self.stamp) as file:
            yield replace(self, _file=file)

    def check_names(self, expected: Mapping[str, tuple[int, ...]], left_out: Collection[str] = ()) -> None:
        """A ValueError that names a tensor: one that is missing, belongs nowhere, or has another shape or dtype.

        left_out: what may be there besides, and is not read.
        """
        for name in sorted(expected.keys() - self.shapes.keys()):
            raise ValueError(f"{self.path}: the tensor {shown(name)} is missing")
        for name in sorted(self.shapes.keys() - expected.keys() - set(left_out)):
            raise ValueError(f"{self.path}: the tensor {shown(name)} has no place in this model")
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise ValueError(f"{self.path}: {name}: expected shape {shape}, got {self.shapes[name]}")
            if self.dtypes[name] not in WIDENED:
                raise ValueError(f"{self.path}: {name}: expected one of {' '.join(FLOATS)}, got {self.dtypes[name]}")

    def read(self, name: str) -> Array:
        """The tensor, in host memory. Check its name and dtype first."""
        entry = self.header.tensors[name]
        self._seek(entry)
        return self._next(entry, entry.shape)

    def blocks(self, name: str) -> Iterator[Block]:
        """The same, some rows at a time."""
        entry = self.header.tensors[name]
        self._seek(entry)
        for rows in row_blocks(entry.shape):
            yield rows, self._next(entry, (rows.stop - rows.start, *entry.shape[-1:]))

    def _next(self, entry: Entry, shape: tuple[int, ...]) -> Array:
        """What stands next in the file, of a tensor's dtype."""
        if entry.dtype == "BF16":
            import_bfloat16()
        values = np.empty(shape, STORED[entry.dtype][0])
        if self._file.readinto(values.reshape(-1).view(np.uint8).data) < values.nbytes:
            raise changed(self.path)
        return values

    def parts(self, name: str) -> Iterator[bytes]:
        """The tensor's bytes as they stand, a part at a time."""
        entry = self.header.tensors[name]
        self._seek(entry)
        for start in range(entry.start, entry.end, PART):
            part = self._file.read(min(PART, entry.end - start))
            if len(part) < min(PART, entry.end - start):
                raise changed(self.path)
            yield part

    def _seek(self, entry: Entry) -> None:
        self._file.seek(len(self.header.raw) + entry.start)

    def read_as(self, name: str, dtype: np.dtype[Any]) -> Array:
        """The tensor, finite, widened to `dtype` if need be; a ValueError if it would be rounded."""
        check_widens(WIDENED[self.dtypes[name]], dtype, f"{self.path}: {name}")
        return self.read_finite(name).astype(dtype, copy=False)

    def read_finite(self, name: str) -> Array:
        """The tensor; a ValueError if its dtype is none of FLOATS, or an element is NaN or infinite."""
        where = f"{self.path}: {shown(name)}"
        dtype = self.header.tensors[name].dtype  # not all tensors', of a file that is opened for each
        if dtype not in FLOATS:
            raise ValueError(f"{where}: expected one of {' '.join(FLOATS)}, got {dtype}")
        values = self.read(name)
        if not np.isfinite(values).all():
            raise ValueError(f"{where}: holds NaN or infinite numbers")
        return values


def check_widens(stored: str, dtype: np.dtype[Any], where: str) -> None:
    """A ValueError if numbers of the dtype `stored` would be rounded to the model's."""
    if not np.can_cast(np.dtype(stored), dtype, "safe"):
        raise ValueError(f"{where}: {stored} would be rounded to the model's {dtype}; load it as {stored}")


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """A safetensors file, its header checked against its size before anything is read by it.

    A ValueError, at the end of the block at the latest, if the file is written to meanwhile.
    """
    with open_unchanged(path) as file:
        yield TensorFile(path, read_header(path, file), stamp(file), file)


def saved_anew(pickle: str, wanted: str) -> str:
    """The line that makes a safetensors file of a pickled dict of tensors, which run no code with weights_only."""
    old, new = (json.dumps(shown(name), ensure_ascii=False) for name in (pickle, wanted))
    return f"safetensors.torch.save_file(torch.load({old}, weights_only=True), {new})"


def refuse_pickle(folder: Path, wanted: str, *, is_dict: bool = False) -> None:
    """A ValueError if `folder` is a pickle file, or has weights in one instead of the file `wanted`.

    is_dict: whether such files are known to hold a dict of tensors that share no memory, which one line saves anew.
    """
    beside = sorted(folder.iterdir()) if folder.is_dir() and not (folder / wanted).exists() else []
    for path in (folder, *beside):
        if path.is_file() and path.suffix in PICKLES:
            raise ValueError(
                f"{path}: refused: a pickle file can run any code when it is read; save the weights as {wanted}"
                + (f": {saved_anew(path.name, wanted)}" if is_dict else "")
            )
