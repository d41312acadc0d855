"""The adapter that is nearest to what a training of all weights changed: of each module, dW = tuned - base, by SVD.

It needs the names and shapes in two folders, not what the model computes. One module is held at a time.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...backend import Array, asnumpy, blocks, xp
from ...lora import nearest_update
from ..adapters.contents import Pair
from ..adapters.peft_config import ends_in
from ..adapters.peft_writer import config_of, write_peft
from ..adapters.prefix import likeliest_change, moved
from ..files.atomic import expect_new
from ..files.messages import nearest, shown
from ..files.rounding import NAMES
from ..models.shards import Stored
from .any_base import AnyBase, open_any_base
from .conv1d import is_conv1d
from .renamed import in_files
from .tied import is_head, is_table

TABLE = r"wpe|wte|tokens_embed|positions_embed|.*embed(ding|dings|_in|_tokens|_positions)?|relative_attention_bias"
NO_LINEAR = ("gate", "router")  # of mixtures of experts: PEFT adapts none of their routers


class Lost(NamedTuple):
    """A module of the adapter: its rank, |dW|, and |dW - s B A|, Frobenius norms, and their ratio."""

    name: str
    n_out: int
    n_in: int
    rank: int
    norm: float
    lost: float

    @property
    def share(self) -> float:
        return self.lost / self.norm if self.norm else 0.0


class LeftOut(NamedTuple):
    """A tensor that differs and is not in the adapter: why, and |dW| and |W0|, where these are numbers."""

    name: str
    reason: str
    norm: float | None = None
    norm_W0: float | None = None


class Extracted(NamedTuple):
    """What an extraction did. unchanged: how many tensors are the same in both."""

    modules: list[Lost]
    left_out: list[LeftOut]
    unchanged: int


def total_lost(modules: Collection[Lost]) -> tuple[float, float]:
    """|dW| and |dW - s B A| of all modules together."""
    return math.hypot(*(m.norm for m in modules)), math.hypot(*(m.lost for m in modules))


def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    rank: int,
    out: str | os.PathLike[str],
    targets: Collection[str] = (),
) -> Extracted:
    """Writes PEFT's folder of the nearest LoRA of at most `rank` (Eckart and Young 1936) to tuned - base, s = 1.

    dW and its SVD are float64, A and B float32. Adapted are matrices that differ, of modules that PEFT can adapt as
    linears (biases, norms, tables, experts, and what else differs, are named as left out), or only those whose names
    end in `targets`. A ValueError or FileNotFoundError says what is missing, damaged or NaN; a ValueError too if there
    is nothing to adapt.
    """
    folders, target = (Path(base), Path(tuned)), Path(out)
    if rank < 1:
        raise ValueError(f"--rank: expected at least 1, got {rank}")
    expect_new(target)
    for folder in folders:
        if target.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{target}: expected a folder outside of {folder}, which is not written into")
    start, end = (open_any_base(folder) for folder in folders)
    if start.model_type != end.model_type:
        raise ValueError(
            f"{folders[1]}: model_type: expected {shown(start.model_type)}, as {folders[0]} has it, got "
            f"{shown(end.model_type)}"
        )
    work = _Extraction(start, end, targets)
    pairs: dict[str, Pair] = {}
    lost: list[Lost] = []
    for name, dW in work.differing():
        update, S = nearest_update(xp.asarray(dW), rank)
        A, B = (asnumpy(factor).astype(np.float32) for factor in (update.A, update.B))
        if not (np.isfinite(A).all() and np.isfinite(B).all()):
            raise ValueError(f"{folders[1]}: {shown(name)}: what differs is too large for float32")
        pairs[name] = Pair(A, B, 1.0, len(A))
        n_out, n_in = dW.shape
        sizes = (float(np.linalg.norm(asnumpy(values))) for values in (S, S[rank:]))
        lost.append(Lost(name, n_out, n_in, len(A), *sizes))
    if not pairs:
        raise ValueError(_nothing(folders, work, targets))
    write_peft(target, config_of(pairs, **work.config(pairs)), {name: [pair] for name, pair in pairs.items()}, {}, {})
    return Extracted(lost, work.left_out, work.unchanged)


def _nothing(folders: tuple[Path, Path], work: _Extraction, targets: Collection[str]) -> str:
    if not work.left_out:
        return f"{folders[1]}: expected weights that differ from those of {folders[0]}, got the same in every tensor"
    first = work.left_out[0]
    asked = f" among {' '.join(map(shown, targets))}" if targets else ""
    return (
        f"{folders[1]}: no matrix that an adapter can hold differs from {folders[0]}{asked}; {len(work.left_out)} "
        f"other tensors do, as {shown(first.name)} ({first.reason})"
    )


class _Extraction:
    def __init__(self, base: AnyBase, tuned: AnyBase, targets: Collection[str]) -> None:
        self.base, self.tuned, self.targets = base, tuned, targets
        self.tensors, self.others = self._by_their_names(base.tensors), tuned.tensors
        for name in targets:
            if not any(ends_in(module, [name]) for module in tuned.modules):
                near = nearest(name, tuned.modules)
                raise ValueError(f"--targets: {shown(name)}: {tuned.folder} has no such module{near}")
        self.left_out: list[LeftOut] = []
        self.unchanged = 0

    def _by_their_names(self, tensors: Mapping[str, Stored]) -> Mapping[str, Stored]:
        """The base's tensors by the names that the tuned model has for them."""
        theirs = self.tuned.tensors
        if tensors.keys() & theirs.keys():
            return tensors
        change = likeliest_change(tensors, theirs.keys()) if tensors else None
        found = {moved(name, *change) or name: stored for name, stored in tensors.items()} if change else {}
        if not found.keys() & theirs.keys():
            first = shown(next(iter(tensors), "none"))
            raise ValueError(
                f"{self.tuned.folder}: expected tensors of {self.base.folder}, as {first}, got none of the same name"
            )
        return found

    def differing(self) -> Iterator[tuple[str, Array]]:
        """dW (out, in), float64, of each module that is to be adapted, and its name; notes what is left out."""
        for key, other in self.others.items():
            if key not in self.tensors:
                self._note_new(key, other)
                continue
            stored = self.tensors[key]
            if stored.equals(other):
                self.unchanged += 1
                continue
            if not {stored.dtype, other.dtype} <= NAMES.keys():
                self.left_out.append(LeftOut(key, f"kept in {other.dtype}, and {stored.dtype} in the base"))
                continue
            if stored.shape != other.shape:
                shapes = " x ".join(map(str, other.shape)), " x ".join(map(str, stored.shape))
                self.left_out.append(LeftOut(key, f"of shape {shapes[0]}, and {shapes[1]} in the base"))
                continue
            W0, dW = stored.read("float64"), other.read("float64")
            dW -= W0
            if not np.isfinite(dW).all():
                raise ValueError(f"{other}: what differs from the base is too large")
            if not dW.any():
                self.unchanged += 1
            elif (reason := self._reason(key, dW)) is not None:
                self.left_out.append(LeftOut(key, reason, _norm(dW), _norm(W0)))
            else:
                yield (
                    self._in_memory(key.removesuffix(".weight")),
                    dW.T if is_conv1d(key, self.tuned.model_type) else dW,
                )
        for key in self.tensors:
            if key not in self.others and key != self.base.tied.head:
                self.left_out.append(LeftOut(key, f"missing in {self.tuned.folder}"))

    def _note_new(self, key: str, other: Stored) -> None:
        """Notes a tensor that the base has not, or has as its table: what is no more than that is the same in both."""
        if key not in self.base.tied.copies and key != self.base.tied.head:
            self.left_out.append(LeftOut(key, "the base has no such tensor"))
            return
        table = self.others.get(str(self.base.tied.table))
        if table is None or not table.equals(other):
            self.left_out.append(LeftOut(key, "the base's is tied to the token table"))

    def _reason(self, key: str, dW: Array) -> str | None:
        """Why a tensor is left out; None if it is the weight of a module that is adapted."""
        module, _, part = key.rpartition(".")
        last = module.rpartition(".")[2]
        if dW.ndim != 2 or part != "weight":
            return "no matrix of a module"
        if is_table(key) or re.fullmatch(TABLE, last):
            return "a table"
        if is_head(key) and self.base.tied.head is not None:
            return "the base's is tied to the token table"
        if re.search(r"(^|\.)experts\.\d+\.", key):
            return "of experts, which PEFT has as one parameter"
        if self.targets and not ends_in(module, self.targets):
            return "not among --targets"
        if not self.targets and last in NO_LINEAR:
            return "of a router"
        return None

    def _in_memory(self, module: str) -> str:
        """The name of a module in memory, where its files have another."""
        return next(iter(in_files(module, self.tuned.model_type, back=True)), module)

    def config(self, pairs: Collection[str]) -> dict[str, Any]:
        """What the adapter's configuration says beside its modules."""
        names = {self._in_memory(module) for module in self.tuned.modules}
        # PEFT takes every module whose name ends in one of a list: where that is another too, an expression is exact.
        takes_more = any(name not in pairs and ends_in(name, pairs) for name in names)
        said = self.base.raw.get("_name_or_path")
        return {
            "fan_in_fan_out": any(is_conv1d(name, self.tuned.model_type) for name in pairs),
            "base_model_name_or_path": said if isinstance(said, str) and said else self.base.folder.resolve().name,
            **({"target_modules": "|".join(map(re.escape, sorted(pairs)))} if takes_more else {}),
        }


def _norm(values: Array) -> float:
    """The Frobenius norm, a part at a time: a copy of a whole table would be large."""
    norms, values = [], values.reshape(-1)
    for rows in blocks(len(values), 1):
        largest = float(np.abs(values[rows]).max(initial=0.0)) or 1.0
        norms.append(largest * float(np.linalg.norm(values[rows] / largest)))
    return math.hypot(*norms)
