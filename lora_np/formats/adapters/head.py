"""The head that an adapter brings to a base which has none, or another: its kind, its labels and their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ...model import Config
from ..files.json_file import read_json
from ..files.messages import named
from ..files.npz_file import HEADER, open_arrays
from ..models.labels import named_labels
from ..models.names import NAMED
from ..models.shards import stored_tensors
from .adapter import kind_of
from .contents import adapter_tensors
from .expected import expect_adapter
from .header import KEY, read_about
from .keys import adapter_names, read_key
from .peft_config import CONFIG
from .task import TASK, Task, load_task

LABELS = ("classify", "tag")
# What PEFT's files call the modules of a head for labels, and a pooler that is a part of it; ours: head, pooler.
MODULES = {"pooler": "pooler"} | {
    theirs: ours for family in NAMED for head in LABELS for ours, theirs in family.heads.get(head, {}).items()
}
TASKS = {"SEQ_CLS": "classify", "TOKEN_CLS": "tag", "FEATURE_EXTRACTION": "none"}


class Brought(NamedTuple):
    """What an adapter says about its base's head, None where it does not, and the head's weights that it has whole.

    is_double: whether its tensors are float64.
    """

    head: str | None
    shapes: Mapping[str, tuple[int, ...]]
    is_double: bool

    @property
    def options(self) -> dict[str, Any]:
        """The arguments head and n_labels for which `load_model` gives the model that the adapter was trained on."""
        if self.head == "none":
            return {"head": "none", "n_labels": None}
        if self.head in ("classify", "tag") and "head.weight" in self.shapes:
            return {"head": self.head, "n_labels": self.shapes["head.weight"][0]}
        return {"head": None, "n_labels": None}


@named
def brought_by(path: Path) -> Brought:
    """What an adapter's file or folder says of its head; errors are those of `load_adapter`."""
    found = _read(path)
    shape = found.shapes.get("head.weight", (1, 1))
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{path}: head.weight: expected a matrix, got shape {shape}")
    return found


def _read(path: Path) -> Brought:
    kind = kind_of(path)
    if kind == "gguf":  # which holds float32, and no head whole
        return Brought(None, {}, False)
    if kind == "npz":
        with open_arrays(path) as arrays:
            about = read_about(arrays.header(), f"{path}: {HEADER}")
            doubles = any(member.dtype == "float64" for member in arrays.members.values())
            shapes = {name: member.shape for name, member in arrays.members.items()}
            return Brought(about.get("head"), shapes, doubles)
    if kind == "peft":
        expect_adapter(path)
    raw = read_json(path / CONFIG) if kind == "peft" else {}
    tensors = adapter_tensors(path, raw) if kind == "peft" else stored_tensors(path.parent, path.name)
    metadata = next((stored.file.metadata for stored in tensors.values()), {})
    about = read_about(metadata[KEY], f"{path}: metadata") if KEY in metadata else {}
    shapes, adapters = {}, adapter_names(tensors)
    for key, stored in tensors.items():
        found = read_key(key, adapters) if kind == "peft" else None
        module, _, weight = (found.module if found else key).rpartition(".")
        if module in MODULES and not (found and found.part):
            shapes[f"{MODULES[module]}.{weight}"] = stored.shape
    doubles = any(stored.dtype == "F64" for stored in tensors.values())
    task = raw.get("task_type")
    return Brought(about.get("head") or (TASKS.get(task) if isinstance(task, str) else None), shapes, doubles)


def task_for(base: Path, adapter: Path | None, config: Config) -> Task:
    """What a classifier or tagger was trained for: as task.json of the adapter says, or of the base without one.

    Where there is none: the names in the base's config.json, or LABEL_0 and so on, as transformers has them; and texts
    as long as the model takes them.
    """
    task = load_task(base if adapter is None else adapter)
    if task is not None and label_names(base if adapter is None else adapter, config) is not None:
        return replace(task, longest=min(task.longest, config.longest))
    n = config.n_labels or 0
    labels = named_labels(base, n) or tuple(f"LABEL_{i}" for i in range(n))
    return Task("tag" if config.head == "tag" else "classify", labels, config.longest)


def label_names(adapter: Path, config: Config) -> tuple[str, ...] | None:
    """The names of the labels in an adapter's task.json; None if there is no such file, or no labels to name."""
    task = load_task(adapter)
    if task is None or config.head not in ("classify", "tag"):
        return None
    if task.name != config.head or len(task.labels) != config.n_labels:
        raise ValueError(
            f"{adapter / TASK}: expected task {config.head} with {config.n_labels} labels, as the weights are, "
            f"got {task.name} with {len(task.labels)}"
        )
    return task.labels
