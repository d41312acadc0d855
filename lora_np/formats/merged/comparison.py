"""Is a folder the merge of a base and an adapter? Tensor by tensor, against the sum rounded once (L5)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...adapter import Adapter, matrix_updates, norm_of
from ...backend import Array, asnumpy
from ...lora import Update
from ...storage import widened
from ..adapters.prefix import moved
from ..files.rounding import NAMES, numpy_dtype, rounded, ulps_apart
from ..models.base import Base
from ..models.families import MODEL_TYPES
from ..models.folder import CONFIG, MODEL_TYPE, read_any_header, read_own
from ..models.huggingface import is_no_weight, read_config
from ..models.shards import Stored, stored_tensors
from .coarse import SAMPLE, Nearness
from .dora_evidence import Instead, allowed, row_factors
from .evidence import NEAR, Sums, sums_of
from .target import MOVED, Plan, Rows, Target
from .tied import is_head, is_table

NEWER = {"gamma": "weight", "beta": "bias"}  # names of a norm's parts
LARGEST = float(np.finfo(np.float64).max)
NO_MODEL = ("transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache", "tie_word_embeddings")


class Difference(NamedTuple):
    """A tensor of a merged folder beside what it should be.

    differing  elements that are not equal
    max_ulps   the largest difference, in steps of the file's dtype
    max_difference   the largest |difference| of finite elements
    relative   that over the largest |element| that should be; None: all should be zero
    beyond     elements that are further apart than is allowed
    wrong      of these, those that no order of summing in the file's own dtype explains either
    not_finite elements that are NaN or infinite, there or in the sum
    scale      the multiple of the update that was added, by least squares; None: there is no update
    scale_error   its standard deviation, as rounding makes it
    is_off     whether it is another than 1 for certain: many small errors that are no chance
    aligned    whether what was added lies along the update: the square of a cosine
    scale_turned  the multiple of the update's transpose that was added; None: it is not square, or nothing differs
    instead  what was merged in the place of DoRA, as far as it is known; None: it is not known, or there is no DoRA
    is_dora  whether it is DoRA's (L10)
    rounded_to    to how many bits, and how, the base was rounded that the merge is nearest to; None: it is this base
    s, r       of the one update; None: there are several, or none
    """

    tensor: str
    elements: int
    differing: int
    max_ulps: int
    max_difference: float
    relative: float | None
    beyond: int
    wrong: int
    not_finite: int
    scale: float | None
    scale_error: float
    is_off: bool
    aligned: float
    scale_turned: float | None
    rounded_to: str | None
    s: float | None
    r: int | None
    is_dora: bool = False
    instead: str | None = None

    @property
    def fits(self) -> bool:
        """Elements where W0 and dW cancel may be further apart, in a merge that was rounded more often than once.

        Such a merge is known by the others: most of what differs lies within what is allowed.
        """
        is_far = self.is_off or self.rounded_to is not None
        return self.not_finite == self.wrong == 0 and 2 * self.beyond <= self.differing and not is_far


class Comparison(NamedTuple):
    """A merged folder beside the merge.

    changed   the tensors that the adapter changes
    altered   those that it does not change, and that are not the base's
    misshapen those of another shape, or of a dtype that no weight has
    missing, extra   tensors that should be there, or not be there
    scale     the multiple of the updates that was added, over all tensors; None: they are zero
    aligned   whether what was added lies along the updates: the square of a cosine
    same_config      whether config.json says the same model
    """

    changed: list[Difference]
    altered: list[str]
    misshapen: list[str]
    missing: list[str]
    extra: list[str]
    scale: float | None
    aligned: float
    same_config: bool

    @property
    def loads(self) -> bool:
        """Whether the folder is of the same model, right or wrong."""
        return self.same_config and not (self.misshapen or self.missing or self.extra)

    @property
    def holds(self) -> bool:
        """Whether the folder is the merge."""
        right = self.scale is None or abs(self.scale - 1) <= NEAR  # in few bits, an update may hide in one ulp
        return self.loads and right and not self.altered and all(one.fits for one in self.changed)


def is_trained(adapter: Adapter, base: Base) -> bool:
    """Whether an adapter changes anything: an s B that is not zero, or a weight trained whole unlike the base's."""
    if any(adapter.config.scale(name) and bool((adapter.params[f"{name}.B"] != 0).any()) for name in adapter.matrices):
        return True
    for name, update in matrix_updates(base.config, adapter).items():
        if update.m is not None:
            c = norm_of(base.config, base.weights, name, update)
            if bool((abs(update.m - c) > MOVED * c).any()):
                return True
    wide = {name: widened(base.weights[name if name in base.weights else "embed.tokens"]) for name in adapter.whole}
    return any(not np.array_equal(asnumpy(value), asnumpy(wide[name])) for name, value in adapter.whole.items())


def compare(plan: Plan, folder: Path, ulps: int) -> Comparison:
    """Compares a merged folder with the merge, a tensor at a time. A ValueError if it holds no model's weights.

    ulps: how far apart an element may be, in steps of the folder's own dtype. PEFT sums in the base's dtype, which
    rounds more than once.
    """
    header = read_any_header(folder)
    found = stored_tensors(folder)
    names = _names(plan, found)

    def due(target: Target) -> Due:
        stored = found.get(names[target.key])
        if stored is None:
            return Due(target.key, None, None)
        fits = stored.shape == target.shape and (target.place is None or stored.dtype in NAMES)
        compare = partial(_difference, target, stored, ulps) if target.changes else None
        return Due(stored.name, fits, compare, partial(_same, target, stored))

    is_weight = (target for target in plan.targets if target.place is not None or names[target.key] in found)
    more = sorted(found.keys() - set(names.values()))
    extra = [
        key for key in more if not is_no_weight(key, header["model_type"]) and not _is_tied(key, plan, names, found)
    ]
    return compared(map(due, is_weight), extra, _same_config(header, plan, str(folder / CONFIG)))


class Due(NamedTuple):
    """A tensor of the merge, and what it is in the other's files.

    fits         whether it is of the right shape, in a dtype that a weight has; None: it is missing
    compare      gives its difference, if the adapter changes it
    is_the_base  says whether it is the base's, if not
    """

    name: str
    fits: bool | None
    compare: Callable[[], tuple[Difference, Sums]] | None
    is_the_base: Callable[[], bool] = lambda: False


def compared(tensors: Iterable[Due], extra: list[str], same_config: bool) -> Comparison:
    """All tensors of a merge, one at a time; extra: what has no place in it."""
    sums = Sums()
    changed: list[Difference] = []
    altered: list[str] = []
    misshapen: list[str] = []
    missing: list[str] = []
    for one in tensors:
        if one.fits is None:
            missing.append(one.name)
        elif not one.fits:
            misshapen.append(one.name)
        elif one.compare is not None:
            found, its_sums = one.compare()
            changed.append(found)
            sums += its_sums
        elif not one.is_the_base():
            altered.append(one.name)
    return Comparison(changed, altered, misshapen, missing, extra, sums.scale, sums.aligned, same_config)


def _names(plan: Plan, found: Collection[str]) -> dict[str, str]:
    """The key of each target in a folder: the same, or newer names of a norm, or with the trunk's name or without."""
    names = {}
    for target in plan.targets:
        stem, _, kind = target.key.rpartition(".")
        newer = f"{stem}.{NEWER.get(kind, kind)}"
        names[target.key] = newer if newer in found and target.key not in found else target.key
    left = [key for key in names.values() if key not in found]
    first = {key.split(".")[0] for key in found}
    pairs = {("", name) for name in first} | {(key.split(".")[0], "") for key in left}
    away, to = max(sorted(pairs), key=lambda pair: sum(moved(key, *pair) in found for key in left), default=("", ""))
    for key, name in names.items():
        other = moved(name, away, to)
        if name not in found and other in found:
            names[key] = str(other)
    return names


def _is_tied(key: str, plan: Plan, names: Mapping[str, str], found: Mapping[str, Stored]) -> bool:
    """Whether a tensor that the merge has not is a copy of its token table: a head that is tied to it."""
    table = next((names[t.key] for t in plan.targets if is_table(t.key) and names[t.key] in found), None)
    return table is not None and is_head(key) and found[key].equals(found[table])


def _same_config(header: Mapping[str, Any], plan: Plan, where: str) -> bool:
    """Whether a folder's config.json says the merged model: all that we know of it, or where both say something."""
    if header["model_type"] == MODEL_TYPE:
        return plan.config is not None and read_own(header, where)[0] == plan.config
    about = {} if plan.about is None else plan.about
    if header["model_type"] in MODEL_TYPES and about.get("model_type") == header["model_type"]:
        try:
            return read_config(header, where) == read_config(about, where)
        except ValueError:  # of a kind that is not run
            pass
    return _agree(header, about)


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two objects have equal values under the keys of both, but for those that say nothing of a model."""
    return all(
        _agree(one[key], other[key])
        if isinstance(one[key], dict) and isinstance(other[key], dict)
        else one[key] == other[key]
        for key in one.keys() & other.keys() - set(NO_MODEL)
    )


def _same(target: Target, stored: Stored) -> bool:
    """Whether a tensor that nothing changes is the base's: to the byte, or in another dtype rounded once."""
    source = target.source
    assert source is not None
    if stored.dtype == source.dtype:
        return stored.equals(source)
    if source.dtype not in NAMES or stored.dtype not in NAMES:
        return False
    dtype = numpy_dtype(stored.dtype)
    return bool(np.array_equal(rounded(source.read_raw().astype(np.float64), dtype), stored.read_raw()))


def _difference(target: Target, stored: Stored, ulps: int) -> tuple[Difference, Sums]:
    """A merged tensor beside the sum, in the dtype of the folder's own file."""
    tensor = stored.read_raw()
    start = tensor if target.source is None else target.source.read_raw()
    return difference(stored.name, tensor.size, target.rows(tensor, start), ulps)


def difference(name: str, size: int, blocks: Iterable[Rows], ulps: int) -> tuple[Difference, Sums]:
    """A merged tensor of so many elements beside the sum, block by block, in its own dtype."""
    differing = beyond = wrong = not_finite = furthest = 0
    off = size_due = 0.0
    sums, near, instead = Sums(), Nearness(), Instead()
    updates: Sequence[Update] = ()
    dtype = np.dtype(np.float64)
    for rows in blocks:
        total, merged = rows.sum(), np.ascontiguousarray(rows.place)
        dtype = merged.dtype
        due = rounded(total, dtype)
        finite = np.isfinite(due) & np.isfinite(merged)
        not_finite += int(np.count_nonzero(~finite))
        steps = ulps_apart(merged, due)
        far = steps > ulps
        if rows.has_dora and steps.any():
            instead.add(rows, total)
            factor = row_factors(rows, total, merged.astype(np.float64), _epsilon(dtype) / 2)
            far &= ulps_apart(merged, rounded(factor * total, dtype)) > ulps
        furthest = max(furthest, int(steps.max(initial=0)))
        differing += int(np.count_nonzero(steps))
        off = max(off, _largest(merged, due, finite & (steps > 0)))
        size_due = max(size_due, _largest(due, np.zeros(1), finite))
        beyond += int(np.count_nonzero(far))
        if far.any():
            near_enough = abs(merged.astype(np.float64) - total) <= ulps * _allowed(rows, total)
            wrong += int(np.count_nonzero(far & ~near_enough))
        if rows.updates:
            updates = rows.updates
            with np.errstate(invalid="ignore", over="ignore"):  # of what is not finite nothing is concluded
                sums += sums_of(rows, total, due.astype(np.float64))
                if steps.any() and near.elements < SAMPLE:
                    near.add(rows, total)
    rounded_to, relative = near.rounding(dtype), min(off / size_due, LARGEST) if size_due else None
    is_dora = bool(updates) and updates[0].m is not None
    s, r = (updates[0].s, len(updates[0].A)) if len(updates) == 1 and not is_dora else (None, None)
    found = Difference(
        name, size, differing, furthest, off, relative, beyond, wrong, not_finite, sums.scale, sums.scale_error,
        sums.is_off or instead.is_sure, sums.aligned, sums.scale_turned, rounded_to, s, r, is_dora, instead.name,
    )  # fmt: skip
    return found, sums


def _largest(one: Array, other: Array, where: Array) -> float:
    """The largest |one - other| where asked, as float64; LARGEST where that overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        gaps = np.abs(one.astype(np.float64) - other.astype(np.float64))
    return min(float(gaps.max(initial=0.0, where=where)), LARGEST)


def _allowed(rows: Rows, total: Array) -> Array:
    """By how much an element may be off that was summed in the file's own dtype.

    A sum of r products and W0, in any order, each step of it rounded to that dtype (u = eps / 2), is off by no more
    than (r + 3) u (|W0| + |s| |B| |A|), to first order.
    """
    if rows.has_dora:
        return allowed(rows, total, _epsilon(rows.place.dtype) / 2)
    r = sum(len(update.A) for update in rows.updates)
    return (r + 3) * _epsilon(rows.place.dtype) / 2 * rows.size()


def _epsilon(dtype: np.dtype[np.generic]) -> float:
    """The distance from 1 to the next number."""
    one = np.ones(1, dtype)
    return float((one.view(f"u{dtype.itemsize}") + 1).astype(f"u{dtype.itemsize}").view(dtype)[0]) - 1.0


def worst(differences: Sequence[Difference]) -> Difference | None:
    """The tensor that is furthest off."""
    return max(differences, key=lambda one: (one.wrong, one.max_ulps, one.differing), default=None)
