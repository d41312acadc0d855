"""An adapter to a file or folder and back: PEFT's folder, loralib's .safetensors, llama.cpp's .gguf, our own .npz."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...adapter import Adapter
from ...checks import expect
from ...model import Model, check_model
from ..files.messages import named
from ..files.safetensors_file import PICKLES, saved_anew
from ..models.base import Base
from . import gguf, loralib, npz, peft

_FORMATS: Mapping[str, Any] = {"peft": peft, "loralib": loralib, "gguf": gguf, "npz": npz}  # by `kind_of`


def save_adapter(path: str | os.PathLike[str], adapter: Adapter, model: Model) -> None:
    """Writes an adapter of `model`; `load_adapter` gives it back, bit for bit. What is written, `path` says:

    a folder       PEFT's (`peft`); in an existing one the two files are replaced
    .safetensors   loralib's names (`loralib`), a new file
    .gguf          llama.cpp's (`gguf`), a new file; where one alpha does not do, B comes back within a rounding
    .npz           our own names (`npz`), a new file

    All is written, or nothing. A FileExistsError, ValueError or TypeError, in one line, says why not.
    """
    expect("save_adapter: path", path, (str, os.PathLike), "a path")
    expect("save_adapter: adapter", adapter, Adapter, "an Adapter")
    check_model(model)
    _FORMATS[kind_of(path)].save_adapter(path, adapter, model)


@named
def load_adapter(
    path: str | os.PathLike[str], model: Base, *, alpha: float | None = None, enabled: Sequence[str] | None = None
) -> Adapter:
    """Reads an adapter of `model` from PEFT's folder, loralib's .safetensors, llama.cpp's .gguf, or `save_adapter`'s.

    alpha, enabled: what loralib's own files do not say: its lora_alpha, and which of q, k, v a MergedLinear adapts
    (`loralib`); a ValueError for any other file. float32 is widened for a float64 model, never rounded the
    other way. A FileNotFoundError or ValueError, in one line, names the file, and the key or tensor, that is missing,
    damaged, not supported, or made for another base.
    """
    expect("model", model, Base, "a Model, as Model(config, weights) makes it")
    kind = kind_of(path)
    if kind == "loralib":
        return loralib.load_adapter(path, model, alpha=alpha, enabled=enabled)
    if alpha is not None or enabled is not None:
        raise ValueError(f"{path}: alpha and enabled are for loralib's .safetensors files; this says them itself")
    return _FORMATS[kind].load_adapter(path, model)


def kind_of(path: str | os.PathLike[str]) -> str:
    """peft, loralib, gguf or npz: what an adapter of this path is. A ValueError if it is a pickle file."""
    path = Path(path)
    suffix = "" if path.is_dir() else path.suffix.lower()
    if suffix in PICKLES:
        raise ValueError(
            f"{path}: refused: a pickle file can run any code when it is read; save it anew: "
            + saved_anew(path.name, f"{path.stem}.safetensors")
        )
    return {".safetensors": "loralib", ".gguf": "gguf", ".npz": "npz"}.get(suffix, "peft")
