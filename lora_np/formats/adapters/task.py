"""task.json: what an adapter was trained for, which PEFT's files have no place for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..files.atomic import replaced_files
from ..files.json_file import from_fields, read_json, to_fields, write_json

TASK = "task.json"


@dataclass(frozen=True)
class Task:
    """What is learned, the names of the labels in the order of their logits, and how long a text is at most.

    name    "lm", the next token; "translate", a text after another; "classify", a label for each text; "tag", one for
            each word
    """

    name: Literal["lm", "translate", "classify", "tag"]
    labels: tuple[str, ...] = ()
    longest: int = 64

    def __post_init__(self) -> None:
        if self.name not in ("lm", "translate", "classify", "tag"):
            raise ValueError(f"Task.name: expected lm, translate, classify or tag, got {self.name!r:.60}")
        if self.longest < 1:
            raise ValueError(f"Task.longest: expected at least 1, got {self.longest}")
        object.__setattr__(self, "labels", tuple(self.labels))
        if len(set(self.labels)) < len(self.labels) or (self.head != "lm" and len(self.labels) < 2):
            raise ValueError(f"Task.labels: expected two different names at least, got {self.labels!r:.60}")

    @property
    def head(self) -> str:
        """The head of the model that learns it."""
        return "lm" if self.name == "translate" else self.name


def save_task(folder: Path, task: Task) -> None:
    """Writes task.json into a folder, whole or not at all."""
    with replaced_files(folder, last=TASK) as new:
        write_json(new / TASK, to_fields(task))


def load_task(folder: Path) -> Task | None:
    """The task in a folder, or None where it says nothing. A ValueError names what is wrong with the file."""
    if not (folder / TASK).is_file():
        return None
    return from_fields(Task, read_json(folder / TASK), str(folder / TASK))
