"""The base that an adapter is for: with the head that the adapter brings along."""

from __future__ import annotations

import os
from pathlib import Path

from ...model import Model
from ..models.base import Storage
from ..models.folder import load_model
from ..models.heads import LacksWeights
from .head import brought_by


def load_base_for(
    adapter_path: str | os.PathLike[str],
    base_path: str | os.PathLike[str],
    dtype: str | None = None,
    storage: Storage | None = None,
) -> Model:
    """The model that an adapter is for: `load_model` with the head that the adapter was trained with.

    dtype: None: the file's, or float64 where the adapter has that. storage: as `load_model` has it. An adapter that has
    a classifier's or tagger's head whole makes the base one of as many labels; what the base's file then lacks is made
    up (seed 0), as the adapter's own stands in its place. A ValueError if neither has it; errors of the files
    themselves are those of `load_model` and `load_adapter`.
    """
    brought = brought_by(Path(adapter_path))
    dtype = "float64" if dtype is None and brought.is_double else dtype
    options = {"dtype": dtype, "storage": storage, **brought.options}
    try:
        return load_model(base_path, **options)
    except LacksWeights as error:
        for name, shape in error.shapes.items():  # before anything of that size is made
            if brought.shapes.get(name) != shape:
                found = f"has it as {brought.shapes[name]}" if name in brought.shapes else "lacks it too"
                raise ValueError(f"{base_path}: lacks {name} {shape}, and {adapter_path} {found}") from None
    return load_model(base_path, **options, seed=0)
