"""The head that an adapter brings to a base which has none, or another: its kind, its labels and their names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..model import Config
from .layout import PREFIX
from .names import module_names
from .peft import CONFIG, WEIGHTS
from .plain import read_json
from .safe import open_tensors

TASK = "task.json"
TASKS = {"SEQ_CLS": "classify", "TOKEN_CLS": "tag"}


def brought_head(adapter: Path, saved: Config) -> tuple[str | None, int | None]:
    """The head (classify, tag) that an adapter's folder has whole, and its number of labels; None, None without one."""
    head = TASKS.get(str(read_json(adapter / CONFIG).get("task_type")))
    if head is None:
        return None, None
    fields: dict[str, Any] = {"head": head, "n_labels": 1}
    key = f"{PREFIX}{module_names(replace(saved, **fields))['head']}.weight"
    with open_tensors(adapter / WEIGHTS) as file:
        shape = file.shapes.get(key, ())
    return (head, shape[0]) if len(shape) == 2 else (None, None)


def label_names(adapter: Path, config: Config) -> list[str] | None:
    """The names of the labels in an adapter's task.json; None if there is no such file, or no labels to name."""
    path = adapter / TASK
    if config.head not in TASKS.values() or not path.is_file():
        return None
    task = read_json(path)
    labels = task.get("labels")
    if task.get("task") != config.head:
        raise ValueError(f"{path}: task: expected {config.head!r}, as the weights are, got {task.get('task')!r:.60}")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{path}: labels: expected a list of names, got {labels!r:.60}")
    if len(set(labels)) != config.n_labels or len(labels) != config.n_labels:
        raise ValueError(f"{path}: labels: expected {config.n_labels} names, each another, got {labels!r:.60}")
    return labels
