"""What is in an adapter's folder, read without its base."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array
from .layout import PREFIX
from .peft import CONFIG, WEIGHTS
from .peft_config import READ, check_keys, resolved
from .plain import read_json
from .safe import TensorFile, open_tensors, refuse_pickle

FACTORS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}


class Module(NamedTuple):
    """An adapted module, under the file's own name, and the Frobenius norms of its A, its B and s B A (L1)."""

    name: str
    n_out: int
    n_in: int
    rank: int
    scale: float
    norm_A: float
    norm_B: float
    norm_update: float


class Survey(NamedTuple):
    """An adapter: what adapter_config.json says, its modules, and the tensors that are trained whole."""

    config: dict[str, Any]
    modules: list[Module]
    whole: list[str]


def survey(path: str | os.PathLike[str]) -> Survey:
    """Reads an adapter's folder. A FileNotFoundError or ValueError, in one line, says what is missing or damaged."""
    folder = Path(path)
    refuse_pickle(folder, WEIGHTS)
    raw = read_json(folder / CONFIG)
    check_keys(raw, str(folder / CONFIG))
    with open_tensors(folder / WEIGHTS) as file:
        pairs = {
            key.removeprefix(PREFIX).removesuffix(ending): (key, key.removesuffix(ending) + other)
            for key in file.shapes
            for ending, other in FACTORS.items()
            if key.endswith(ending)
        }
        factors = {key for pair in pairs.values() for key in pair}
        for key in sorted(factors - file.shapes.keys()):
            raise ValueError(f"{file.path}: the tensor {key} is missing")
        scales = _scales(raw, list(pairs), str(folder / CONFIG))
        modules = [
            _module(name, _matrix(file, A), _matrix(file, B), scales[name], file) for name, (A, B) in pairs.items()
        ]
        return Survey(raw, modules, sorted(key.removeprefix(PREFIX) for key in file.shapes.keys() - factors))


def _scales(raw: dict[str, Any], names: list[str], where: str) -> dict[str, float]:
    """s of each module (L1)."""
    same = {name: name for name in names}
    ranks = resolved(raw, "rank_pattern", same, raw.get("r", READ["r"]), where)
    alphas = resolved(raw, "alpha_pattern", same, raw.get("lora_alpha", READ["lora_alpha"]), where)
    power = 0.5 if raw.get("use_rslora") else 1.0
    return {name: alphas[name] / max(ranks[name], 1) ** power for name in names}


def _matrix(file: TensorFile, key: str) -> Array:
    if len(file.shapes[key]) != 2:
        raise ValueError(f"{file.path}: {key}: expected a matrix, got shape {file.shapes[key]}")
    return file.read_finite(key).astype(np.float64)


def _module(name: str, A: Array, B: Array, s: float, file: TensorFile) -> Module:
    if len(A) != B.shape[1]:
        raise ValueError(f"{file.path}: {name}: A {A.shape} and B {B.shape} do not fit together")
    # |B A|^2 is the trace of (A A^T)(B^T B): no product of the module's own size is formed. Of A and B of size 1, as
    # squares of numbers that a file may hold overflow.
    (a, A), (b, B) = _scaled(A), _scaled(B)
    update = abs(s) * a * b * float(np.sqrt(max(0.0, float(((A @ A.T) * (B.T @ B)).sum()))))
    norms = a * float(np.linalg.norm(A)), b * float(np.linalg.norm(B)), update
    return Module(name, len(B), A.shape[1], len(A), s, *norms)


def _scaled(matrix: Array) -> tuple[float, Array]:
    """A matrix as its largest element times another."""
    largest = float(np.abs(matrix).max(initial=0.0)) or 1.0
    return largest, matrix / largest
