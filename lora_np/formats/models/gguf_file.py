"""GGUF files, read as what they are: bytes that anyone may have written.

The whole header is checked against the file's size before anything is made of it: no count or length is believed. What
is wrong with a file is one ValueError that names the file, and the key or tensor if it is one's fault.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...backend import Array, DType, blocks, xp
from ...storage import Q4_0, Q4_1, Q8_0, Held
from ..files.blocks import Block, gathered, row_blocks
from ..files.extras import missing
from ..files.stamp import changed, open_unchanged, stamp

MAGIC, VERSIONS = b"GGUF", (2, 3)
COUNT_AT = 8  # where the number of tensors stands
MAX_HEADER_BYTES = 64 * 2**20
AHEAD = 2**20  # bytes of it that are read at once
MAX_TEXT_BYTES = 2**20
MAX_ENTRIES = 2**16  # keys, and tensors
MAX_STRINGS = 2**21  # in all arrays together
MAX_DIMS = 4  # the format's own limit
ALL = slice(None)

# How struct reads each type of value; STRING and ARRAY are read by hand.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class TensorType(NamedTuple):
    """How numbers are stored: blocks of so many elements in so many bytes."""

    name: str
    elements: int
    bytes: int


# Every type that the gguf package decodes; NVFP4 and MXFP4 in its newer versions alone.
TENSOR_TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    30: TensorType("BF16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    29: TensorType("IQ1_M", 256, 56),
    34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17),
    40: TensorType("NVFP4", 64, 36),
}


# Those that a model can hold as they are.
HELD: dict[str, type[Q4_0 | Q4_1 | Q8_0]] = {kind.name: kind for kind in (Q4_0, Q4_1, Q8_0)}


class ValueList(NamedTuple):
    """An array among the metadata, left in the file: so many values of one type, from the byte `start` on."""

    kind: int
    length: int
    start: int


class Tensor(NamedTuple):
    """A tensor's entry in the header. shape: as NumPy has it, the last axis together; offset: from the file's start."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def rows(self) -> int:
        """All axes but the last."""
        return int(np.prod(self.shape[:-1], dtype=object))

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.shape[-1] // TENSOR_TYPES[self.kind].elements * TENSOR_TYPES[self.kind].bytes


def import_gguf() -> Any:
    """The gguf package, which decodes tensors and writes files; an ImportError says how to get it."""
    try:
        import gguf.quants
    except ImportError as error:
        raise missing("reading a GGUF file's tensors", "gguf", "models") from error
    return gguf


class GGUFFile:
    """An open GGUF file: its metadata, what tensors it has, and their values.

    metadata: numbers, booleans and strings by key; arrays are `ValueList`, which `array` reads.
    """

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path = path
        self._file, self._data = file, bytearray()  # the file from its start on, as far as the header was read
        self._size = stamp(file).size
        self._at = 0
        self._strings = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self._read_header()

    def array(self, key: str, kind: type, most: int) -> list[Any]:
        """The values of an array; a ValueError if there is none, one of another type, or a longer one."""
        values = self.get(key, ValueList)
        if values.length > most:
            raise ValueError(f"{self.path}: {key}: expected at most {most} values, got {values.length}")
        if (values.kind == STRING) != (kind is str) or SCALARS.get(values.kind) in ("f", "d", "?"):
            raise ValueError(f"{self.path}: {key}: expected an array of {kind.__name__}, got type {values.kind}")
        self._at = values.start
        if values.kind == STRING:
            return [self._text(f"a string of {key}") for _ in range(values.length)]
        return list(struct.unpack_from(f"<{values.length}{SCALARS[values.kind]}", self._data, values.start))

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of the metadata; a ValueError if it is missing, without a default, or of another type."""
        value = self.metadata.get(key, default)
        if value is None:
            raise ValueError(f"{self.path}: the key {key} is missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self.path}: {key}: expected {kind.__name__}, got {_shown(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{self.path}: {key}: expected a finite number, got {value}")
        return value

    def read(self, name: str, dtype: DType, *, heads: int = 0, rows: slice = ALL) -> Array:
        """A tensor's values as `blocks` has them, in host memory."""
        tensor = self.tensors[name]
        shape = tensor.shape if rows == ALL else (self._count_of(name, rows), tensor.shape[-1])
        return gathered(shape, dtype, self.blocks(name, dtype, heads=heads, rows=rows))

    def blocks(self, name: str, dtype: DType, *, heads: int = 0, rows: slice = ALL) -> Iterator[Block]:
        """A tensor's values, decoded by the gguf package some rows at a time.

        heads: if not 0, the rows of each of so many heads come in pairs (2j, 2j+1), and are put back (j, j + K/2).
        rows: which of them. A ValueError if an element is NaN or infinite; an ImportError if the package is too old.
        """
        decode = self._decoder(name)
        for place, raw in self._raw_blocks(name, heads, rows):
            with np.errstate(all="ignore"):  # what overflows is found below
                values = decode(raw)
            if not np.isfinite(values).all():
                raise ValueError(f"{self.path}: {name}: holds NaN or infinite numbers")
            yield place, values.astype(dtype, copy=False)

    def read_held(self, name: str, *, heads: int = 0, rows: slice = ALL) -> Held | None:
        """A matrix in its blocks, as `read` takes its rows; None if it is stored in none that can be held so."""
        tensor = self.tensors[name]
        kind = HELD.get(TENSOR_TYPES[tensor.kind].name)
        if kind is None or len(tensor.shape) != 2:
            return None
        shape = (self._count_of(name, rows), tensor.row_bytes)
        raw = gathered(shape, np.uint8, self._raw_blocks(name, heads, rows))
        W = kind((len(raw), tensor.shape[-1]), xp.asarray(raw))
        if not all(bool(xp.isfinite(W[block]).all()) for block in blocks(*W.shape)):
            raise ValueError(f"{self.path}: {name}: holds NaN or infinite numbers")
        return W

    def _raw_blocks(self, name: str, heads: int, rows: slice) -> Iterator[Block]:
        """The bytes of a tensor's rows, and where these go: those of each head's halves one below the other."""
        start, n = rows.start or 0, self._count_of(name, rows)
        order = np.arange(n).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1) if heads else None
        for block in row_blocks((n, self.tensors[name].shape[-1])):
            raw = self.read_raw(name, slice(start + block.start, start + block.stop))
            yield (block if order is None else order[block]), raw

    def _count_of(self, name: str, rows: slice) -> int:
        """How many rows of a tensor these are."""
        return len(range(self.tensors[name].rows)[rows])

    def _decoder(self, name: str) -> Callable[[Array], Array]:
        """What makes float32 numbers of a tensor's bytes."""
        gguf, kind = import_gguf(), self.tensors[name].kind
        try:
            decode = partial(gguf.quants.dequantize, qtype=gguf.GGMLQuantizationType(kind))
            decode(np.zeros((1, TENSOR_TYPES[kind].bytes), np.uint8))
        except (NotImplementedError, ValueError):
            what = f"{self.path}: {name}: tensor type {TENSOR_TYPES[kind].name}"
            raise ImportError(f"{what} needs a newer gguf: pip install --upgrade gguf") from None
        return decode

    def read_raw(self, name: str, rows: slice = ALL) -> Array:
        """A tensor as it stands in the file, all rows or some. -> uint8 (rows, bytes of a row)"""
        tensor = self.tensors[name]
        start, stop, _ = rows.indices(tensor.rows)
        self._file.seek(tensor.offset + start * tensor.row_bytes)
        raw = np.fromfile(self._file, np.uint8, (stop - start) * tensor.row_bytes)
        if raw.size < (stop - start) * tensor.row_bytes:
            raise ValueError(f"{self.path}: {name}: the file ends within it")
        return raw.reshape(stop - start, tensor.row_bytes)

    def parts(self, start: int, end: int) -> Iterator[bytes]:
        """The file's bytes from `start` to before `end`, a part at a time."""
        self._file.seek(start)
        while start < end:
            part = self._file.read(min(AHEAD, end - start))
            if not part:
                raise changed(self.path)
            start += len(part)
            yield part

    @property
    def header(self) -> bytes:
        """The file's bytes up to the end of the last tensor's entry; the tensors' data follow, aligned."""
        return bytes(self._data[: self._header_end])

    @property
    def data_start(self) -> int:
        """The byte from which the tensors' offsets count."""
        return aligned(self._header_end, self.alignment)

    @property
    def size(self) -> int:
        """The file's length in bytes."""
        return self._size

    def check_tensors(self) -> None:
        """A ValueError that names a tensor which cannot be read: its type, its shape, where it lies."""
        end, last = 0, ""
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.offset):
            where = f"{self.path}: {tensor.name}"
            if tensor.kind not in TENSOR_TYPES:
                supported = " ".join(kind.name for kind in TENSOR_TYPES.values())
                raise ValueError(f"{where}: tensor type {_type_name(tensor.kind)} is not supported; {supported} are")
            if not tensor.shape or 0 in tensor.shape:
                raise ValueError(f"{where}: expected a shape without 0, got {tensor.shape}")
            if tensor.shape[-1] % TENSOR_TYPES[tensor.kind].elements:
                raise ValueError(f"{where}: {tensor.shape} does not fill blocks of {TENSOR_TYPES[tensor.kind]}")
            if tensor.offset % self.alignment:
                raise ValueError(f"{where}: expected an offset that is a multiple of {self.alignment}")
            if tensor.offset < end:
                raise ValueError(f"{where}: overlaps {last}")
            end, last = tensor.offset + tensor.rows * tensor.row_bytes, tensor.name
            if end > self._size:
                raise ValueError(f"{where}: truncated: it ends at byte {end}, the file has {self._size}")

    # --- The header: one pass, each step checked against the end ---------------------------------------------------

    def _read_header(self) -> None:
        self._take(len(MAGIC), "the magic")
        if self._data[: len(MAGIC)] != MAGIC:
            raise ValueError(f"{self.path}: not a GGUF file: it starts with {bytes(self._data[: len(MAGIC)])!r}")
        version = self._number("I", "the version")
        if version not in VERSIONS:
            raise ValueError(f"{self.path}: GGUF version {version} is not supported; 2 and 3, little-endian, are")
        n_tensors = self._count("tensors", MAX_ENTRIES)
        n_keys = self._count("keys", MAX_ENTRIES)
        for _ in range(n_keys):
            key = self._text("a key")
            if key in self.metadata:
                raise ValueError(f"{self.path}: the key {_shown(key)} stands there twice")
            self.metadata[key] = self._value(key)
        self.alignment = self._alignment()
        entries = [self._tensor() for _ in range(n_tensors)]
        self._header_end = self._at
        for tensor in entries:
            if tensor.name in self.tensors:
                raise ValueError(f"{self.path}: {tensor.name}: the tensor stands there twice")
            self.tensors[tensor.name] = tensor._replace(offset=self.data_start + tensor.offset)

    def _alignment(self) -> int:
        alignment: int = self.get("general.alignment", int, 32)
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{self.path}: general.alignment: expected a power of two, got {alignment}")
        return alignment

    def _take(self, size: int, what: str) -> int:
        """Where the next `size` bytes start; they are there, and they still are the header."""
        start, self._at = self._at, self._at + size
        if self._at > self._size:
            raise ValueError(
                f"{self.path}: truncated: {what} takes {size} bytes from byte {start} on, the file has {self._size}"
            )
        if self._at > MAX_HEADER_BYTES:
            raise ValueError(f"{self.path}: {what}: expected a header of at most {MAX_HEADER_BYTES} bytes")
        if self._at > len(self._data):
            self._data += self._file.read(max(AHEAD, self._at - len(self._data)))
        if self._at > len(self._data):
            raise changed(self.path)
        return start

    def _number(self, code: str, what: str) -> Any:
        return struct.unpack_from(f"<{code}", self._data, self._take(struct.calcsize(f"<{code}"), what))[0]

    def _count(self, what: str, most: int) -> int:
        count: int = self._number("Q", f"the number of {what}")
        if count > min(most, self._size):
            raise ValueError(f"{self.path}: expected at most {min(most, self._size)} {what}, got {count}")
        return count

    def _bytes(self, what: str) -> bytes:
        length = self._number("Q", f"the length of {what}")
        start = self._take(length, what)
        if length > MAX_TEXT_BYTES:
            raise ValueError(f"{self.path}: expected at most {MAX_TEXT_BYTES} bytes as {what}, got {length}")
        return bytes(self._data[start : start + length])

    def _text(self, what: str) -> str:
        try:
            return self._bytes(what).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}: {what} is not UTF-8") from None

    def _value(self, key: str) -> Any:
        what = f"the value of {_shown(key)}"
        kind = self._number("I", f"the type of {_shown(key)}")
        if kind == STRING:
            return self._text(what)
        if kind == ARRAY:
            return self._array(key, what)
        if kind not in SCALARS:
            raise ValueError(f"{self.path}: {what}: type {kind} is not known")
        return self._number(SCALARS[kind], what)

    def _array(self, key: str, what: str) -> ValueList:
        """An array's place; its values are passed over."""
        kind = self._number("I", f"the type of {_shown(key)}'s values")
        count = self._number("Q", f"the length of {_shown(key)}")
        if kind in SCALARS:
            return ValueList(kind, count, self._take(count * struct.calcsize(f"<{SCALARS[kind]}"), what))
        if kind != STRING:
            raise ValueError(f"{self.path}: {what}: an array of type {kind} is not supported")
        self._strings += count
        if self._strings > min(MAX_STRINGS, self._size):
            raise ValueError(f"{self.path}: {what}: more strings than {min(MAX_STRINGS, self._size)}: {self._strings}")
        start, read = self._at, struct.Struct("<Q").unpack_from
        for _ in range(count):  # the one long loop
            if self._at + 8 > len(self._data):
                self._take(8, what)  # reads on, or says that there is no room for another
                self._at -= 8
            self._at += 8 + read(self._data, self._at)[0]
        self._take(0, what)
        return ValueList(kind, count, start)

    def _tensor(self) -> Tensor:
        name = self._text("a tensor's name")
        if not name.isprintable() or len(name) > 200:
            raise ValueError(f"{self.path}: {_shown(name)}: expected a tensor's name")
        n_dims = self._number("I", f"the shape of {name}")
        if n_dims > MAX_DIMS:
            raise ValueError(f"{self.path}: {name}: expected at most {MAX_DIMS} axes, got {n_dims}")
        shape = tuple(self._number("Q", f"the shape of {name}") for _ in range(n_dims))
        kind = self._number("I", f"the type of {name}")
        return Tensor(name, shape[::-1], kind, self._number("Q", f"the offset of {name}"))


def tensor_entry(tensor: Tensor) -> bytes:
    """A tensor's entry as a header has it; offset: from where the tensors' data start."""
    name, shape = tensor.name.encode(), tensor.shape[::-1]
    numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.kind, tensor.offset)
    return struct.pack("<Q", len(name)) + name + numbers


def with_count(header: bytes, n_tensors: int) -> bytes:
    """A header that says how many tensors there are."""
    return header[:COUNT_AT] + struct.pack("<Q", n_tensors) + header[COUNT_AT + 8 :]


def aligned(at: int, alignment: int) -> int:
    """The first multiple of `alignment` that is not below `at`."""
    return -(-at // alignment) * alignment


@contextmanager
def open_gguf(path: Path) -> Iterator[GGUFFile]:
    """A GGUF file, its header checked against its size before anything is made of it."""
    with open_unchanged(path) as file:
        yield GGUFFile(path, file)


def _shown(value: object) -> str:
    """A value in an error's one line."""
    return f"{value!r:.100}"


def _type_name(kind: int) -> str:
    """The name of a tensor type that is not supported, as far as the gguf package knows it."""
    try:
        return f"{import_gguf().GGMLQuantizationType(kind).name}"
    except (ImportError, ValueError):
        return str(kind)
