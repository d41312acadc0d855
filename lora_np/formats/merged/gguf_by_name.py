"""Adapters by transformers' module names, and llama.cpp's files of them: the same A and B under other names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...backend import Array
from ...lora import Update
from ..adapters.contents import Contents, Pair
from ..adapters.gguf import TABLE, in_order, in_pairs, read_updates, write_updates
from ..adapters.gguf_names import Naming, naming_of
from ..files.messages import shown
from ..models.folder import CONFIG
from ..models.gguf_file import open_gguf
from .any_base import AnyBase
from .matching import base_names


def write_gguf(base: AnyBase, adapter: Contents, out: Path) -> None:
    """Writes an adapter of a base as a new .gguf file for llama.cpp, in float32; a ValueError says what cannot be.

    llama.cpp's files have no place for what is trained whole, for biases, tables of tokens and experts.
    """
    if adapter.has_dora:
        raise ValueError(f"{adapter.path}: llama.cpp's adapters have no place for DoRA's magnitudes (L10); merge it")
    naming = _naming(base)
    names, _ = base_names(base, adapter)
    for module, name in names.items():
        weight = base.tensors.get(f"{name}.weight")
        for pair in adapter.pairs.get(module, ()):
            shape = len(pair.B), pair.A.shape[1]
            if weight is not None and weight.shape != shape:
                raise ValueError(
                    f"{adapter.path}: {shown(module)}: expected a module of {base.folder} of shape {shape}, there it "
                    f"is {weight.shape}"
                )
    write_updates(out, naming.architecture, updates_by_name(naming, adapter, names))


def read_gguf(base: AnyBase, path: Path) -> Contents:
    """An adapter of a base from llama.cpp's file, by the base's module names; a ValueError names what does not fit."""
    naming = _naming(base)
    with open_gguf(path) as file:
        found, updates = file.get("general.architecture", str), read_updates(file)
    if found != naming.architecture:
        raise ValueError(
            f"{path}: made for another base: its architecture is {found!r:.60}, this is {naming.architecture}"
        )
    modules = {tensor: module for module, tensor in naming.names(sorted(base.modules)).items()}
    pairs = {}
    for tensor, (A, B, s, *_) in updates.items():
        if tensor == TABLE or tensor not in modules:
            raise ValueError(f"{path}: the tensor {shown(tensor)} has no place in an adapter of {base.folder}")
        B = in_order(B, _fitting(naming, tensor, B, f"{path}: {shown(tensor)}"))
        pairs[modules[tensor]] = [Pair(np.ascontiguousarray(A), np.ascontiguousarray(B), s, len(A))]
    return Contents(path, {}, pairs, {}, {}, {})


def updates_by_name(naming: Naming, adapter: Contents, names: Mapping[str, str]) -> dict[str, Update]:
    """An adapter's updates by the names of llama.cpp's tensors, as they stand there.

    names: the model's own of the adapter's modules. A ValueError names what llama.cpp's files have no place for.
    """
    for name in [*adapter.whole, *adapter.rows]:
        raise ValueError(
            f"{adapter.path}: {shown(name)}: trained whole, which llama.cpp's adapters have no place for; merge it "
            "into the model's folder"
        )
    tensors, updates = naming.names(names.values()), {}
    for module, pairs in adapter.pairs.items():
        where = f"{adapter.path}: {shown(module)}"
        tensor = tensors.get(names[module])
        if tensor is None or tensor == TABLE or len(pairs) != 1 or len(pairs[0].A) != pairs[0].r:
            raise ValueError(f"{where}: llama.cpp's adapters have no place for it; merge it into the model's folder")
        (pair,) = pairs
        if pair.bias is not None:
            raise ValueError(f"{where}: lora_bias: llama.cpp's adapters have no place for it")
        heads = _fitting(naming, tensor, pair.B, where)
        m = None if pair.m is None else in_pairs(pair.m[:, None], heads)[:, 0]
        updates[tensor] = Update(pair.A, in_pairs(pair.B, heads), pair.s, m=m)
    return updates


def _naming(base: AnyBase) -> Naming:
    return naming_of(base.raw, len(base.tensors), str(base.folder / CONFIG))


def _fitting(naming: Naming, tensor: str, B: Array, where: str) -> int:
    """The heads whose rows stand in pairs; a ValueError if B has no such rows."""
    heads = naming.heads(tensor)
    if heads and len(B) % (2 * heads):
        raise ValueError(f"{where}: expected rows of {heads} heads in pairs, got {len(B)}")
    return heads
