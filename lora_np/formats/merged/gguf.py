"""A GGUF file with adapters merged into it: the base's bytes, but for the tensors that are adapted.

A tensor in F32, F16 or BF16 becomes W0 + sum_i w_i s_i B_i A_i, or with DoRA (m / c) (W0 + s B A), in float64 and
rounded once to its own type, in its own place. A quantised one would have to be quantised anew, which loses what the
adapter learned: it is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...adapter import check_alone, matrix_updates
from ...backend import Array, asnumpy
from ...lora import Update
from ...model import Config
from ..adapters.adapter import kind_of, load_adapter
from ..adapters.contents import read_contents
from ..adapters.gguf import in_pairs, read_updates, tensor_name
from ..adapters.gguf_names import naming_in
from ..adapters.head import brought_by
from ..files.atomic import new_file
from ..files.messages import shown
from ..files.rounding import NAMES, numpy_dtype, rounded
from ..models.gguf import NAMES as TENSORS
from ..models.gguf import check_one_file, is_run, lazy_weights, open_model
from ..models.gguf_architectures import ARCHITECTURES
from ..models.gguf_file import TENSOR_TYPES, GGUFFile, Tensor, aligned, open_gguf, tensor_entry, with_count
from .gguf_by_name import updates_by_name
from .target import summed

TABLE, HEAD = TENSORS["embed.tokens"], TENSORS["head.weight"]
HEADLESS = ("bert",)  # architectures without one


class MergedFile(NamedTuple):
    """What a merge did: how many tensors it made, and how many are the base's bytes."""

    made: int
    kept: int


@dataclass(frozen=True, eq=False)
class _Opened:
    """A base (see `Base`) in a GGUF file."""

    config: Config
    weights: Mapping[str, Array]
    dtype: np.dtype[Any]


def merge_gguf(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    weights: Sequence[float],
    out: str | os.PathLike[str],
) -> MergedFile:
    """L5: writes a .gguf base with adapters merged into it, W0 + sum_i w_i s_i B_i A_i, as a new .gguf file.

    Adapters in .gguf fit a base of any architecture, by the names of its tensors; others one that is run here, and
    PEFT's those of which the modules' names are known. Version, metadata, alignment, order, and what no adapter touches
    keep their bytes. An update of the token table or of the head unties the two where they were one: output.weight
    comes behind the other tensors. No more is held than one tensor and the adapters. A FileExistsError if there is
    anything at `out`; a ValueError or FileNotFoundError, in one line, says what does not fit, and where.
    """
    target = Path(out)
    if target.suffix.lower() != ".gguf":
        raise ValueError(f"{target}: expected a name that ends in .gguf, as the base's does")
    with new_file(target) as temporary, open_gguf(Path(base)) as file:
        updates, is_new_head = due_updates(file, [Path(path) for path in adapters], weights)
        _write(file, updates, temporary, is_new_head=is_new_head)
    made = len(updates.keys() | {HEAD}) if is_new_head else len(updates)
    return MergedFile(made, len(file.tensors) + is_new_head - made)


def due_updates(
    file: GGUFFile, adapters: Sequence[Path], weights: Sequence[float]
) -> tuple[dict[str, list[Update]], bool]:
    """What is added to each tensor of a base that adapters change, and whether it needs a head that was the table.

    A ValueError says what is wrong with the base, with an adapter, or what does not fit.
    """
    check_one_file(file)
    file.check_tensors()
    updates: dict[str, list[Update]] = {}
    for path, w in zip(adapters, weights, strict=True):
        for name, several in _updates(file, path).items():
            updates.setdefault(name, []).extend(update._replace(s=w * update.s) for update in several)
    is_new_head = _needs_head(file, updates)
    check_alone((u.m is not None for several in updates.values() for u in several), weights)
    for name, its_updates in updates.items():
        source = file.tensors.get(TABLE if is_new_head and name == HEAD else name)
        if source is None:
            raise ValueError(f"{file.path}: the adapter is for a tensor that is not there: {shown(name)}")
        _check(file, source, its_updates)
    return updates, is_new_head


def _updates(file: GGUFFile, path: Path) -> dict[str, list[Update]]:
    """An adapter's updates by the names of the base's tensors."""
    architecture = file.get("general.architecture", str)
    if kind_of(path) == "gguf":
        with open_gguf(path) as found:
            if found.get("general.architecture", str) != architecture:
                raise ValueError(
                    f"{path}: made for another base: its architecture is "
                    f"{found.get('general.architecture', str)!r:.60}, {file.path}'s is {architecture!r:.60}"
                )
            return {name: [update] for name, update in read_updates(found).items()}
    if is_run(file):
        return _updates_of_model(file, path)
    naming = naming_in(file)
    contents = read_contents(path)
    by_name = updates_by_name(naming, contents, {module: module for module in contents.pairs})
    return {name: [update] for name, update in by_name.items()}


def _updates_of_model(file: GGUFFile, path: Path) -> dict[str, list[Update]]:
    """The updates of an adapter of the model in the file; of matrices that share a tensor, each its own rows."""
    dtype = "float64" if brought_by(path).is_double else "float32"
    config, sources = open_model(file)
    adapter = load_adapter(path, _Opened(config, lazy_weights(file, sources, dtype), np.dtype(dtype)))
    for name in adapter.whole:
        raise ValueError(f"{path}: {name} is trained whole: only A and B can be merged onto a .gguf file")
    result: dict[str, list[Update]] = {}
    for name, update in matrix_updates(config, adapter).items():
        A, B = asnumpy(update.A), asnumpy(update.B)
        m = None if update.m is None else asnumpy(update.m)
        if name == "embed.tokens":
            A, B = B.T, A.T
        source = sources.get(f"{name}.weight")
        if source is None:  # a table, or a head that is tied to it
            result[tensor_name(name)] = [Update(A, B, update.s, m=m)]
            continue
        rows = np.zeros((file.tensors[source.tensor].shape[0], B.shape[1]), B.dtype)
        rows[source.rows] = in_pairs(B, source.heads)
        if m is not None:
            m, of_part = np.full(len(rows), np.nan), m
            m[source.rows] = in_pairs(of_part[:, None], source.heads)[:, 0]
        result.setdefault(source.tensor, []).append(Update(A, rows, update.s, m=m))
    return {name: _as_one(several, f"{path}: {shown(name)}") for name, several in result.items()}


def _as_one(updates: list[Update], where: str) -> list[Update]:
    """The updates of a tensor's parts; DoRA's, whose m is NaN in the other parts' rows, as one of all rows."""
    magnitudes = [u.m for u in updates if u.m is not None]
    if not magnitudes:
        return updates
    m = np.fmax.reduce(magnitudes)
    if np.isnan(m).any():
        raise ValueError(f"{where}: DoRA scales each row of this tensor, of which some are not adapted: expected all")
    A = np.concatenate([u.A for u in updates])
    B = np.concatenate([u.B.astype(np.float64) * u.s for u in updates], axis=1)
    return [Update(A, B, 1.0, m=m)]


def _needs_head(file: GGUFFile, updates: Mapping[str, object]) -> bool:
    """Whether the head is the token table, and no longer; a ValueError where that is not known."""
    if HEAD in file.tensors or not {TABLE, HEAD} & updates.keys():
        return False
    architecture = file.get("general.architecture", str)
    if architecture not in (*ARCHITECTURES, *HEADLESS):
        raise ValueError(
            f"{file.path}: {TABLE}: there is no {HEAD}, and whether its head is that table is not known here for "
            f"{architecture!r:.60}, only for {' '.join(ARCHITECTURES)}"
        )
    return architecture in ARCHITECTURES and TABLE in file.tensors


def _check(file: GGUFFile, source: Tensor, updates: Sequence[Update]) -> None:
    """A ValueError unless a tensor can be adapted by these."""
    kind = TENSOR_TYPES[source.kind].name
    if kind not in NAMES:
        raise ValueError(
            f"{file.path}: {source.name}: quantised ({kind}): the merged tensor would have to be quantised anew, which "
            "loses what the adapter learned; merge onto a file in F32, F16 or BF16, which llama-quantize "
            "--allow-requantize makes, or keep the adapter beside this one, in .gguf as lora-np convert writes it"
        )
    for update in updates:
        shape = update.B.shape[0], update.A.shape[1]
        if source.shape != shape:
            raise ValueError(
                f"{file.path}: {source.name}: expected shape {shape}, as the adapter has it, got {source.shape}"
            )


def _write(file: GGUFFile, updates: Mapping[str, Sequence[Update]], path: Path, *, is_new_head: bool) -> None:
    """The merged file: the base's bytes, merged tensors in their places, and a new head behind them."""
    with open(path, "xb") as new:
        if is_new_head:
            head = file.tensors[TABLE]._replace(name=HEAD, offset=aligned(file.size, file.alignment) - file.data_start)
            header = with_count(file.header, len(file.tensors) + 1) + tensor_entry(head)
            new.write(header + bytes(aligned(len(header), file.alignment) - len(header)))
        else:
            new.writelines(file.parts(0, file.data_start))
        at = file.data_start
        for tensor in sorted((file.tensors[name] for name in updates if name in file.tensors), key=lambda t: t.offset):
            new.writelines(file.parts(at, tensor.offset))
            merged = _merged(file, tensor, updates[tensor.name], axis=axis_of(tensor.name))
            new.write(merged.data)
            at = tensor.offset + merged.nbytes
        new.writelines(file.parts(at, file.size))
        if is_new_head:
            new.write(bytes(aligned(file.size, file.alignment) - file.size))
            new.write(_merged(file, file.tensors[TABLE], updates.get(HEAD, ())).data)


def _merged(file: GGUFFile, source: Tensor, updates: Sequence[Update], *, axis: int = 1) -> Array:
    """A tensor's bytes with its updates, uint8; axis: as `summed` has it.

    A ValueError if one of its numbers is NaN or infinite.
    """
    values = numbers(file, source)
    for rows in summed(values, values, updates, axis=axis):
        rows.place[...] = rounded(rows.sum(), values.dtype)
    if not np.isfinite(values).all():
        raise ValueError(
            f"{file.path}: {source.name}: a merged weight is NaN, infinite, or too large for {values.dtype}"
        )
    return values.reshape(-1).view(np.uint8)


def axis_of(tensor: str) -> int:
    """Along which axis of a tensor DoRA takes norms: 0 in the table of tokens, whose columns are the rows of W0."""
    return 0 if tensor == TABLE else 1


def numbers(file: GGUFFile, tensor: Tensor) -> Array:
    """A tensor in F32, F16 or BF16 as it stands in its file (rows, width)."""
    return file.read_raw(tensor.name).view(numpy_dtype(TENSOR_TYPES[tensor.kind].name))
