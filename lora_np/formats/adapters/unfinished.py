"""A folder in which training has left a checkpoint and no adapter yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files.json_file import parse_json
from ..files.npz_file import HEADER, open_arrays

CHECKPOINT = "checkpoint.npz"


def stands_at(folder: Path) -> str:
    """Where the training stands whose checkpoint is in a folder: "step 50 of 200", as far as its header says.

    A ValueError if the checkpoint is damaged.
    """
    path = folder / CHECKPOINT
    with open_arrays(path) as file:
        header = parse_json(file.header(), f"{path}: {HEADER}")
    step: Any = header.get("step")
    steps: Any = header
    for name in ("about", "settings", "steps"):
        steps = steps.get(name) if isinstance(steps, dict) else None
    if type(step) is not int:
        raise ValueError(f"{path}: {HEADER}: step: expected an integer, got {step!r:.60}")
    return f"step {step} of {steps}" if type(steps) is int else f"step {step}"
