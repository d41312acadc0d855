"""A merged model, a tensor at a time: what each tensor of its files is made of (L5).

What no adapter touches is the base's bytes. The rest is W0 + sum_i w_i s_i B_i A_i, or with DoRA (m / c) (W0 + s B A)
(L10), in float64 a few rows at a time and rounded once to the file's dtype, in the place of W0's own copy: one tensor
is held, and A and B.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...adapter import Change
from ...backend import Array, asnumpy, blocks, xp
from ...dora import dora_merge_matrix, weight_norm
from ...lora import Update, merge_matrix
from ...model import Config
from ..files.rounding import numpy_dtype, rounded
from ..files.safetensors_file import Header
from ..files.safetensors_writer import new_header
from ..models.huggingface import Place
from ..models.shards import WEIGHTS, Stored

MOVED = 2.0**-8  # relatively: a magnitude in 16 bits, and a norm that was rounded to them


class Rows(NamedTuple):
    """Some rows of one weight: their place in a tensor, W0 there (float64, a copy), and its updates.

    at, of: which rows of the weight they are, and the updates of all its rows
    axis: along which DoRA takes norms (`Change`): along 0, of a table, its update has them, c; and norms_W0 are W0's
    """

    place: Array
    W0: Array
    updates: list[Update]
    at: slice = slice(None)
    of: Sequence[Update] = ()
    axis: int = 1
    norms_W0: Array | None = None

    @property
    def has_dora(self) -> bool:
        """Whether it is DoRA's update, which is alone."""
        return bool(self.updates) and self.updates[0].m is not None

    def sum(self) -> Array:
        """W0 + sum_i w_i s_i B_i A_i, or (m / c) (W0 + s B A), float64; a bias or a norm has no updates."""
        if self.has_dora:
            return asnumpy(dora_merge_matrix(xp.asarray(self.W0), self.updates[0], axis=self.axis))
        return asnumpy(merge_matrix(xp.asarray(self.W0), *self.updates)) if self.updates else self.W0

    def size(self) -> Array:
        """|W0| + sum_i |w_i s_i| |B_i| |A_i|: what the rounding of that sum is measured by."""
        absolute = [Update(abs(u.A), abs(u.B), abs(u.s)) for u in self.updates]
        return Rows(self.place, abs(self.W0), absolute).sum()

    def turned(self) -> Array | None:
        """These rows of the transpose of sum_i w_i s_i B_i A_i; None if that has another shape."""
        if self.has_dora or any(len(u.B) != u.A.shape[1] for u in self.of):
            return None
        updates = [Update(u.B.T, u.A.T[self.at], u.s) for u in self.of]
        return asnumpy(merge_matrix(xp.zeros(self.W0.shape), *updates))


def summed(merged: Array, start: Array, updates: Sequence[Update], *, axis: int = 1) -> Iterator[Rows]:
    """A merged weight (out, ...) block by block, and what it is to be; `start` is the base's, or `merged` itself."""
    factors = [u._replace(A=_wide(u.A), B=_wide(u.B), m=None if u.m is None else _wide(u.m)) for u in updates]
    norms_W0 = None
    if axis == 0 and any(u.m is not None for u in factors):
        norms_W0 = _column_norms(start, factors[0]._replace(s=0.0))
        factors = [factors[0]._replace(c=_column_norms(start, factors[0]))]
    for rows in blocks(len(merged), math.prod(merged.shape[1:])):
        parts = [u._replace(B=u.B[rows], m=u.m if u.m is None or axis == 0 else u.m[rows]) for u in factors]
        yield Rows(merged[rows], start[rows].astype(np.float64), parts, rows, factors, axis, norms_W0)


def _column_norms(W0: Array, update: Update) -> Array:
    """L10: c of a table, the norm of each column of W0 + s B A, a few rows at a time. W0 (V,D) -> (D,)."""
    squares = xp.zeros(W0.shape[1])
    for rows in blocks(*W0.shape):
        B, part = update.B[rows], xp.asarray(W0[rows].astype(np.float64))
        squares += weight_norm(part, update.A, B, update.s, axis=0) ** 2
    return xp.sqrt(squares)


def _wide(values: Array) -> Array:
    """A factor in float64, where it is computed with; a file's bfloat16 is widened on the host."""
    return xp.asarray(asnumpy(values).astype(np.float64))


@dataclass(frozen=True, eq=False)
class Target:
    """A tensor of the merged model's files.

    key, shape, dtype   as the files have them
    source              the base's tensor that it starts from; None: an adapter has all of it
    place               the weights in it; None: it is none of the model's weights
    changes             how those weights are made that are not the base's
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    source: Stored | None
    place: Place | None
    changes: Mapping[str, Change]

    @property
    def kept(self) -> Stored | None:
        """The base's tensor whose bytes it is, if that is so."""
        return None if self.changes else self.source

    @property
    def rescales(self) -> bool:
        """Whether DoRA makes some row longer or shorter than it is, by more than 16 bits round its length."""
        if self.source is None or not any(u.m is not None for c in self.changes.values() for u in c.updates):
            return False
        start = self.source.read_raw()
        blocks = (rows for rows in self.rows(start, start) if rows.has_dora)
        return any(bool((abs(rows.sum() - rows.W0) > MOVED * abs(rows.W0)).any()) for rows in blocks)

    def size(self) -> int:
        """How many bytes it has."""
        if self.kept is None:
            return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize
        entry = self.kept.file.header.tensors[self.kept.name]
        return entry.end - entry.start

    def values(self) -> Array:
        """The merged tensor, in host memory."""
        dtype = numpy_dtype(self.dtype)
        result = np.empty(self.shape, dtype) if self.source is None else self.source.read_raw()
        for rows in self.rows(result, result):
            rows.place[...] = rounded(rows.sum(), dtype)
        if not np.isfinite(result).all():
            where = self.key if self.source is None else self.source
            raise ValueError(f"{where}: a merged weight is NaN, infinite, or too large for {dtype}")
        return result

    def rows(self, tensor: Array, start: Array) -> Iterator[Rows]:
        """The tensor block by block, in our orientation, and what it is to be; `start` is the source, or `tensor`."""
        assert self.place is not None
        if self.place.transposed:
            tensor, start = tensor.swapaxes(-1, -2), start.swapaxes(-1, -2)
        for name, part in self.place.parts.items():
            change = self.changes.get(name, Change(name, None, ()))
            W, W0 = tensor[part], start[part] if change.whole is None else asnumpy(change.whole)
            if W.ndim == 1 and change.updates:  # a bias as a matrix of one column
                W, W0 = W[:, None], W0[:, None]
            yield from summed(W, W0, change.updates, axis=change.axis)

    def parts_bytes(self) -> Iterator[bytes | memoryview]:
        """Its bytes, a part at a time where they are the base's; a ValueError if a weight is NaN or infinite."""
        if self.kept is None:
            yield np.ascontiguousarray(self.values()).reshape(-1).view(np.uint8).data
            return
        for part in self.kept.parts():
            if self.place is not None and not np.isfinite(np.frombuffer(part, numpy_dtype(self.dtype))).all():
                raise ValueError(f"{self.kept}: holds NaN or infinite numbers")
            yield part


@dataclass(frozen=True, eq=False)
class Plan:
    """A merge: the base, and the merged model's tensors by the base's files.

    folder, raw  the base's folder, and its config.json
    config       the merged model's, where it can be run; None: it is known by its tensors' names alone
    about        the merged model's config.json; None: it is one of our own, which says its weights' hash
    remarks      what is wrong with the adapters, though they can be merged
    """

    folder: Path
    raw: Mapping[str, Any]
    config: Config | None
    about: Mapping[str, Any] | None
    headers: Mapping[Path, Header]
    files: Mapping[Path, Sequence[Target]]
    remarks: Sequence[str] = ()

    @property
    def targets(self) -> list[Target]:
        return [target for targets in self.files.values() for target in targets]

    @property
    def changes_anything(self) -> bool:
        """Whether there is an s B that is not zero, or what is trained whole and not the base's."""
        changes = [change for target in self.targets for change in target.changes.values()]
        return any(
            c.whole is not None or any(u.s and (u.B != 0).any() and (u.A != 0).any() for u in c.updates)
            for c in changes
        ) or any(target.rescales for target in self.targets)

    @property
    def sharded(self) -> bool:
        """Whether an index says which tensor stands in which file."""
        return [path.name for path in self.files] != [WEIGHTS]

    def merged_header(self, path: Path) -> Header:
        """The header of a merged file: the base's very bytes where the tensors' names, dtypes and shapes are."""
        header, targets = self.headers[path], self.files[path]
        found = [(name, entry.dtype, entry.shape) for name, entry in header.tensors.items()]
        if found == [(t.key, t.dtype, t.shape) for t in targets]:
            return header
        return new_header({t.key: (t.dtype, t.shape, t.size()) for t in targets}, header.metadata)
