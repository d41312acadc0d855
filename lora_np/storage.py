"""How a frozen matrix is held in fewer bits. It is read as an array is, W[rows], and gives float32 numbers.

Nothing is kept of what is read, so a product widens a matrix a block of rows at a time: `wide_blocks`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias

import numpy as np

from .backend import Array, blocks, read_only, xp
from .checks import as_array


class Held(ABC):
    """A matrix of float32 numbers (out, in) that is held in fewer bits, in arrays which are its fields: read-only."""

    name: ClassVar[str]
    ndim: ClassVar[int] = 2
    dtype: ClassVar[np.dtype[Any]] = np.dtype("float32")
    __array_ufunc__ = None  # an array times this is a TypeError

    def __post_init__(self) -> None:
        for name, value in self._parts.items():
            object.__setattr__(self, name, read_only(value) if isinstance(value, xp.ndarray) else value)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @abstractmethod
    def __getitem__(self, rows: slice | Array) -> Array:
        """The rows of a slice, float32 (m, in); or those of numbers (...), float32 (..., in)."""

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, *_: Any, **__: Any) -> Array:
        raise TypeError(f"a matrix that is held in {self.name} is no array: its rows are W[rows], all of them W[:]")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(self._parts.values())  # so that a copy is read-only too

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that it is held in."""
        return sum(value.nbytes for value in self._parts.values() if isinstance(value, xp.ndarray))

    @property
    def _parts(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


Matrix: TypeAlias = Array | Held


def widened(W: Matrix) -> Array:
    """A held matrix as float32; an array as it is."""
    return W[:] if isinstance(W, Held) else W


def wide_blocks(W: Held) -> Iterator[slice]:
    """Rows of W (out, in) that are widened together: enough of them for products to run at full speed."""
    return blocks(len(W), W.shape[1] // 4)


def as_matrix(what: str, W: Any) -> Any:
    """A held matrix as it is, anything else as an array; a TypeError names what is none."""
    return W if isinstance(W, Held) else as_array(what, W)


@dataclass(frozen=True, eq=False)
class BFloat16(Held):
    """A matrix in bfloat16: the upper halves of its float32 numbers, uint16 (out, in). The same numbers."""

    halves: Array
    name = "bfloat16"

    @property
    def shape(self) -> tuple[int, int]:
        return self.halves.shape

    def __getitem__(self, rows: slice | Array) -> Array:
        bits = self.halves[rows].astype(xp.uint32)
        bits <<= 16
        return bits.view(xp.float32)


def narrowed(W: Array) -> BFloat16:
    """float32 numbers (out, in) that bfloat16 holds, held so. A ValueError if one would be rounded."""
    halves = xp.empty_like(W, dtype=xp.uint16)
    for rows in blocks(*W.shape):
        bits = W[rows].view(xp.uint32) if W.dtype == xp.float32 else None
        if bits is None or (bits & 0xFFFF).any():
            raise ValueError(f"expected float32 numbers that bfloat16 holds, got others ({W.dtype})")
        halves[rows] = bits >> 16
    return BFloat16(halves)
