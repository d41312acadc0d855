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

    @property
    def options(self) -> dict[str, Any]:
        """The arguments head and n_labels for which `load_model` gives the model that the adapter was trained on."""
        if self.head == "none":
            return {"head": "none", "n_labels": None}
        if self.head in ("classify", "tag") and "head.weight" in self.shapes:
            return {"head": self.head, "n_labels": self.shapes["head.weight"][0]}
        return {"head": None, "n_labels": None}


def load_base_for(
    adapter_path: str | os.PathLike[str], base_path: str | os.PathLike[str], dtype: str | None = None
) -> Model:
    """The model that an adapter is for: `load_model` with the head that the adapter was trained with.

    An adapter that has a classifier's or tagger's head whole makes the base one of as many labels; what the base's file
    then lacks is made up (seed 0), as the adapter's own stands in its place. A ValueError if neither has it; errors of
    the files themselves are those of `load_model` and `load_adapter`.
    """
    brought = brought_by(Path(adapter_path))
    options = {"dtype": dtype, **brought.options}
    try:
        return load_model(base_path, **options)
    except LacksWeights as error:
        missing = sorted(error.names - brought.shapes.keys())
        if missing:
            raise ValueError(f"{base_path}: lacks {' '.join(missing)}, and so does {adapter_path}") from None
    return load_model(base_path, **options, seed=0)


def brought_by(path: Path) -> Brought:
    """What an adapter's file or folder says of its head."""
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
            if module in MODULES and len(shape) > 0:
                shapes[f"{MODULES[module]}.{weight}"] = shape
    task = raw.get("task_type")
    return Brought(about.get("head") or (TASKS.get(task) if isinstance(task, str) else None), shapes)
