"""What adapters change of a base's tensors, by name, whatever the architecture: W0 + s B A needs a name and a shape.

Transformers keeps the experts of a layer as one parameter (E, ...) in memory, and some files as E tensors. PEFT's A
(E r, in) and B (out, r E) of such a parameter are, for expert e, rows e r to (e + 1) r of A, and of B each E-th column
from e on: dW_e = s B[:, e::E] A[e r : (e + 1) r]. Its merge adds that to the (out, in) of the expert e, or its
transpose where the parameter is (E, in, out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ...adapter import Change
from ...backend import Array
from ...lora import Update
from ..adapters.contents import Contents, Pair
from ..files.messages import shown
from ..files.rounding import NAMES, numpy_dtype, rounded
from ..models.huggingface import Place
from ..models.shards import Stored
from .matching import change_of_prefix, moved, nearest, prefixes
from .renamed import in_files
from .tied import is_head, is_table, tied

Index: TypeAlias = int | slice
ALL = slice(None)
# What a layer's experts are in memory, and the tensors that some files keep of each expert, one below the other.
EXPERTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


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
    added    those that the base lacks: the tensor of it that each starts from
    unties   whether the head is tied to the table no more
    remarks  what is wrong with the adapters
    """

    tensors: dict[str, Changed]
    added: dict[str, str]
    unties: bool
    remarks: list[str]

    def config(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """config.json with what follows: a head that is tied no more, and the vocabulary's size where a table grew."""
        said: dict[str, Any] = {"tie_word_embeddings": False} if self.unties else {}
        for key, found in self.tensors.items():
            if is_table(key) and any(c.whole is not None for c in found.changes.values()):
                said["vocab_size"] = found.place.shape[0]
        result = {**raw, **{k: v for k, v in said.items() if k in raw or k == "tie_word_embeddings"}}
        text = raw.get("text_config")
        if isinstance(text, dict) and said:
            result["text_config"] = {**text, **said}
        return result


def changes_of(
    folder: Path,
    raw: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    adapters: Sequence[Contents],
    weights: Sequence[float],
) -> Changes:
    """What adapters, each times its weight, change of a base's tensors; a ValueError names what does not fit."""
    merge = _Merge(folder, raw, tensors)
    for adapter, weight in zip(adapters, weights, strict=True):
        merge.add(adapter, weight)
    merge.untie()
    return Changes(merge.changed, merge.added, merge.unties, merge.remarks)


def base_keys(folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, Stored], adapter: Contents) -> dict[str, str]:
    """The key of the base's tensor that each module of an adapter changes; a tied head's is the token table's."""
    merge = _Merge(folder, raw, tensors)
    names = {name: f"{found}.weight" for name, found in merge.names(adapter).items()}
    return {name: key if key in tensors else str(merge.table) for name, key in names.items()}


class _Merge:
    def __init__(self, folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
        self.folder, self.raw, self.tensors = folder, raw, tensors
        self.modules = prefixes(tensors)
        self.changed: dict[str, Changed] = {}
        self.added: dict[str, str] = {}
        self.remarks: list[str] = []
        self.unties = False
        self.whole_of: Path | None = None
        self.by_rows: set[str] = set()  # tables of which rows are trained, which stand for a tied head too
        self.table, self.head, self.copies = tied(raw, tensors)

    def add(self, adapter: Contents, weight: float) -> None:
        names = self.names(adapter)
        self.remarks += [f"{adapter.path}: {line}" for line in adapter.remarks]
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
                    self._add_experts(names[name], pair, pairs, where)
                if pair.bias is not None:
                    self._add_bias(f"{names[name]}.bias", pair, where)

    # --- Names -----------------------------------------------------------------------------------------------------

    def names(self, adapter: Contents) -> dict[str, str]:
        """The base's name of each module of the adapter, and of each of its whole tensors."""
        modules = [*adapter.pairs, *adapter.rows]
        names = {name: found for name in modules if (found := self._known(name)) is not None}
        names |= {name: found for name in adapter.whole if (found := self._known_tensor(name)) is not None}
        unknown = [name for name in modules if name not in names]
        pair = ("", "")
        if unknown:
            change = change_of_prefix(unknown, self.modules)
            if change is None:
                raise ValueError(
                    f"{adapter.path}: {shown(unknown[0])}: expected a module of {self.folder}, which has none of this "
                    f"name{nearest(unknown[0], self.modules)}"
                )
            pair = change
            names |= {name: str(moved(name, *pair)) for name in unknown}
            if not self._is_trunk(pair, adapter):
                self.remarks.append(
                    f"{adapter.path}: {len(unknown)} modules begin with {shown(pair[0] or 'nothing')}, where "
                    f"{self.folder} has {shown(pair[1] or 'nothing')}: {shown(unknown[0])}, "
                    f"merged as {shown(names[unknown[0]])}"
                )
        for name in adapter.whole:
            if name not in names:
                other = moved(name, *pair) if unknown else None
                names[name] = other if other is not None and other in self.tensors else name
                if names[name] not in self.tensors:
                    raise ValueError(
                        f"{adapter.path}: {shown(name)}: expected a tensor of {self.folder}, which has none of this "
                        f"name{nearest(name, self.tensors)}"
                    )
        return names

    def _known(self, name: str) -> str | None:
        """The base's name of a module that it has under this name, or under transformers' own for its files."""
        names = (name, *in_files(name, str(self.raw.get("model_type"))))
        return next((one for one in names if one in self.modules or f"{one}.weight" in self.copies), None)

    def _known_tensor(self, name: str) -> str | None:
        """The same of a tensor."""
        names = (name, *in_files(name, str(self.raw.get("model_type"))))
        return next((one for one in names if one in self.tensors or one in self.copies), None)

    def _is_trunk(self, pair: tuple[str, str], adapter: Contents) -> bool:
        """Whether the prefixes differ as a model and the same with a head do in transformers."""
        classes = self.raw.get("architectures")
        of_base = str(classes[0]) if isinstance(classes, list) and classes else "Model"
        mapping = adapter.raw.get("auto_mapping")
        of_adapter = str(mapping.get("base_model_class", "")) if isinstance(mapping, dict) else ""
        if pair[1] == "":
            return of_base.endswith("Model") and not of_base.endswith("LMHeadModel")
        return pair[0] == "" and (
            adapter.raw.get("task_type") == "FEATURE_EXTRACTION"
            or (of_adapter.endswith("Model") and "LMHead" not in of_adapter)
        )

    # --- What is changed -------------------------------------------------------------------------------------------

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

    def _update(self, key: str, name: str, index: Index, turned: bool, update: Update) -> None:
        """One more update of a part of a tensor, which is turned if it is stored (in, out)."""
        found = self.changed[key]
        if found.turned is not None and found.turned != turned:
            raise ValueError(f"{shown(key)}: expected all adapters to say alike whether it is stored (in, out)")
        found.turned = turned
        found.place = found.place._replace(transposed=turned, parts={**found.place.parts, name: index})  # type: ignore[dict-item]
        before = found.changes.get(name, Change(name, None, ()))
        if turned and before.whole is not None and not before.updates:
            before = before._replace(whole=before.whole.T)
        found.changes[name] = before._replace(updates=(*before.updates, update))

    def _add_matrix(self, key: str, pair: Pair, adapter: Contents, where: str) -> None:
        """An update of a module's weight (out, in); Conv1D's is stored (in, out), a square one if it is said so."""
        source, _ = self._start(key, where)
        shape = self.changed[key].place.shape
        A, B = (pair.B.T, pair.A.T) if pair.is_look_up else (pair.A, pair.B)  # a table is (V, D)
        n_out, n_in = len(B), A.shape[1]
        if shape not in ((n_out, n_in), (n_in, n_out)):
            raise ValueError(
                f"{where}: expected a module of {self.folder} of shape ({n_out}, {n_in}), there it is {shape}"
            )
        turned = shape != (n_out, n_in) or (n_out == n_in and not pair.is_look_up and _turns(adapter, source))
        self._update(key, key, ALL, turned, Update(A, B, pair.s))

    def _add_bias(self, key: str, pair: Pair, where: str) -> None:
        """What B's bias adds to the module's own: a matrix of one column."""
        assert pair.bias is not None
        if key not in self.tensors:
            raise ValueError(f"{where}: lora_bias: {self.folder} has no bias there to add it to")
        source, _ = self._start(key, where)
        if source.shape != pair.bias.shape:
            raise ValueError(f"{where}: lora_bias: expected shape {source.shape}, got {pair.bias.shape}")
        self._update(key, key, ALL, False, Update(np.ones((1, 1)), pair.bias[:, None], pair.s))

    def _add_experts(self, module: str, pair: Pair, pairs: Sequence[Pair], where: str) -> None:
        """An update of one parameter of all experts of a layer: the one whose shape it has."""
        fitting = [
            (name, stacks, turned)
            for name, stacks in self._parameters(module)
            for turned in (False, True)
            if _fits(stacks, turned, pair)
        ]
        if len({name for name, *_ in fitting}) > 1 or not fitting:
            raise ValueError(
                f"{where}: expected A (E r, in) and B (out, E r) of one parameter of {self.folder}, got A "
                f"{pair.A.shape} and B {pair.B.shape}, which {'several' if fitting else 'none'} of {shown(module)} has"
            )
        _, stacks, turned = fitting[0]
        if len(fitting) > 1:
            turned = self._experts_are_turned(module, where)
        E = len(stacks) if stacks[0][0].shape[1:2] and len(stacks[0][0].shape) == 2 else stacks[0][0].shape[0]
        r = len(pair.A) // E
        if r != pair.r:
            raise ValueError(f"{where}: expected A of {E} experts of rank {pair.r}, as the patterns say, got {r}")
        for e in range(E):
            A, B = pair.A[e * r : (e + 1) * r], pair.B[:, e::E]
            pieces = stacks[e] if len(stacks) == E and len(stacks[0][0].shape) == 2 else stacks[0]
            start = 0
            for piece in pieces:
                key = piece.name
                self._start(key, where)
                if len(piece.shape) == 3:
                    self._update(key, f"{key}[{e}]", e, turned, Update(A, B, pair.s))
                else:
                    self._update(key, key, ALL, False, Update(A, B[start : start + piece.shape[0]], pair.s))
                    start += piece.shape[0]

    def _parameters(self, module: str) -> list[tuple[str, list[list[Stored]]]]:
        """The parameters of a layer's experts: a tensor (E, ...), or for each expert its own, one below the other."""
        found = []
        for name, splits in EXPERTS.items():
            if f"{module}.{name}" in self.tensors:
                found.append((name, [[self.tensors[f"{module}.{name}"]]]))
            for parts in splits:
                stacks: list[list[Stored]] = []
                while all(f"{module}.{len(stacks)}.{part}.weight" in self.tensors for part in parts):
                    stacks.append([self.tensors[f"{module}.{len(stacks)}.{part}.weight"] for part in parts])
                if stacks:
                    found.append((name, stacks))
        return found

    def _experts_are_turned(self, module: str, where: str) -> bool:
        """Whether experts are (E, in, out): gate_up_proj is twice as long in the axis of its outputs."""
        both = [self.tensors.get(f"{module}.{name}") for name in EXPERTS]
        if None not in both:
            (_, a, b), (_, c, d) = (one.shape for one in both if one is not None)
            if (a == 2 * d) != (b == 2 * c):
                return b == 2 * c
        raise ValueError(f"{where}: the shapes do not say whether experts are stored (out, in) or (in, out)")

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

    # --- Tied heads ------------------------------------------------------------------------------------------------

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


def _turns(adapter: Contents, source: Stored) -> bool:
    """Whether a square matrix is stored (in, out): the configuration says it."""
    return adapter.raw.get("fan_in_fan_out") is True and len(source.shape) == 2


def _fits(stacks: list[list[Stored]], turned: bool, pair: Pair) -> bool:
    first = stacks[0][0]
    if len(first.shape) == 3:
        E, n_out, n_in = first.shape
        n_out, n_in = (n_in, n_out) if turned else (n_out, n_in)
    else:
        E, n_out, n_in = len(stacks), sum(piece.shape[0] for piece in stacks[0]), first.shape[1]
        if turned:
            return False
    return pair.A.shape[1] == n_in and len(pair.B) == n_out and len(pair.A) % E == 0


def _alike(table: Changed, head: Changed) -> bool:
    """Whether a table and the head that was tied to it are changed alike."""
    (one,), (other,) = table.changes.values(), head.changes.values()
    wholes = [change.whole for change in (one, other)]
    if (wholes[0] is None) != (wholes[1] is None) or len(one.updates) != len(other.updates):
        return False
    same = wholes[0] is None or np.array_equal(wholes[0], wholes[1])  # type: ignore[arg-type]
    return same and all(
        a.s == b.s and np.array_equal(a.A, b.A) and np.array_equal(a.B, b.B)
        for a, b in zip(one.updates, other.updates, strict=True)
    )
