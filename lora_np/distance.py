"""What attention's scores gain by how far a key is from its query: a bias (T18), or disentangled scores (T19).

A distance is a key's place less its query's, a whole number. Near ones have a bucket each; farther ones share them,
their logarithms in equal parts. Scores are (T,S) for each head, but what each query, or each key, adds for each of J
buckets is (T,J), or (S,J): memory grows with T.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .backend import Array, xp


def t5_buckets(distance: Array, n: int, max_distance: int, *, causal: bool) -> Array:
    """T18 (Raffel et al. 2020, 2.1): the bucket, in 0..n-1, of each distance; from max_distance on there is one.

    Not causal: the keys after the query have the upper half. -> integers, of the shape of distance.
    """
    size, offset = xp.maximum(-distance, 0), xp.zeros_like(distance)
    if not causal:
        n //= 2
        size, offset = xp.abs(distance), n * (distance > 0)
    exact = n // 2
    fraction = xp.log(xp.maximum(size, exact) / exact) / math.log(max_distance / exact)  # of the way, in logarithms
    return offset + xp.where(size < exact, size, xp.minimum(exact + (fraction * (n - exact)).astype(int), n - 1))


def deberta_buckets(distance: Array, n: int, max_distance: int) -> Array:
    """T19 (He et al. 2021, eq. 3; the logarithms are those of its second version's code): the bucket, in 0..2n-1.

    Half of the n on each side are of one distance each; the last begins at max_distance. A query's own place has n.
    -> integers, of the shape of distance.
    """
    exact, size = n // 2, xp.abs(distance)
    fraction = xp.log(xp.maximum(size, exact) / exact) / math.log((max_distance - 1) / exact)
    bucket = xp.where(size <= exact, size, xp.ceil(fraction * (exact - 1)).astype(int) + exact)
    return xp.clip(n - xp.sign(distance) * bucket, 0, 2 * n - 1)


class PositionBias(NamedTuple):
    """T18, T19: what scores gain by the bucket of the distance from query to key, of J buckets.

    In He et al.'s words (2021, eq. 4), content to position and position to content.
    """

    bucket: Array  # (S+T-1,): of the distances 1-S to T-1; of a tile, (t,s)
    c2p: Array  # (N,H,T,J): what a query adds for each bucket; T18's are the same for all queries of a head
    p2c: Array | None = None  # (N,H,S,J): what a key adds; None: nothing (T18)
    trained: bool = True  # whether their gradients are wanted

    def tile(self, n: slice, h: slice, t: slice, s: slice) -> PositionBias:
        """The part of some sequences, heads, queries and keys: views, and the buckets (t,s)."""
        places = xp.arange(s.start, s.stop) - xp.arange(t.start, t.stop)[:, None] + self.c2p.shape[2] - 1
        p2c = None if self.p2c is None else self.p2c[n, h, s]
        return self._replace(bucket=self.bucket[places], c2p=self.c2p[n, h, t], p2c=p2c)

    def scores(self) -> Array:
        """What a tile's scores gain. -> (n,h,t,s)."""
        y = _from_buckets(self.c2p, self.bucket)
        return y if self.p2c is None else y + _from_buckets(self.p2c, self.bucket.T).swapaxes(-1, -2)

    def zeros(self) -> PositionBias:
        """Where the gradients are summed."""
        p2c = None if self.p2c is None else xp.zeros(self.p2c.shape, dtype=self.p2c.dtype)
        return self._replace(c2p=xp.zeros(self.c2p.shape, dtype=self.c2p.dtype), p2c=p2c)

    def add(self, dscores: Array) -> None:
        """Adds the gradient of a tile's scores (n,h,t,s) to its parts, views of `zeros()`."""
        self.c2p[...] += _to_buckets(dscores, self.bucket, self.c2p.shape[-1])
        if self.p2c is not None:
            self.p2c[...] += _to_buckets(dscores.swapaxes(-1, -2), self.bucket.T, self.p2c.shape[-1])


def _from_buckets(x: Array, bucket: Array) -> Array:
    """x (...,t,J), bucket (t,s) -> x[..., t, bucket[t,s]] (...,t,s)."""
    *lead, t, J = x.shape
    return xp.take(x.reshape(*lead, t * J), bucket + J * xp.arange(t)[:, None], axis=-1)


def _to_buckets(dy: Array, bucket: Array, J: int) -> Array:
    """The backward of `_from_buckets`: dy (...,t,s), bucket (t,s) -> (...,t,J), summed in float64."""
    rows = dy.shape[:-1]
    M = math.prod(rows)
    flat = bucket + J * xp.arange(M).reshape(*rows, 1)  # each row's buckets laid end to end: (...,t,s)
    return xp.bincount(flat.ravel(), weights=dy.ravel(), minlength=M * J).reshape(*rows, J).astype(dy.dtype)
