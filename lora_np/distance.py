"""What attention's scores gain by how far a key is from its query: a bias (T18), or disentangled scores (T19).

A distance is a key's place less its query's, a whole number. Near ones have a bucket each; farther ones share them,
their logarithms in equal parts. Scores are (T,S) for each head, but what each query, or each key, adds for each of B
buckets is (T,B), or (S,B): memory grows with T.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .backend import Array, xp


def t5_buckets(distance: Array, n: int, last: int, *, causal: bool) -> Array:
    """T18 (Raffel et al. 2020, 2.1): the bucket, in 0..n-1, of each distance; from `last` on there is one.

    Not causal: keys behind the query have the upper half. -> integers, of the shape of distance.
    """
    n, above = (n, 0) if causal else (n // 2, (distance > 0) * (n // 2))
    far = xp.maximum(-distance, 0) if causal else xp.abs(distance)
    exact = n // 2
    share = xp.log(xp.maximum(far, exact) / exact) / math.log(last / exact)  # of the logarithms from exact to last
    return above + xp.where(far < exact, far, xp.minimum(exact + (share * (n - exact)).astype(int), n - 1))


def deberta_buckets(distance: Array, n: int, last: int) -> Array:
    """T19 (He et al. 2021, eq. 3; its second version's logarithms): the bucket, in 0..2n-1, of each distance.

    Half of the n on each side are of one distance each; the last begins at `last`. A query's own place has n.
    -> integers, of the shape of distance.
    """
    exact, far = n // 2, xp.abs(distance)
    share = xp.log(xp.maximum(far, exact) / exact) / math.log((last - 1) / exact)
    bucket = xp.where(far <= exact, far, xp.ceil(share * (exact - 1)).astype(int) + exact)
    return xp.clip(n - xp.sign(distance) * bucket, 0, 2 * n - 1)


class ByDistance(NamedTuple):
    """T18, T19: what a score gains by the distance from its query to its key, of which there are B buckets.

    The bucket of each distance, 1-S to T-1, is in 0..B-1. by_query: what each query adds for a bucket; T18's are the
    same for all sequences and queries, (1,H,1,B). by_key: what each key adds; None: nothing.
    """

    bucket: Array  # (S+T-1,)
    by_query: Array  # (N,H,T,B)
    by_key: Array | None = None  # (N,H,S,B)

    def grouped(self, G: int) -> ByDistance:
        """The same with the heads of each group apart: (N,H,T,B) -> (N,G,R,T,B)."""
        by_query, by_key = self.by_query, self.by_key
        apart = None if by_key is None else by_key.reshape(len(by_key), G, -1, *by_key.shape[2:])
        return ByDistance(self.bucket, by_query.reshape(len(by_query), G, -1, *by_query.shape[2:]), apart)

    def ungrouped(self) -> ByDistance:
        """The other way round: (N,G,R,T,B) -> (N,H,T,B)."""
        by_query, by_key = self.by_query, self.by_key
        together = None if by_key is None else by_key.reshape(len(by_key), -1, *by_key.shape[3:])
        return ByDistance(self.bucket, by_query.reshape(len(by_query), -1, *by_query.shape[3:]), together)

    def zeros(self) -> ByDistance:
        """Where gradients are summed."""
        by_key = None if self.by_key is None else xp.zeros(self.by_key.shape, dtype=self.by_key.dtype)
        return ByDistance(self.bucket, xp.zeros(self.by_query.shape, dtype=self.by_query.dtype), by_key)

    def of(self, n: slice, g: slice, t: slice, s: slice, T: int) -> tuple[ByDistance, Array]:
        """A tile's part, views, of the sequences n, groups g, queries t of T, keys s; and its buckets (t,s)."""
        places = xp.arange(s.start, s.stop) - xp.arange(t.start, t.stop)[:, None] + (T - 1)
        one = slice(None)  # where an axis has one element for all
        by_query = self.by_query[n if len(self.by_query) > 1 else one, g, :, t if self.by_query.shape[3] > 1 else one]
        by_key = None if self.by_key is None else self.by_key[n, g, :, s]
        return ByDistance(self.bucket, by_query, by_key), self.bucket[places]

    def scores(self, bucket: Array) -> Array:
        """What a tile's scores gain: by_query (n,g,R,t,B), by_key (n,g,R,s,B), bucket (t,s) -> (n,g,R,t,s)."""
        y = _from_buckets(self.by_query, bucket)
        return y if self.by_key is None else y + _from_buckets(self.by_key, bucket.T).swapaxes(-1, -2)

    def add_grads(self, dscores: Array, bucket: Array) -> None:
        """Adds a tile's share to by_query and by_key, which are gradients here: dscores (n,g,R,t,s), bucket (t,s)."""
        d = dscores if len(self.by_query) == len(dscores) else dscores.sum(axis=0, keepdims=True)
        self.by_query[...] += _to_buckets(d, bucket, *self.by_query.shape[-2:])
        if self.by_key is not None:
            self.by_key[...] += _to_buckets(dscores.swapaxes(-1, -2), bucket.T, *self.by_key.shape[-2:])


def _flat(bucket: Array, rows: int, B: int) -> Array:
    """Where a bucket stands in a row of its own, or in the one row of all, when rows are laid end to end. -> (t,s)."""
    return bucket if rows == 1 else bucket + B * xp.arange(rows)[:, None]


def _from_buckets(x: Array, bucket: Array) -> Array:
    """x (..., t, B), bucket (t,s) -> x[..., t, bucket[t,s]] (..., t, s)."""
    *lead, rows, B = x.shape
    return xp.take(x.reshape(*lead, rows * B), _flat(bucket, rows, B), axis=-1)


def _to_buckets(dy: Array, bucket: Array, rows: int, B: int) -> Array:
    """The backward of `_from_buckets`: dy (..., t, s), bucket (t,s) -> (..., rows, B), sums in float64."""
    lead = dy.shape[:-2]
    M = math.prod(lead)
    flat = xp.arange(M)[:, None, None] * (rows * B) + _flat(bucket, rows, B)  # (M,t,s)
    sums = xp.bincount(flat.ravel(), weights=dy.reshape(-1), minlength=M * rows * B)
    return sums.reshape(*lead, rows, B).astype(dy.dtype)
