"""What adapters change of a base's tensors, by name, whatever the architecture: W0 + s B A needs a name and a shape.

DoRA's (m / c) (W0 + s B A) needs no more (L10).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...adapter import Change, check_alone
from ...backend import Array
from ...lora import Update
from ..adapters.contents import Contents, Pair
from ..files.messages import shown
from ..files.rounding import NAMES, numpy_dtype, rounded
from ..models.huggingface import Place
from ..models.shards import Stored
from .any_base import AnyBase
from .config import untied
from .conv1d import is_conv1d
from .experts import ALL, Index, find_experts
from .matching import base_names, remarks_on
from .tied import is_head, is_table


@dataclass
class Changed:
    """A tensor of the merged model: where its weights stand in it, and how each is made."""

    place: Place
    changes: dict[str, Change] = field(default_factory=dict)
    turned: bool | None = None  # whether it is stored (in, out), once it is known


@dataclass
class Changes:
    """What adapters change.

    tensors  by their keys
    added    those that the base lacks: the tensor of it that each starts from, or has its dtype of
    unties   whether the head is tied to the table no more
    remarks  what is wrong with the adapters
    """

    tensors: dict[str, Changed]
    added: dict[str, str]
    unties: bool
    remarks: list[str]

    def config(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """config.json with what follows: a head that is tied no more, and the vocabulary's size where a table grew."""
        said: dict[str, Any] = {}
        for key, found in self.tensors.items():
            if is_table(key) and any(c.whole is not None for c in found.changes.values()):
                said["vocab_size"] = found.place.shape[0]
        said |= untied(raw) if self.unties else {}
        result = {**raw, **{k: v for k, v in said.items() if k in raw or k != "vocab_size"}}
        text = raw.get("text_config")
        if isinstance(text, dict) and said:
            result["text_config"] = {**text, **said}
        return result


def changes_of(base: AnyBase, adapters: Sequence[Contents], weights: Sequence[float]) -> Changes:
    """What adapters, each times its weight, change of a base's tensors; a ValueError names what does not fit."""
    check_alone((adapter.has_dora for adapter in adapters), weights)
    merge = _Merge(base)
    for adapter, weight in zip(adapters, weights, strict=True):
        merge.add(adapter, weight)
    merge.untie()
    return Changes(merge.changed, merge.added, merge.unties, merge.remarks)


class _Merge:
    def __init__(self, base: AnyBase) -> None:
        self.folder, self.tensors = base.folder, base.tensors
        self.base = base
        self.changed: dict[str, Changed] = {}
        self.added: dict[str, str] = {}
        self.remarks: list[str] = []
        self.unties = False
        self.whole_of: Path | None = None
        self.by_rows: set[str] = set()  # tables of which rows are trained, which stand for a tied head too
        self.table, self.head, self.copies = base.tied

    def add(self, adapter: Contents, weight: float) -> None:
        names, remarks = base_names(self.base, adapter)
        said = [*adapter.remarks, *remarks_on(self.base, adapter, names)]
        self.remarks += [*remarks, *(f"{adapter.path}: {line}" for line in said)]
        has_whole = bool(adapter.rows) or any(
            not self._is_copy(self.copies.get(names[name], names[name]), value) for name, value in adapter.whole.items()
        )
        if has_whole and (self.whole_of is not None or weight != 1):
            what = "another" if self.whole_of is not None else f"weight {weight:g}"
            raise ValueError(
                f"merge: {adapter.path}: it has tensors that are trained whole, which cannot be weighted or summed: "
                f"expected one such adapter, of weight 1, got {what}"
            )
        self.whole_of = adapter.path if has_whole else self.whole_of
        for name, value in adapter.whole.items():
            self._replace(names[name], value, f"{adapter.path}: {shown(name)}")
        for name, (numbers, values) in adapter.rows.items():
            self._set_rows(names[name], numbers, values, f"{adapter.path}: {shown(name)}")
        for name, pairs in adapter.pairs.items():
            where = f"{adapter.path}: {shown(name)}"
            for pair in pairs:
                pair = pair._replace(s=weight * pair.s)
                if any(f"{names[name]}.weight" in found for found in (self.tensors, self.copies)):
                    self._add_matrix(f"{names[name]}.weight", pair, adapter, where)
                else:
                    self._add_experts(names[name], pair, where)
                if pair.bias is not None:
                    self._add_bias(f"{names[name]}.bias", pair, where)

    def _start(self, key: str, where: str) -> tuple[Stored, Changed]:
        """The base's tensor that a key begins as, and what is changed of it."""
        source = self.tensors[self.copies.get(key, key)]
        if source.dtype not in NAMES:
            raise ValueError(
                f"{where}: {source}: kept in {source.dtype}: the merged weights would have to be rounded to that anew, "
                f"which loses what the adapter learned; expected one of {' '.join(NAMES)}"
            )
        if key in self.copies:
            self.added[key] = self.copies[key]
        if key not in self.changed:
            self.changed[key] = Changed(Place(source.shape, False, {}))
        return source, self.changed[key]

    def _update(self, key: str, name: str, index: Index, turned: bool, update: Update, axis: int = 1) -> None:
        """One more update of a part of a tensor, which is turned if it is stored (in, out); axis: as in `Change`."""
        found = self.changed[key]
        if found.turned is not None and found.turned != turned:
            raise ValueError(f"{shown(key)}: expected all adapters to say alike whether it is stored (in, out)")
        found.turned = turned
        found.place = found.place._replace(transposed=turned, parts={**found.place.parts, name: index})  # type: ignore[dict-item]
        before = found.changes.get(name, Change(name, None, ()))
        if turned and before.whole is not None and not before.updates:
            before = before._replace(whole=before.whole.T)
        found.changes[name] = before._replace(updates=(*before.updates, update), axis=axis)

    def _add_matrix(self, key: str, pair: Pair, adapter: Contents, where: str) -> None:
        """An update of a module's weight (out, in); Conv1D's is stored (in, out)."""
        self._start(key, where)
        shape = self.changed[key].place.shape
        A, B = (pair.B.T, pair.A.T) if pair.is_look_up else (pair.A, pair.B)  # a table is (V, D)
        n_out, n_in = len(B), A.shape[1]
        if shape not in ((n_out, n_in), (n_in, n_out)):
            raise ValueError(
                f"{where}: expected a module of {self.folder} of shape ({n_out}, {n_in}), there it is {shape}"
            )
        said = adapter.raw.get("fan_in_fan_out") is True
        turned = shape != (n_out, n_in) or (
            n_out == n_in and not pair.is_look_up and is_conv1d(key, self.base.model_type, said)
        )
        self._update(key, key, ALL, turned, Update(A, B, pair.s, m=pair.m), axis=0 if pair.is_look_up else 1)

    def _add_bias(self, key: str, pair: Pair, where: str) -> None:
        """What B's bias adds to the module's own: a matrix of one column."""
        assert pair.bias is not None
        if key not in self.tensors:
            raise ValueError(f"{where}: lora_bias: {self.folder} has no bias there to add it to")
        source, _ = self._start(key, where)
        if source.shape != pair.bias.shape:
            raise ValueError(f"{where}: lora_bias: expected shape {source.shape}, got {pair.bias.shape}")
        self._update(key, key, ALL, False, Update(np.ones((1, 1)), pair.bias[:, None], pair.s))

    def _add_experts(self, module: str, pair: Pair, where: str) -> None:
        """An update of one parameter of all experts of a layer: the one whose shape it has."""
        if pair.m is not None:
            raise ValueError(f"{where}: DoRA of experts is not supported, in PEFT neither")
        experts, turned = find_experts(self.tensors, module, pair, where)
        for piece, update in experts.updates(pair):
            key = piece.stored.name
            self._start(key, where)
            part = f"{key}[{piece.place}]" if experts.is_one else key
            self._update(key, part, piece.place, turned, update)

    def _is_copy(self, key: str, value: Array) -> bool:
        """Whether a tensor is the base's own, which PEFT saves beside an adapted table."""
        stored = self.tensors.get(key)
        return (
            stored is not None
            and stored.shape == value.shape
            and np.array_equal(stored.read_raw().astype(np.float64), value.astype(np.float64))
        )

    def _replace(self, key: str, value: Array, where: str) -> None:
        """A tensor that is trained whole, in the place of the base's."""
        if self._is_copy(self.copies.get(key, key), value):
            return
        if key in self.base.brought:
            self.added[key] = next(k for k in (self.table, *self.tensors) if k and self.tensors[k].dtype in NAMES)
            self.changed[key] = Changed(Place(value.shape, False, {key: ALL}), {key: Change(key, value, ())})
            return
        source, found = self._start(key, where)
        if value.shape != source.shape and not (
            (is_table(key) or is_head(key)) and value.shape[1:] == source.shape[1:]
        ):
            raise ValueError(f"{where}: expected shape {source.shape}, as {self.folder} has it, got {value.shape}")
        found.place = Place(value.shape, False, {key: ALL})
        found.changes[key] = Change(key, value, ())

    def _set_rows(self, module: str, numbers: list[int], values: Array, where: str) -> None:
        """Rows of a table that are trained, in the place of the base's."""
        key = f"{module}.weight"
        source, found = self._start(key, where)
        given = found.changes[key].whole if key in found.changes else None
        table = source.read_raw() if given is None else rounded(given.astype(np.float64), numpy_dtype(source.dtype))
        if values.shape[1:] != table.shape[1:] or max(numbers, default=0) >= len(table):
            raise ValueError(f"{where}: expected rows of a table {table.shape}, got {values.shape}")
        table[numbers] = rounded(values.astype(np.float64), table.dtype)
        found.place = found.place._replace(parts={key: ALL})
        found.changes[key] = Change(key, table, ())
        self.by_rows.add(key)

    def untie(self) -> None:
        """A head that was tied to the table is one of its own, unless both are changed alike, or rows of the table."""
        if self.head is None:
            return
        table, head = (self.changed.get(str(key)) for key in (self.table, self.head))
        if table is not None and head is not None:
            self.unties = not _alike(table, head)
        elif table is not None:
            is_shared = self.table in self.by_rows or table.place.shape != self.tensors[str(self.table)].shape
            self.unties = not is_shared
        else:
            self.unties = head is not None
        for copy, source in self.copies.items():
            if copy in self.changed and source in self.changed and _alike(self.changed[source], self.changed[copy]):
                del self.changed[copy], self.added[copy]
        self.unties |= any(key in self.added for key in self.copies)
        if not self.unties:
            return
        if self.head in self.tensors and not self._is_copy(self.head, self.tensors[str(self.table)].read_raw()):
            raise ValueError(f"{self.tensors[self.head]}: said to be tied to the token table, but it differs")
        for copy, source in self.copies.items():
            if copy not in self.added:
                self.added[copy] = source
                same = None if copy == self.head else self.changed.get(source)  # the head's bias is its source still
                self.changed[copy] = same or Changed(Place(self.tensors[source].shape, False, {}))


def _alike(table: Changed, head: Changed) -> bool:
    """Whether a table and the head that was tied to it are changed alike."""
    (one,), (other,) = table.changes.values(), head.changes.values()
    wholes = [change.whole for change in (one, other)]
    if (wholes[0] is None) != (wholes[1] is None) or len(one.updates) != len(other.updates):
        return False
    same = wholes[0] is None or np.array_equal(wholes[0], wholes[1])  # type: ignore[arg-type]
    return same and all(
        a.s == b.s and np.array_equal(a.A, b.A) and np.array_equal(a.B, b.B) and a.m is None and b.m is None
        for a, b in zip(one.updates, other.updates, strict=True)
    )
