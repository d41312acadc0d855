"""Adapters as .npz: our own names, and a header that says the rest. NumPy alone reads and writes it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ...adapter import Adapter
from ...backend import asnumpy
from ...model import Model
from ..files.atomic import new_file
from ..files.messages import shown
from ..files.npz_file import HEADER, open_arrays
from ..files.safetensors_file import DTYPES, check_widens
from ..models.base import Base
from .header import check_about, check_savable, read_about, write_about
from .peft_tensors import param_shapes

KINDS = {np.dtype(dtype).str: name for name, dtype in DTYPES.items()}  # "<f4" -> "F32"


def save_adapter(path: str | os.PathLike[str], adapter: Adapter, model: Model) -> None:
    """Writes an adapter of `model` as a new .npz file: its parameters, each under its name, and a header in JSON.

    A FileExistsError if there is anything at `path`; a ValueError or TypeError if the adapter does not fit the model.
    """
    check_savable(adapter, model)
    param_shapes(model.config, adapter.config, list(adapter.params))
    header = np.frombuffer(write_about(adapter, model).encode(), dtype=np.uint8)
    arrays = {name: np.ascontiguousarray(asnumpy(value)) for name, value in adapter.params.items()}
    with new_file(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez(file, **{HEADER: header}, **arrays)  # type: ignore[arg-type]


def load_adapter(path: str | os.PathLike[str], model: Base) -> Adapter:
    """Reads an adapter of `model` from a file that `save_adapter` wrote: the same bits, float32 widened for float64.

    A FileNotFoundError or ValueError, in one line, says what is missing, damaged, or made for another base. Nothing in
    the file is executed, and no more memory taken than the file is long.
    """
    path = Path(path)
    with open_arrays(path) as file:
        about = read_about(file.header(), f"{path}: {HEADER}")
        members = {name: member for name, member in file.members.items() if name != HEADER}
        kinds = [KINDS.get(member.dtype.str, "") for member in members.values()]
        lora_config, names = check_about(about, model, kinds, str(path))
        try:
            shapes = param_shapes(model.config, lora_config, names)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        for name in sorted(shapes.keys() ^ members.keys()):
            missing = "is missing" if name in shapes else "has no place in this adapter"
            raise ValueError(f"{path}: the array {shown(name)} {missing}")
        params = {}
        for name, shape in shapes.items():
            where, member = f"{path}: {name}", members[name]
            if member.dtype.str not in KINDS or member.shape != shape:
                raise ValueError(f"{where}: expected floats {shape}, got {member.dtype} {member.shape}")
            check_widens(member.dtype.name, model.dtype, where)
            params[name] = file.read(name).astype(model.dtype, copy=False)
        return Adapter(lora_config, params)
