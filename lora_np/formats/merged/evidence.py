"""Sums over a merged tensor's elements, by which it is known what was added to W0: one pass, a block of rows at a time.

M is what the file has, E the sum W0 + dW rounded once. A multiple of dW is found by least squares, and rounding, which
is no part of it, is taken off by E: what rounding makes of W0 + c dW adds about c times what it makes of W0 + dW.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ...backend import Array
from .target import Rows

NEAR = 0.05  # how far a multiple may be off, relatively
FAR = 0.25  # the part of |dW|^2 that |M - E|^2 is at least where the transpose was merged
SURE = 6.0  # how many standard deviations of its rounding a multiple is off by, to be called off


class Sums(NamedTuple):
    """Sums over elements, of what was added, M - W0, of what was due, E - W0, and of the update dW."""

    added_update: float = 0.0  # <M - W0, dW>
    due_update: float = 0.0  # <E - W0, dW>
    added: float = 0.0  # |M - W0|^2
    due: float = 0.0  # |E - W0|^2
    update: float = 0.0  # |dW|^2
    error: float = 0.0  # |M - E|^2
    noise: float = 0.0  # the sum of ((M - E) dW)^2: the variance of <M - E, dW>, if errors have signs by chance
    added_turned: float = 0.0  # <M - W0, dW^T>, of square matrices, in the blocks where M is far from E beside dW
    turned: float = 0.0  # |dW^T|^2 there

    def __add__(self, other: tuple[float, ...]) -> Sums:  # type: ignore[override]
        return Sums(*(one + two for one, two in zip(self, other, strict=True)))

    @property
    def scale(self) -> float | None:
        """The factor c for which M is nearest to what rounding makes of W0 + c dW; 1 where M is E. None without dW."""
        if self.update and not self.added and self.due:
            return 0.0  # W0 itself, also where rounding leaves less of dW in E than its size
        return 1 + (self.added_update - self.due_update) / self.update if self.update and self.finite else None

    @property
    def aligned(self) -> float:
        """cos^2 of the angle between M - W0 and dW, as a part of what rounding leaves of it in E."""
        if not (self.added and self.due_update and self.finite):
            return float(self.added == 0)  # nothing was added: zero times the update
        ratio = self.added_update / self.due_update
        return ratio * ratio / self.added * self.due

    @property
    def scale_error(self) -> float:
        """The standard deviation of `scale`, if errors have signs by chance."""
        return math.sqrt(self.noise) / self.update if self.update and self.finite else 0.0

    @property
    def is_off(self) -> bool:
        """Whether another multiple than 1 was added, beyond what chance does: also where each element is near.

        By M - E alone: W0 itself is right where rounding hides the update, but for an element or two.
        """
        if not (self.update and self.finite):
            return False
        return abs(self.added_update - self.due_update) > max(NEAR, SURE * self.scale_error) * self.update

    @property
    def scale_turned(self) -> float | None:
        """The multiple of dW^T that was added; None where there is none."""
        return self.added_turned / self.turned if self.turned and self.finite else None

    @property
    def finite(self) -> bool:
        return math.isfinite(sum(self))


def sums_of(rows: Rows, total: Array, due: Array) -> Sums:
    """The sums of one block; total: W0 + dW, due: that rounded once (rows, in)."""
    merged, update = rows.place.astype(np.float64), total - rows.W0
    added, error = merged - rows.W0, merged - due
    products = (
        (added, update), (due - rows.W0, update), (added, added), (due - rows.W0, due - rows.W0), (update, update),
        (error, error), (error * update, error * update),
    )  # fmt: skip
    found = Sums(*(float(np.vdot(*pair)) for pair in products))
    if rows.has_dora:  # whose rows have one error each besides
        by_row = (error * update).sum(axis=1)
        found = found._replace(noise=float(np.vdot(by_row, by_row)))
    turned = rows.turned() if found.error > FAR * found.update else None
    if turned is None:
        return found
    return found._replace(added_turned=float(np.vdot(added, turned)), turned=float(np.vdot(turned, turned)))
