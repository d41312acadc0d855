"""Is a GGUF file the merge of another and an adapter? Tensor by tensor, as `comparison` does it with folders."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...lora import Update
from ..files.rounding import NAMES, numpy_dtype, rounded
from ..models.gguf_file import TENSOR_TYPES, GGUFFile, Tensor, ValueList, open_gguf
from .comparison import Comparison, Difference, Due, compared, difference
from .evidence import Sums
from .gguf import HEAD, TABLE, axis_of, due_updates, numbers
from .target import summed


def compare_gguf(base: Path, adapters: Sequence[Path], merged: Path, ulps: int) -> Comparison:
    """Compares a merged .gguf file with the merge, a tensor at a time. Errors are those of `merge_gguf`.

    ulps: how far apart an element may be, in steps of the merged file's own type, which may differ from the base's.
    """
    with open_gguf(base) as file, open_gguf(merged) as other:
        updates, is_new_head = due_updates(file, adapters, [1.0] * len(adapters))
        other.check_tensors()
        sources = {**file.tensors, **({HEAD: file.tensors[TABLE]} if is_new_head else {})}

        def due(name: str) -> Due:
            source, found = sources[name], other.tensors.get(name)
            if found is None:
                return Due(name, None, None)
            is_float = TENSOR_TYPES[found.kind].name in NAMES
            fits = found.shape == source.shape and (is_float or name not in updates)
            compare = partial(_difference, file, source, other, found, updates[name], ulps) if name in updates else None
            return Due(name, fits, compare, partial(_same, file, source, other, found))

        extra = sorted(other.tensors.keys() - sources.keys())
        return compared(map(due, sources), extra, _said(file) == _said(other))


def _difference(
    file: GGUFFile, source: Tensor, other: GGUFFile, found: Tensor, updates: Sequence[Update], ulps: int
) -> tuple[Difference, Sums]:
    """A merged tensor beside the sum, in the merged file's own type."""
    tensor = numbers(other, found)
    blocks = summed(tensor, numbers(file, source), updates, axis=axis_of(found.name))
    return difference(found.name, tensor.size, blocks, ulps)


def _same(file: GGUFFile, source: Tensor, other: GGUFFile, found: Tensor) -> bool:
    """Whether a tensor that nothing changes is the base's: to the byte, or in another dtype rounded once."""
    if found.kind == source.kind:
        return np.array_equal(file.read_raw(source.name), other.read_raw(found.name))
    kinds = [TENSOR_TYPES[tensor.kind].name for tensor in (source, found)]
    if not set(kinds) <= NAMES.keys():
        return False
    values = numbers(file, source).astype(np.float64)
    return np.array_equal(rounded(values, numpy_dtype(kinds[1])), numbers(other, found))


def _said(file: GGUFFile) -> dict[str, Any]:
    """What a file's metadata says of the model's computation: all keys but the lists, and those about the file."""
    return {
        key: value
        for key, value in file.metadata.items()
        if not isinstance(value, ValueList) and (not key.startswith("general.") or key == "general.architecture")
    }
