"""Base and adapters as one model, a tensor at a time: what each tensor of the merged model's files is made of (L5).

What no adapter touches is the base's bytes. The rest is W0 + sum_i w_i s_i B_i A_i, summed in float64 a few rows at a
time and rounded once to the file's dtype, in the place of W0's own copy: one tensor is held, and A and B.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ...adapter import Adapter, Change, merge_plan
from ...backend import Array, asnumpy, blocks, xp
from ...lora import Update, merge_matrix
from ...model import Config
from ..adapters.adapter import load_adapter
from ..adapters.contents import Contents, read_contents
from ..adapters.head import MODULES, label_names
from ..adapters.peft import records_base
from ..files.rounding import NAMES, numpy_dtype, rounded
from ..files.safetensors_file import Header
from ..files.safetensors_writer import new_header
from ..models.folder import MODEL_TYPE, read_any_header
from ..models.heads import taken
from ..models.huggingface import MODEL_TYPES, Place, is_no_weight
from ..models.names import family_of
from ..models.shards import WEIGHTS, Stored, stored_tensors
from .base import Opened, check_complete, open_base
from .by_name import Changed, changes_of
from .config import merged_config


class Rows(NamedTuple):
    """Some rows of one weight: their place in a tensor, W0 there (float64, a copy), and its updates."""

    place: Array
    W0: Array
    updates: list[Update]

    def sum(self) -> Array:
        """W0 + sum_i w_i s_i B_i A_i, float64; a bias or a norm has no updates."""
        return asnumpy(merge_matrix(xp.asarray(self.W0), *self.updates)) if self.updates else self.W0

    def size(self) -> Array:
        """|W0| + sum_i |w_i s_i| |B_i| |A_i|: what the rounding of that sum is measured by."""
        absolute = [u._replace(A=abs(u.A), B=abs(u.B), s=abs(u.s)) for u in self.updates]
        return Rows(self.place, abs(self.W0), absolute).sum()


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
            factors = [u._replace(A=_wide(u.A), B=_wide(u.B)) for u in change.updates]
            for rows in blocks(len(W), math.prod(W.shape[1:])):
                yield Rows(W[rows], W0[rows].astype(np.float64), [u._replace(B=u.B[rows]) for u in factors])

    def parts_bytes(self) -> Iterator[bytes | memoryview]:
        """Its bytes, a part at a time where they are the base's; a ValueError if a weight is NaN or infinite."""
        if self.kept is None:
            yield np.ascontiguousarray(self.values()).reshape(-1).view(np.uint8).data
            return
        for part in self.kept.parts():
            if self.place is not None and not np.isfinite(np.frombuffer(part, numpy_dtype(self.dtype))).all():
                raise ValueError(f"{self.kept}: holds NaN or infinite numbers")
            yield part


def _wide(values: Array) -> Array:
    """A factor in float64, where it is computed with; a file's bfloat16 is widened on the host."""
    return xp.asarray(asnumpy(values).astype(np.float64))


Scale: TypeAlias = tuple[float, int, bool]


@dataclass(frozen=True, eq=False)
class Plan:
    """A merge: the base, and the merged model's tensors by the base's files.

    folder, raw  the base's folder, and its config.json
    config       the merged model's, where it can be run; None: it is known by its tensors' names alone
    about        the merged model's config.json; None: it is one of our own, which says its weights' hash
    scales       s, r, and whether s is alpha / sqrt(r), of all adapted modules
    remarks      what is wrong with the adapters, though they can be merged
    """

    folder: Path
    raw: Mapping[str, Any]
    config: Config | None
    about: Mapping[str, Any] | None
    headers: Mapping[Path, Header]
    files: Mapping[Path, Sequence[Target]]
    scales: Collection[Scale]
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
        )

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


def check_weights(n: int, weights: Sequence[float], what: str = "merge") -> None:
    """A ValueError unless there is a finite weight for each of n adapters."""
    if not n or n != len(weights):
        raise ValueError(f"{what}: expected a weight for each adapter, got {n} and {len(weights)}")
    if not all(math.isfinite(w) for w in weights):
        raise ValueError(f"{what}: expected finite weights, got {' '.join(map(str, weights))}")


def plan_merge(base_path: Path, adapter_paths: Sequence[Path], weights: Sequence[float]) -> Plan:
    """Reads adapters, without the base's weights, and says what each tensor of the merged model is.

    What PEFT wrote is merged by its modules' names, whatever the architecture; what tells our own names, or brings
    another head, onto a model that can be run. A ValueError or FileNotFoundError, in one line, says what does not fit.
    """
    check_weights(len(adapter_paths), weights)
    by_name = _by_name(base_path, adapter_paths)
    return _plan_by_name(base_path, *by_name, weights) if by_name else _plan_run(base_path, adapter_paths, weights)


def _by_name(
    base_path: Path, paths: Sequence[Path]
) -> tuple[Mapping[str, Any], dict[str, Stored], list[Contents]] | None:
    """The base's config.json and tensors, and the adapters, where all are to be merged by name."""
    if base_path.suffix.lower() == ".gguf" or not all(path.is_dir() and not records_base(path) for path in paths):
        return None
    raw = read_any_header(base_path)
    if raw["model_type"] == MODEL_TYPE:
        return None
    adapters, tensors = [read_contents(path) for path in paths], stored_tensors(base_path)
    if raw["model_type"] in MODEL_TYPES and any(_brings_head(adapter, tensors) for adapter in adapters):
        return None
    return raw, tensors, adapters


def _brings_head(adapter: Contents, tensors: Mapping[str, Stored]) -> bool:
    """Whether it has the whole of a head that the base has not."""
    return any(name.rpartition(".")[0] in MODULES and name not in tensors for name in adapter.whole)


def _plan_by_name(
    folder: Path,
    raw: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    adapters: Sequence[Contents],
    weights: Sequence[float],
) -> Plan:
    changes = changes_of(folder, raw, tensors, adapters, weights)
    headers = {stored.path: stored.file.header for stored in tensors.values()}
    files: dict[Path, list[Target]] = {
        path: [
            _by_name_target(key, tensors[key], changes.tensors.get(key), raw["model_type"]) for key in header.tensors
        ]
        for path, header in headers.items()
    }
    for key, source in changes.added.items():
        files[tensors[source].path].append(
            _by_name_target(key, tensors[source], changes.tensors[key], raw["model_type"])
        )
    scales = {
        (pair.s, pair.r, bool(adapter.raw.get("use_rslora")))
        for adapter in adapters
        for pairs in adapter.pairs.values()
        for pair in pairs
    }
    return Plan(folder, raw, None, changes.config(raw), headers, files, scales, changes.remarks)


def _by_name_target(key: str, source: Stored, changed: Changed | None, model_type: str) -> Target:
    if changed is None or not changed.changes:
        is_weight = source.dtype in NAMES and not is_no_weight(key, model_type)
        place = Place(source.shape, False, {key: slice(None)}) if is_weight else None
        return Target(key, source.shape, source.dtype, source, place, {})
    is_whole = all(change.whole is not None for change in changed.changes.values())
    return Target(key, changed.place.shape, source.dtype, None if is_whole else source, changed.place, changed.changes)


def _plan_run(base_path: Path, adapter_paths: Sequence[Path], weights: Sequence[float]) -> Plan:
    base = open_base(base_path, adapter_paths)
    adapters = [load_adapter(path, base) for path in adapter_paths]
    check_complete(base, adapters)
    config, changes = merge_plan(base.config, adapters, weights)
    headers = {stored.path: stored.file.header for stored in base.files.tensors.values()}
    labels = next((found for path in adapter_paths if (found := label_names(path, config)) is not None), None)
    about = None if base.is_own else merged_config(base.raw, base.files.saved, config, labels)
    scales = set().union(*map(scales_of, adapters))
    return Plan(base.folder, base.raw, config, about, headers, _targets(base, config, changes, headers), scales)


def scales_of(adapter: Adapter) -> set[Scale]:
    """The scales of an adapter's matrices."""
    config = adapter.config
    return {(config.scale(name), config.rank(name), config.rslora) for name in adapter.matrices}


def _targets(
    base: Opened, config: Config, changes: Mapping[str, Change], headers: Mapping[Path, Header]
) -> dict[Path, list[Target]]:
    """The merged tensors, in the order of the base's files, and behind them those that the base lacks."""
    tensors, saved = base.files.tensors, base.files.saved
    table = next(tensors[key] for key, place in base.files.own.items() if "embed.tokens" in place.parts)
    wanted = base.places(config, in_trunk=base.files.in_trunk)
    added = [key for key in wanted if key not in tensors]
    prefix = _prefix(base, config) if added else ""
    heads = tuple(f"{module}." for module in family_of(config).heads.get(config.head, {}).values())
    other_head = (saved.head, saved.n_labels) != (config.head, config.n_labels)
    usable = set(taken(saved, config))

    def target(key: str, source: Stored | None) -> Target:
        name = key if key.startswith(heads) else prefix + key
        if key not in wanted:
            assert source is not None
            return Target(name, source.shape, source.dtype, source, None, {})
        place, dtype = wanted[key], (source or table).dtype
        made = {part: changes[part] for part in place.parts if part in changes and _makes(changes[part])}
        all_whole = all(part in made and made[part].whole is not None for part in place.parts)
        return Target(name, place.shape, dtype, None if all_whole else source, place, made)

    files: dict[Path, list[Target]] = {}
    for path, header in headers.items():
        keys = [key for key in header.tensors if key in wanted or not other_head]  # another head's have no place here
        files[path] = [target(key, tensors[key] if _has(wanted.get(key), usable) else None) for key in keys]
    # What is added is an adapter's own, or a head that is tied no more: it starts as the token table.
    files[path] += [target(key, table if "head.weight" in wanted[key].parts else None) for key in added]
    return files


def _has(place: Place | None, usable: set[str]) -> bool:
    """Whether the base's tensor is of use in this place: not if it is another head's."""
    return place is None or usable.issuperset(place.parts)


def _makes(change: Change) -> bool:
    """Whether a change makes anything of its own: a head that is only untied is a copy."""
    return change.whole is not None or bool(change.updates)


def _prefix(base: Opened, config: Config) -> str:
    """The trunk's name where transformers puts one and the base's files do not, as beside a new head."""
    trunk = family_of(config).trunk
    return f"{trunk}." if trunk and not base.files.in_trunk and config.head != "none" else ""
