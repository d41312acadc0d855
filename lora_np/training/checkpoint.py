"""Training's state in a file: whole or not there, and read as a file that anyone may have written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import Array, asnumpy, xp
from ..formats.files.atomic import replaced_files
from ..formats.files.json_file import parse_json, to_json
from ..formats.files.messages import named, shown
from ..formats.files.npz_file import HEADER, ArrayFile, open_arrays
from ..optim import AdamWState
from .loop import State

FORMAT = 1
GROUPS = ("param", "m", "v")  # what is trained, and AdamW's two averages of its gradients


def save_checkpoint(path: str | Path, state: State, about: Mapping[str, Any]) -> None:
    """Writes the state to a file, in the place of the one that is there; its folder must be.

    about: what the caller needs to know it by, kept as JSON: settings, the base's hash, the losses so far.
    """
    path = Path(path)
    groups = [state.params]
    if state.optimizer is not None:
        groups += [state.optimizer.m, state.optimizer.v]
    arrays = {
        f"{group}/{name}": np.ascontiguousarray(asnumpy(value))
        for group, values in zip(GROUPS, groups, strict=False)
        for name, value in values.items()
    }
    header = to_json({"format": FORMAT, "step": state.step, "about": about}).encode()
    with replaced_files(path.parent, last=path.name) as folder, (folder / path.name).open("wb") as file:
        np.savez(file, **{HEADER: np.frombuffer(header, dtype=np.uint8)}, **arrays)  # type: ignore[arg-type]


@named
def load_checkpoint(
    path: str | Path, like: Mapping[str, Array], check: Callable[[Mapping[str, Any]], None] = lambda _: None
) -> tuple[State, dict[str, Any]]:
    """Reads what save_checkpoint wrote: the state, and what the caller wrote about it.

    like: the parameters that are trained; a file that holds others, or other shapes or dtypes, is a ValueError, and so
    is one that is damaged. check: called first, with what it is about. Nothing in the file is executed, and no more
    memory taken than the file is long.
    """
    path = Path(path)
    with open_arrays(path) as file:
        step, about = _read_header(file, f"{path}: {HEADER}")
        check(about)
        groups = GROUPS if step else GROUPS[:1]
        expected = {f"{group}/{name}": p for group in groups for name, p in like.items()}
        for name in file.members:
            if name != HEADER and name not in expected:
                raise ValueError(f"{path}: {shown(name)}: this training has no such parameter")
        for name, p in expected.items():
            if name not in file.members:
                raise ValueError(f"{path}: not a whole checkpoint: it lacks {name}")
            found = file.members[name]
            if (found.shape, found.dtype) != (p.shape, p.dtype):
                raise ValueError(f"{path}: {name}: expected {p.dtype} {p.shape}, got {found.dtype} {found.shape}")
        params, *averages = ({name: xp.asarray(file.read(f"{group}/{name}")) for name in like} for group in groups)
        for name, v in (averages[1] if averages else {}).items():
            if (v < 0).any():
                raise ValueError(f"{path}: v/{name}: expected at least 0, got {float(v.min()):g}")
    return State(step, params, AdamWState(step, *averages) if averages else None), about


def saved_step(path: Path) -> int | None:
    """The step of the checkpoint that is there; None: there is none."""
    if not path.is_file():
        return None
    with open_arrays(path) as file:
        return _read_header(file, f"{path}: {HEADER}")[0]


def _read_header(file: ArrayFile, where: str) -> tuple[int, dict[str, Any]]:
    """The step, and what the caller wrote."""
    header = parse_json(file.header(), where)
    step, about = header.get("step"), header.get("about")
    if header.get("format") != FORMAT or type(step) is not int or step < 0 or not isinstance(about, dict):
        raise ValueError(f"{where}: expected format {FORMAT}, a step and what it is about, got others")
    return step, about
