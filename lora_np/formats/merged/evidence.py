"""What a merged tensor says of how it was made: sums over its elements, gathered block by block.

Letters: M is the merged tensor, W0 the base's, dW = s B A the update, E = round(W0 + dW) what M should be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ...backend import Array
from ..files.rounding import rounded
from .grids import grids
from .target import Rows

ALIGNED = 0.9  # cos^2 of M - W0 and the update, from which on the one is called a multiple of the other
NEAR = 0.05  # how far that multiple may be off, relatively
SURE = 8.0  # standard deviations: see `Sums.off_scale` and `Rounding`
SAMPLE = 2**18  # elements of a tensor that are held against the grids


class Sums(NamedTuple):
    """Sums over elements, of what was added, M - W0, what was to be, E - W0, both rounded, and the update dW."""

    added_update: float = 0.0  # <M - W0, dW>
    due_update: float = 0.0  # <E - W0, dW>
    added: float = 0.0  # |M - W0|^2
    due: float = 0.0  # |E - W0|^2
    update: float = 0.0  # |dW|^2
    noise: float = 0.0  # |(M - E) dW|^2, element by element
    third: float = 0.0  # <M - E, dW^3>
    fourth: float = 0.0  # |dW^2|^2
    error: float = 0.0  # |M - E|^2
    base: float = 0.0  # |W0|^2

    def __add__(self, other: tuple[float, ...]) -> Sums:  # type: ignore[override]
        return Sums(*(one + two for one, two in zip(self, other, strict=True)))

    @property
    def scale(self) -> float | None:
        """The factor c for which M is nearest to what rounding makes of W0 + c dW; 1 where M is E. None without dW."""
        return 1 + (self.added_update - self.due_update) / self.update if self.update and self.finite else None

    @property
    def deviation(self) -> float:
        """The standard deviation of `scale` c, by M - E - (c - 1) dW, and what rounding hides of the update, halved."""
        if self.scale is None:
            return 0.0
        off = self.scale - 1
        left = self.noise - 2 * off * self.third + off * off * self.fourth
        return math.hypot(math.sqrt(max(left, 0.0)), (self.update - self.due_update) / 2) / self.update

    @property
    def aligned(self) -> float:
        """cos^2 of the angle between M - W0 and dW, as a part of what rounding leaves of it in E."""
        if not (self.added and self.due_update and self.finite):
            return float(self.added == 0)  # nothing was added: zero times the update
        ratio = self.added_update / self.due_update
        return ratio * ratio / self.added * self.due

    @property
    def off_scale(self) -> bool:
        """Whether another multiple of the update was added, beyond doubt, though it may hide in one ulp.

        In a right merge the errors M - E are roundings, of independent signs. The sum of their products with dW, over
        the root of the sum of those products' squares, is then larger than t with a probability of 2 exp(-t^2 / 2) at
        most (Hoeffding): 3e-14 for `SURE`.
        """
        scale = self.scale
        return scale is not None and abs(scale - 1) > max(NEAR, SURE * math.sqrt(self.noise) / self.update)

    @property
    def off_base(self) -> float:
        """|M - E| / |W0|: how far the base is off, if the update is right."""
        return math.sqrt(self.error / self.base) if self.base and self.finite else 0.0

    @property
    def finite(self) -> bool:
        return math.isfinite(sum(self))


def sums(merged: Array, due: Array, W0: Array, update: Array) -> Sums:
    """The sums of one block, all float64."""
    added, error = merged - W0, merged - due
    pairs = (
        (added, update), (due - W0, update), (added, added), (due - W0, due - W0), (update, update),
        (error * update, error * update), (error * update, update * update), (update * update, update * update),
        (error, error), (W0, W0),
    )  # fmt: skip
    return Sums(*(float(np.vdot(*pair)) for pair in pairs))


@dataclass
class Rounding:
    """Whether the errors M - E are those of a base that was rounded to a grid Q: d = Q(W0) - W0.

    M - E is fitted by a W0 + b dW + c d, least squares; a and b take what is in common with another base, or another
    scale. In the merge onto Q(W0) c is 1, whatever M's own roundings add: they are independent of d. In a right merge
    it is 0, with the standard deviation |(M - E) d| / |d'|^2, d' what is left of d beside W0 and dW, as in
    `Sums.off_scale`. So c between a half and one and a half, and `SURE` of these away from 0, is no right merge.
    """

    gram: Array = field(default_factory=lambda: np.zeros((4, 4)))  # of M - E, W0, dW, d
    noise: float = 0.0  # |(M - E) d|^2, element by element

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(self.gram + other.gram, self.noise + other.noise)

    @property
    def explains(self) -> float:
        """The part of |M - E|^2 that d explains; 0 if it is not sure that it explains any."""
        error, W0, size = self.gram[0, 0], self.gram[1, 1], self.gram[3, 3]
        if not (np.isfinite(self.gram).all() and error > 0 and size > 1e-12 * W0):
            return 0.0
        others = self.gram[1:3, 1:3]
        with_d, with_error = self.gram[1:3, 3], self.gram[1:3, 0]
        solved = np.linalg.lstsq(others, with_d, rcond=1e-12)[0]
        left = size - solved @ with_d
        product = self.gram[0, 3] - solved @ with_error
        if not (left > 1e-3 * size and 0.5 <= product / left <= 1.5 and product**2 > SURE**2 * self.noise):
            return 0.0
        return float(product**2 / left / error)


Roundings = dict[str, Rounding]


def roundings(error: Array, W0: Array, update: Array, dtype: np.dtype[Any]) -> Roundings:
    """One block, against each grid that is coarser than the file's dtype."""
    found = {}
    for name, grid in grids(dtype):
        d = grid(W0) - W0
        columns = np.stack([error.ravel(), W0.ravel(), update.ravel(), d.ravel()])
        found[name] = Rounding(columns @ columns.T, float(np.sum((error * d) ** 2)))
    return found


def joined(one: Mapping[str, Rounding], other: Mapping[str, Rounding]) -> Roundings:
    return {name: one.get(name, Rounding()) + other.get(name, Rounding()) for name in {**one, **other}}


def rounded_to(found: Mapping[str, Rounding]) -> str | None:
    """The grid that the base was rounded to, if one explains the errors: the one that explains most."""
    best = max(found, key=lambda name: found[name].explains, default=None)
    return best if best is not None and found[best].explains > 0 else None


@dataclass
class Evidence:
    """What one tensor says, or several.

    sums       with the update
    turned     the same with its transpose; None: it has none of the same shape
    roundings  by grid
    seen       how many elements were held against the grids
    """

    sums: Sums = field(default_factory=Sums)
    turned: Sums | None = None
    roundings: Roundings = field(default_factory=dict)
    seen: int = 0

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(self.sums + other.sums, None, joined(self.roundings, other.roundings))

    def add(self, rows: Rows, merged: Array, due: Array, total: Array) -> None:
        """One block more: M and E in the file's dtype, and W0 + dW."""
        M, E, W0, update = merged.astype(np.float64), due.astype(np.float64), rows.W0, total - rows.W0
        self.sums += sums(M, E, W0, update)
        if not ((M != E).any() and np.isfinite(M).all() and np.isfinite(E).all()):
            return
        if rows.turned:
            turned = rows.turned_sum()
            more = sums(M, rounded(turned, merged.dtype).astype(np.float64), W0, turned - W0)
            self.turned = more if self.turned is None else self.turned + more
        if self.seen < SAMPLE:
            self.seen += M.size
            self.roundings = joined(self.roundings, roundings(M - E, W0, update, merged.dtype))

    @property
    def is_turned(self) -> bool:
        """Whether the transpose of the update was added."""
        turned = self.turned
        if turned is None or turned.scale is None or self.sums.aligned >= ALIGNED:
            return False
        return turned.aligned >= ALIGNED and abs(turned.scale - 1) <= NEAR
