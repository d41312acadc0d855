"""A tensor while it is read: some rows at a time go where they are kept at once, so that no second copy is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal, TypeAlias

import numpy as np

from ...backend import Array, DType

BLOCK_ELEMENTS = 2**18  # that are read at once
Block: TypeAlias = tuple[slice | Array, Array]  # which rows of a tensor, and what is in them


def as_rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many rows a tensor has, and how long they are: all axes but the last; a vector is one row."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """The rows of a tensor that are read together."""
    rows, width = as_rows(shape)
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def gathered(shape: tuple[int, ...], dtype: DType, blocks: Iterable[Block], order: Literal["C", "F"] = "C") -> Array:
    """The tensor whose blocks these are, in host memory. order: NumPy's; "F": a matrix that is wanted transposed."""
    values = np.empty(shape, dtype, order)
    rows = values.reshape(as_rows(shape))  # a view
    for place, block in blocks:
        rows[place] = block
    return values
