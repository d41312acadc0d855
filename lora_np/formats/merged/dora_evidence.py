"""A DoRA merge (L10): by how much a whole row may be off, and wrong merges that look like it.

M is what the file has, E = (m / c) (W0 + s B A). Whoever merges in the file's own dtype rounds c and m / c once for a
row, so that M is (1 + a) E there, and each element is off besides as in any merge. A sum of n squares in float32 has
errors of 2^-24 of what it has come to, whose signs are as if by chance: c's standard deviation is sqrt(n / 12) of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from ...backend import Array, asnumpy, xp
from ...dora import dora_merge_matrix, weight_norm
from .evidence import FAR, SURE
from .target import Plan, Rows

WITHOUT, OF_BASE = "the magnitudes are left out", "the norms of W0 in the place of those of W0 + s B A"
NEAREST = 0.05  # the part of |M - E|^2 that is left, at most, of what is called one of these
SINGLE = 2.0**-24  # the roundoff that sums have at most: of 16 bits they are in float32


def row_factors(rows: Rows, total: Array, merged: Array, u: float) -> Array:
    """1 + a of each row, or of each column of a table, by least squares; 1 where a is too large for rounding.

    total: E; merged: M, float64; u: the roundoff of the file's dtype. -> (rows, 1) or (1, D)
    """
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        a = ((merged - total) * total).sum(axis=rows.axis, keepdims=True)
        a /= (total * total).sum(axis=rows.axis, keepdims=True)
    return np.where(abs(a) <= row_error(rows, u), 1 + a, 1.0)


def row_error(rows: Rows, u: float) -> float:
    """The largest |a|: W0 + s B A, c, m / c and the product are rounded once each, and c's sum with each square."""
    n = rows.W0.shape[1] if rows.axis == 1 else len(rows.of[0].B)
    return 4 * u + SURE * math.sqrt(n / 12) * min(u, SINGLE)


def allowed(rows: Rows, total: Array, u: float) -> Array:
    """By how much an element may be off that was summed and scaled in the file's own dtype, beside its row's factor."""
    (update,) = rows.updates
    scale = abs(asnumpy(update.m)) / _norms(rows)
    scale = scale[:, None] if rows.axis == 1 else scale
    return (len(update.A) + 3) * u * scale * rows.size() + row_error(rows, u) * abs(total)


def scalings(plan: Plan) -> dict[str, tuple[float, float]]:
    """The least and the largest m / c in each of a merge's tensors that DoRA adapts, by its key."""
    found: dict[str, tuple[float, float]] = {}
    for target in plan.targets:
        if target.source is None or not any(u.m is not None for c in target.changes.values() for u in c.updates):
            continue
        start = target.source.read_raw()
        ratios = [asnumpy(rows.updates[0].m) / _norms(rows) for rows in target.rows(start, start) if rows.has_dora]
        found[target.key] = float(min(map(np.min, ratios))), float(max(map(np.max, ratios)))
    return found


def _norms(rows: Rows, *, of_base: bool = False) -> Array:
    """c, or with of_base the norms of W0 alone: of a table those that `summed` has found. 1 in the place of 0."""
    (update,) = rows.updates
    if rows.axis == 0:
        c = asnumpy(rows.norms_W0 if of_base else update.c)
    else:
        s = 0.0 if of_base else update.s
        c = asnumpy(weight_norm(xp.asarray(rows.W0), update.A, update.B, s))
    return np.where(c == 0, 1.0, c)


@dataclass
class Instead:
    """Sums over elements, one for each wrong merge F: with e = M - E and d = F - E, |e|^2, <e, d>, |d|^2, and of each
    row <e, d>, squared."""

    sums: Array = field(default_factory=lambda: np.zeros((4, 2)))

    def add(self, rows: Rows, total: Array) -> None:
        """One block; total: E."""
        (update,) = rows.updates
        e = rows.place.astype(np.float64) - total
        W0, without = xp.asarray(rows.W0), Rows(rows.place, rows.W0, [update._replace(m=None)]).sum()
        of_base = update._replace(c=xp.asarray(_norms(rows, of_base=True)))
        for i, wrong in enumerate((without, asnumpy(dora_merge_matrix(W0, of_base, axis=rows.axis)))):
            d = wrong - total
            by_row = (e * d).sum(axis=1)
            self.sums[:, i] += np.vdot(e, e), by_row.sum(), np.vdot(d, d), np.vdot(by_row, by_row)

    @property
    def name(self) -> str | None:
        """What M is nearest to, if E is far; None: neither of these."""
        e, e_d, d, _ = self.sums
        left = e - 2 * e_d + d
        i = int(left.argmin())
        is_near = left[i] < NEAREST * e[i] or (self._sure[i] and abs(e_d[i] - d[i]) < FAR * d[i])
        return (WITHOUT, OF_BASE)[i] if np.isfinite(left).all() and is_near else None

    @property
    def is_sure(self) -> bool:
        """Whether it is that beyond what chance does to rows."""
        return self.name is not None and bool(self._sure.any())

    @property
    def _sure(self) -> Array:
        _, e_d, _, noise = self.sums
        return e_d > SURE * np.sqrt(noise)
