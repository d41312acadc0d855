"""Bases that were rounded to few bits before an adapter was merged: do a merge's errors lie along such a rounding?

A rounding of W0 that is fixed, Q(W0), leaves M = Q(W0) + dW + n, where n is the file's own rounding: with
d = Q(W0) - W0, e = M - (W0 + dW) is d + n, and in a right merge n, which knows nothing of Q: its signs are as if by
chance. With d' what is left of d beside W0, so that another base, or a multiple of this one, is none that was rounded,
<e, d'> is about |d'|^2, and in a right merge 0. There it is further off than t times the root of the sum of (e d)^2
with a probability of 2 exp(-t^2 / 2) at most (Hoeffding), also where n is larger than d, as beside an update much
larger than W0, and each element is what a right merge may have. What cannot be seen is a d so far below n that a tensor
has too few elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ...backend import Array
from ...storage import LEVELS
from .evidence import SURE
from .target import Rows

BFLOAT16 = "bfloat16"
SAMPLE = 2**18  # elements of a tensor, of those in blocks where any is off


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
    levels = LEVELS.astype(np.float64)
    between = (levels[1:] + levels[:-1]) / 2
    return levels[np.searchsorted(between, groups / np.where(largest, largest, 1))] * largest


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


@dataclass
class Nearness:
    """Sums over elements, one for each rounding Q; e is M - (W0 + dW), and d is Q(W0) - W0.

    sums: |e|^2, |W0|^2, <e, W0>, |d|^2, <e, d>, <W0, d>, |e d|^2 element by element
    """

    sums: Array = field(default_factory=lambda: np.zeros((7, len(ROUNDINGS))))
    elements: int = 0

    def add(self, rows: Rows, total: Array) -> None:
        """One block; total: W0 + dW (rows, in)."""
        W0, e = rows.W0, rows.place.astype(np.float64) - total
        known = _dot(e, e), _dot(W0, W0), _dot(e, W0)
        found = []
        for Q in ROUNDINGS.values():
            d = _grid(W0, *Q) - W0
            found.append((*known, _dot(d, d), _dot(e, d), _dot(W0, d), _dot(e * d, e * d)))
        self.sums += np.array(found).T
        self.elements += e.size

    def rounding(self, dtype: np.dtype[Any]) -> str | None:
        """The rounding whose merge M is nearest to, None if it is W0's own.

        dtype: the file's: in bfloat16 itself that rounding is as fine as the sum's own.
        """
        e, W0, e_W0, d, e_d, W0_d, noise = self.sums
        if not (np.isfinite(self.sums).all() and e[0] and W0[0]):
            return None
        left, size, product = e - 2 * e_d + d, d - W0_d**2 / W0, e_d - e_W0 * W0_d / W0
        is_it = (product > size / 2) & (product < 1.5 * size) & (product**2 > SURE**2 * noise)
        names = [
            (gap, name)
            for gap, name, is_one in zip(left, ROUNDINGS, is_it, strict=True)
            if is_one and (name != BFLOAT16 or dtype.name != BFLOAT16)
        ]
        return min(names)[1] if names else None


def _grid(W: Array, size: int | None, rounding: Callable[[Array], Array]) -> Array:
    """W (rows, in) rounded group by group; where rows are no multiple of a group, as they are."""
    n = size or W.shape[1]
    return rounding(W.reshape(-1, n)).reshape(W.shape) if W.shape[1] % n == 0 else W


def _dot(one: Array, other: Array) -> float:
    return float(np.vdot(one, other))
