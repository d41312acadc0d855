"""Bases that were rounded to few bits before an adapter was merged: is a merge nearer to one of these?

A rounding of W0 that is fixed, Q(W0), leaves M = Q(W0) + dW + n, where n is the file's own rounding. M - (W0 + dW) then
has the length of Q(W0) - W0 beside n, and M - (Q(W0) + dW) that of n alone. In a right merge it is the other way round:
the second is longer, as n knows nothing of Q. So the one is never taken for the other, whatever dW; what cannot be seen
is a rounding that is finer than the file's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ...backend import Array
from .target import Rows

BFLOAT16 = "bfloat16"
PLAIN = 0.5  # the part of |M - (W0 + dW)|^2 below which |M - (Q(W0) + dW)|^2 must be
# NF4's levels (QLoRA, arXiv:2305.14314, appendix E): quantiles of a normal distribution, scaled to [-1, 1].
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def _symmetric(groups: Array, most: int) -> Array:
    """A grid of equal steps, as many on both sides of 0; groups (n, size)."""
    step = abs(groups).max(axis=1, keepdims=True) / most
    return np.rint(groups / np.where(step, step, 1)) * step


def _one_sided(groups: Array) -> Array:
    """Steps from -8 to 7, of which -8 is the group's largest element."""
    at = abs(groups).argmax(axis=1)[:, None]
    step = np.take_along_axis(groups, at, axis=1) / -8
    return np.clip(np.rint(groups / np.where(step, step, 1)), -8, 7) * step


def _from_least(groups: Array) -> Array:
    """16 steps from the least to the greatest."""
    least = groups.min(axis=1, keepdims=True)
    step = (groups.max(axis=1, keepdims=True) - least) / 15
    return np.rint((groups - least) / np.where(step, step, 1)) * step + least


def _with_zero(groups: Array) -> Array:
    """The same, of which 0 is one: GPTQ's and AWQ's."""
    least, greatest = np.minimum(groups.min(axis=1, keepdims=True), 0), np.maximum(groups.max(axis=1, keepdims=True), 0)
    step = np.where(greatest > least, greatest - least, 1) / 15
    zero = np.rint(-least / step)
    return (np.clip(np.rint(groups / step) + zero, 0, 15) - zero) * step


def _nf4(groups: Array) -> Array:
    largest = abs(groups).max(axis=1, keepdims=True)
    between = (NF4[1:] + NF4[:-1]) / 2
    return NF4[np.searchsorted(between, groups / np.where(largest, largest, 1))] * largest


def _bfloat16(groups: Array) -> Array:
    """8 significant bits."""
    mantissa, exponent = np.frexp(groups)
    return np.ldexp(np.rint(np.ldexp(mantissa, 8)), exponent - 8)


# Each by what is said of it: the size of its groups along a row (None: the row), and what it makes of them (n, size).
ROUNDINGS: dict[str, tuple[int | None, Callable[[Array], Array]]] = {
    "8 bits, by rows": (None, partial(_symmetric, most=127)),
    "8 bits, in blocks of 32": (32, partial(_symmetric, most=127)),
    "4 bits, NF4 in blocks of 64": (64, _nf4),
    "4 bits, in blocks of 32": (32, _one_sided),
    "4 bits, by rows": (None, partial(_symmetric, most=7)),
    "4 bits, in groups of 64": (64, _from_least),
    "4 bits, in groups of 128": (128, _from_least),
    "4 bits, in groups of 64 with a zero": (64, _with_zero),
    "4 bits, in groups of 128 with a zero": (128, _with_zero),
    BFLOAT16: (None, _bfloat16),
}


def squares(rows: Rows, total: Array) -> Array:
    """|M - (Q(W0) + dW)|^2 of a block for each rounding Q, and at the end |M - (W0 + dW)|^2."""
    apart = rows.place.astype(np.float64) - total
    return np.array([*(_square(apart - (_grid(rows.W0, *Q) - rows.W0)) for Q in ROUNDINGS.values()), _square(apart)])


def nearest_rounding(found: Array, dtype: np.dtype[Any]) -> str | None:
    """The rounding whose merge is nearest, by the sums of `squares` of a tensor; None if W0's own is.

    dtype: the file's: in bfloat16 itself that rounding is as fine as the sum's own
    """
    names = [name for name in ROUNDINGS if name != BFLOAT16 or dtype.name != BFLOAT16]
    best = int(np.argmin(found[: len(names)]))
    return names[best] if found[best] < PLAIN * found[-1] else None


def _grid(W: Array, size: int | None, rounding: Callable[[Array], Array]) -> Array:
    """W (rows, in) rounded group by group; where rows are no multiple of a group, as they are."""
    n = size or W.shape[1]
    return rounding(W.reshape(-1, n)).reshape(W.shape) if W.shape[1] % n == 0 else W


def _square(values: Array) -> float:
    return float(np.vdot(values, values))
