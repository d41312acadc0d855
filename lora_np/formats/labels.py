"""The names of a classifier's or tagger's labels, as an adapter's folder may have them."""

from __future__ import annotations

from pathlib import Path

from ..model import Config
from .plain import read_json

TASK = "task.json"


def label_names(adapter: Path, config: Config) -> list[str] | None:
    """The names of the labels in an adapter's task.json; None if there is no such file, or no labels to name."""
    path = adapter / TASK
    if config.head not in ("classify", "tag") or not path.is_file():
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
