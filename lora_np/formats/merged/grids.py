"""The grids that bases are rounded to when they are loaded or kept in few bits: weights in, rounded weights out.

Each takes W (rows, in), float64. Blocks run along a row, the last of which may be shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

import numpy as np

from ...backend import Array
from ..files.rounding import epsilon

# Dettmers et al. 2023, appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

Grid: TypeAlias = Callable[[Array], Array]


def _in_blocks(rounding: Grid, width: int | None, W: Array) -> Array:
    """Each block of so many elements of a row rounded on its own; None: the row."""
    width = W.shape[1] if width is None else width
    padded = np.pad(W, ((0, 0), (0, -W.shape[1] % width)))
    return rounding(padded.reshape(-1, width)).reshape(padded.shape)[:, : W.shape[1]]


def _divided(values: Array, step: Array) -> Array:
    return np.divide(values, step, out=np.zeros_like(values), where=step != 0)


def _int8(W: Array) -> Array:
    """127 steps to the largest number."""
    step = abs(W).max(axis=1, keepdims=True) / 127
    return np.rint(_divided(W, step)) * step


def _q4_0(W: Array) -> Array:
    """llama.cpp's: the number furthest from zero is -8 steps, the others -8 to 7."""
    furthest = np.take_along_axis(W, abs(W).argmax(axis=1)[:, None], axis=1)
    step = (furthest / -8).astype(np.float16).astype(np.float64)
    return np.clip(np.rint(_divided(W, furthest / -8)), -8, 7) * step


def _nf4(W: Array) -> Array:
    values = np.array(NF4)
    largest = abs(W).max(axis=1, keepdims=True)
    return values[np.searchsorted((values[1:] + values[:-1]) / 2, _divided(W, largest))] * largest


def _affine(levels: int, W: Array) -> Array:
    """So many levels from the least to the largest number, of which zero is one: GPTQ's, AWQ's, MLX's."""
    least, most = np.minimum(W.min(axis=1, keepdims=True), 0), np.maximum(W.max(axis=1, keepdims=True), 0)
    step = (most - least) / (levels - 1)
    zero = np.rint(_divided(-least, step))
    return (np.clip(np.rint(_divided(W, step)) + zero, 0, levels - 1) - zero) * step


def _significant(bits: int, W: Array) -> Array:
    """So many significant bits, whatever the exponent."""
    mantissa, exponent = np.frexp(W)
    return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)


FLOATS = {"bfloat16": 8, "float16": 11}  # their significant bits
GRIDS: dict[str, Grid] = {
    "8 bits (a scale for each row)": partial(_in_blocks, _int8, None),
    "8 bits (a scale for each 32 numbers, as in Q8_0)": partial(_in_blocks, _int8, 32),
    "8 bits (a scale for each 256 numbers)": partial(_in_blocks, _int8, 256),
    "4 bits (NF4, blocks of 64)": partial(_in_blocks, _nf4, 64),
    "4 bits (Q4_0)": partial(_in_blocks, _q4_0, 32),
    "4 bits (groups of 32)": partial(_in_blocks, partial(_affine, 16), 32),
    "4 bits (groups of 64)": partial(_in_blocks, partial(_affine, 16), 64),
    "4 bits (groups of 128)": partial(_in_blocks, partial(_affine, 16), 128),
}


def grids(dtype: np.dtype[np.generic]) -> Iterator[tuple[str, Grid]]:
    """The grids that are coarser than a dtype, by what they are called."""
    yield from GRIDS.items()
    for name, bits in FLOATS.items():
        if 2.0 ** (1 - bits) > epsilon(dtype):
            yield name, partial(_significant, bits)
