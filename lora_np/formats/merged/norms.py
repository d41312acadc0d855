"""The sizes of a base's weights that an adapter changes, to hold the sizes of its updates against."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...backend import Array, asnumpy
from ...model import Config
from ..adapters.adapter import kind_of
from ..adapters.base import load_base_for
from ..adapters.contents import read_contents
from ..adapters.gguf import tensor_name
from ..models.base import Base
from ..models.names import family_of, module_names, module_of, module_parts, module_shapes
from .any_base import open_any_base
from .base import open_base
from .matching import base_keys
from .new_head import with_new_head
from .survey import Module, scaled


def base_norms(
    base: str | os.PathLike[str], adapter: str | os.PathLike[str], modules: Sequence[Module]
) -> Sequence[float | None]:
    """The Frobenius norm of each module's W0, read one by one from the base's folder, or all at once from a .gguf file.

    None of experts, whose tensors may be several. A ValueError names a module that the base lacks, or that has another
    shape there.
    """
    if kind_of(adapter) != "peft" or Path(base).suffix.lower() == ".gguf":
        return _norms_by_our_names(base, adapter, modules)
    opened = open_any_base(Path(base))
    contents = read_contents(adapter, opened.names)
    opened = with_new_head(opened, [contents])
    keys = base_keys(opened, contents)
    norms: list[float | None] = []
    for module in modules:
        if module.experts > 1:
            norms.append(None)
            continue
        stored = opened.tensors.get(keys[module.name])
        if stored is None or stored.shape not in ((module.n_out, module.n_in), (module.n_in, module.n_out)):
            raise _another(base, adapter, module, None if stored is None else stored.shape)
        size, W = scaled(stored.read("float64"))
        norms.append(size * float(np.linalg.norm(W)))
    return norms


def _another(
    base: str | os.PathLike[str], adapter: str | os.PathLike[str], module: Module, shape: tuple[int, ...] | None
) -> ValueError:
    found = "another" if shape is None else f"shape {module.n_out} x {module.n_in}, there it is {shape}"
    return ValueError(f"{adapter}: {module.name}: expected a module of {base}, got {found}")


def _norms_by_our_names(
    base: str | os.PathLike[str], adapter: str | os.PathLike[str], modules: Sequence[Module]
) -> list[float]:
    is_gguf = Path(base).suffix.lower() == ".gguf"
    opened: Base = load_base_for(adapter, base) if is_gguf else open_base(base, [Path(adapter)])
    config = opened.config
    shapes, family = module_shapes(config), family_of(config)
    names = {theirs: ours for ours, theirs in module_names(config).items()}
    if kind_of(adapter) == "npz":
        names = {ours: ours for ours in shapes}
    if kind_of(adapter) == "gguf":
        names = {tensor_name(ours): ours for ours in shapes if module_of(ours, family) == ours}
    norms = []
    for module in modules:
        ours = names.get(module.name, "")
        if shapes.get(ours) != (module.n_out, module.n_in):
            raise _another(base, adapter, module, shapes.get(ours))
        weights = [_weight_of(config, part) for part in module_parts(config, ours)]
        parts = [scaled(_wide(opened.weights[name])) for name in weights]
        norms.append(math.hypot(*(size * float(np.linalg.norm(W)) for size, W in parts)))
    return norms


def _weight_of(config: Config, matrix: str) -> str:
    """The name of a matrix's weight; a tied head's is the token table's."""
    return {"embed.tokens": "embed.tokens", "head": config.head_weight}.get(matrix, f"{matrix}.weight")


def _wide(values: Array) -> Array:
    return asnumpy(values).astype(np.float64, copy=False)
