"""The base that an adapter is for: with the head that the adapter brings along."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..model import Model
from .about import KEY, read_about
from .adapters import kind_of
from .folder import load_model
from .heads import LacksWeights
from .layout import PREFIX
from .npz import open_arrays
from .peft import CONFIG, WEIGHTS
from .plain import read_json
from .safe import open_tensors

# What PEFT's files call the modules of a head, and RoBERTa's pooler, which is a part of its own; ours: head, pooler.
MODULES = {
    "score": "head", "classifier": "head", "classifier.out_proj": "head", "head": "head",
    "classifier.dense": "pooler", "pooler": "pooler",
}  # fmt: skip
TASKS = {"SEQ_CLS": "classify", "TOKEN_CLS": "tag", "FEATURE_EXTRACTION": "none"}


class Brought(NamedTuple):
    """What an adapter says about its base's head, None where it does not, and the head's weights that it has whole."""

    head: str | None
    shapes: Mapping[str, tuple[int, ...]]


def load_base_for(
    adapter_path: str | os.PathLike[str], base_path: str | os.PathLike[str], dtype: str | None = None
) -> Model:
    """The model that an adapter is for: `load_model` with the head that the adapter was trained with.

    An adapter that has a classifier's or tagger's head whole makes the base one of as many labels; what the base's file
    then lacks is made up (seed 0), as the adapter's own stands in its place. A ValueError if neither has it; errors of
    the files themselves are those of `load_model` and `load_adapter`.
    """
    brought = _brought(Path(adapter_path))
    options: dict[str, Any] = {"dtype": dtype}
    if brought.head == "none":
        options["head"] = "none"
    elif brought.head in ("classify", "tag") and "head.weight" in brought.shapes:
        shape = brought.shapes["head.weight"]
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"{adapter_path}: head.weight: expected a matrix, got shape {shape}")
        options |= {"head": brought.head, "n_labels": shape[0]}
    try:
        return load_model(base_path, **options)
    except LacksWeights as error:
        for name, shape in error.shapes.items():  # before anything of that size is made
            if brought.shapes.get(name) != shape:
                found = f"has it as {brought.shapes[name]}" if name in brought.shapes else "lacks it too"
                raise ValueError(f"{base_path}: lacks {name} {shape}, and {adapter_path} {found}") from None
    return load_model(base_path, **options, seed=0)


def _brought(path: Path) -> Brought:
    kind = kind_of(path)
    if kind == "npz":
        with open_arrays(path) as arrays:
            return Brought(arrays.about().get("head"), {name: m.shape for name, m in arrays.members.items()})
    raw = read_json(path / CONFIG) if kind == "peft" else {}
    with open_tensors(path / WEIGHTS if kind == "peft" else path) as file:
        about = read_about(file.metadata[KEY], f"{file.path}: metadata") if KEY in file.metadata else {}
        shapes = {}
        for key, shape in file.shapes.items():
            module, _, weight = key.removeprefix(PREFIX).rpartition(".")
            if module in MODULES:
                shapes[f"{MODULES[module]}.{weight}"] = shape
    task = raw.get("task_type")
    return Brought(about.get("head") or (TASKS.get(task) if isinstance(task, str) else None), shapes)
