"""A job of fine-tuning: what it is known by, and in what the job of a checkpoint differs from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..adapter import Adapter, LoRAConfig
from ..formats.adapters.task import Task
from ..formats.files.json_file import to_json
from ..formats.files.messages import shown
from ..formats.models.folder import model_hash, weights_hash
from ..model import Model
from .loop import Settings
from .tasks import Data

# As the command line calls them, where that is another name.
NAMES = {"N": "batch", "longest": "window", "name": "task"}
HASHED = ("base", "data", "dev", "start")


@dataclass(frozen=True)
class Job:
    """What to do: the task, the adapter, the training, and after how many steps to look and to save each time."""

    task: Task
    lora: LoRAConfig
    settings: Settings
    every: int

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every: expected at least 1, got {self.every}")


def identity(model: Model, data: Data, job: Job, start: Adapter | None) -> dict[str, Any]:
    """What a checkpoint must share with the job that goes on from it: all that its bits depend on.

    start: the adapter that training starts from; None: one made from the seed.
    """
    named = {"base": model_hash(model), **data.about, **asdict(job)}
    named["start"] = None if start is None else weights_hash(start.params)
    del named["settings"]["recompute"]  # so that what ran out of memory may go on with less
    return json.loads(to_json(named))  # as a checkpoint gives it back


def differences(found: Mapping[str, Any], due: Mapping[str, Any]) -> list[str]:
    """Each setting in which a checkpoint is of another job, as "name: the checkpoint's -> this job's".

    More steps are no difference: from the checkpoint on, the learning rate then follows the longer schedule.
    """
    due = _with_steps_of(found, due)
    return list(dict.fromkeys(line for name in due for line in _told(name, found.get(name), due[name])))


def _with_steps_of(found: Mapping[str, Any], due: Mapping[str, Any]) -> Mapping[str, Any]:
    """The job as it would be with the checkpoint's steps, if those are fewer; a warm-up is no longer than the steps."""
    settings = found.get("settings")
    steps = settings.get("steps") if isinstance(settings, dict) else None
    if type(steps) is not int or not 0 < steps < due["settings"]["steps"]:
        return due
    return {**due, "settings": {**due["settings"], "steps": steps, "warmup": min(due["settings"]["warmup"], steps)}}


def _told(name: str, found: Any, due: Any) -> Iterator[str]:
    """What differs under a name: of two tables, what does in them."""
    if isinstance(found, dict) and isinstance(due, dict):
        for key in [*due, *sorted(found.keys() - due.keys())]:
            yield from _told(key, found.get(key), due.get(key))
    elif found != due:
        yield f"{shown(NAMES.get(name, name), 60)}: {_value(name, found)} -> {_value(name, due)}"


def _value(name: str, value: Any) -> str:
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return "none" if value is None else shown(str(value), 12 if name in HASHED else 60)
