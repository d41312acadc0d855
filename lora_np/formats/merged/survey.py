"""What is in an adapter's folder, or in llama.cpp's file of one, read without its base."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...adapter import adapted_shapes, fused_parts
from ...backend import Array, asnumpy, xp
from ...lora import singular_directions
from ...model import Config
from ..adapters.adapter import kind_of
from ..adapters.base import load_base_for
from ..adapters.contents import read_contents
from ..adapters.gguf import ALPHA, TABLE, read_updates, tensor_name
from ..adapters.peft import WEIGHTS
from ..files.messages import named
from ..models.base import Base
from ..models.gguf_file import open_gguf
from ..models.names import module_names
from .any_base import open_any_base
from .base import open_base
from .matching import base_keys


class Module(NamedTuple):
    """An adapted module, under the file's own name, and the Frobenius norms of its A, its B and s B A (L1).

    effective_rank: how many of B A's singular values count: e to the power of the entropy of their shares of their sum
    (Roy and Vetterli 2007); from 1 to the rank, and 0 where B A = 0.
    """

    name: str
    n_out: int
    n_in: int
    rank: int
    scale: float
    norm_A: float
    norm_B: float
    norm_update: float
    effective_rank: float


class Survey(NamedTuple):
    """An adapter: what adapter_config.json says, its modules, and the tensors that are trained whole.

    remarks: what is wrong with the file, though it can be read
    """

    config: dict[str, Any]
    modules: list[Module]
    whole: list[str]
    remarks: list[str]


@named
def survey(path: str | os.PathLike[str]) -> Survey:
    """Reads an adapter's folder, or a .gguf file of one, whose modules have the names of the base's tensors there.

    A FileNotFoundError or ValueError, in one line, says what is missing or damaged.
    """
    folder = Path(path)
    if kind_of(folder) == "gguf":
        return _survey_gguf(folder)
    found = read_contents(folder)
    modules = []
    for name, pairs in found.pairs.items():
        for pair in pairs:
            module = _module(name, pair.A.astype(np.float64), pair.B.astype(np.float64), pair.s)
            if not math.isfinite(module.norm_update):
                raise ValueError(
                    f"{folder / WEIGHTS}: {name}: the norm of s B A is too large, with s = {module.scale:g}"
                )
            modules.append(module)
    return Survey(dict(found.raw), modules, [*found.whole, *found.rows], found.remarks)


def _survey_gguf(path: Path) -> Survey:
    with open_gguf(path) as file:
        updates, alpha = read_updates(file), file.metadata.get(ALPHA)
    modules = []
    for name, (A, B, s, *_) in updates.items():
        if name == TABLE:  # the look-up, which counts as (D, V)
            A, B = B.T, A.T
        modules.append(_module(name, A.astype(np.float64), B.astype(np.float64), s))
    targets = sorted({name.split(".")[-2] for name in updates if "." in name})
    return Survey({"target_modules": targets, "lora_alpha": alpha}, modules, [], [])


def _module(name: str, A: Array, B: Array, s: float) -> Module:
    # Of A and B of size 1, as squares of numbers that a file may hold overflow.
    (a, A), (b, B) = _scaled(A), _scaled(B)
    sigma = asnumpy(singular_directions(xp.asarray(A), xp.asarray(B))[1])
    size = abs(s) * a * b * float(np.linalg.norm(sigma))
    norms = a * float(np.linalg.norm(A)), b * float(np.linalg.norm(B)), size
    return Module(name, len(B), A.shape[1], len(A), s, *norms, _effective_rank(sigma))


def _scaled(matrix: Array) -> tuple[float, Array]:
    """A matrix as its largest element times another."""
    largest = float(np.abs(matrix).max(initial=0.0)) or 1.0
    return largest, matrix / largest


def _effective_rank(sigma: Array) -> float:
    total = float(sigma.sum())
    shares = sigma[sigma > 0] / total if total > 0 else sigma[:0]
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def base_norms(base: str | os.PathLike[str], adapter: str | os.PathLike[str], modules: Sequence[Module]) -> list[float]:
    """The Frobenius norm of each module's W0, read one by one from the base's folder, or all at once from a .gguf file.

    A ValueError names a module that the base lacks, or that has another shape there.
    """
    if "gguf" in (kind_of(adapter), Path(base).suffix.lower()[1:]):
        return _norms_by_our_names(base, adapter, modules)
    opened = open_any_base(Path(base))
    keys = base_keys(opened, read_contents(adapter))
    norms = []
    for module in modules:
        stored = opened.tensors.get(keys[module.name])
        if stored is None or stored.shape not in ((module.n_out, module.n_in), (module.n_in, module.n_out)):
            raise _another(base, adapter, module, None if stored is None else stored.shape)
        size, W = _scaled(stored.read("float64"))
        norms.append(size * float(np.linalg.norm(W)))
    return norms


def _another(
    base: str | os.PathLike[str], adapter: str | os.PathLike[str], module: Module, shape: tuple[int, ...] | None
) -> ValueError:
    found = "another" if shape is None else f"shape {module.n_out} x {module.n_in}, there it is {shape}"
    return ValueError(f"{adapter}: {module.name}: expected a module of {base}, got {found}")


def _norms_by_our_names(
    base: str | os.PathLike[str], adapter: str | os.PathLike[str], modules: Sequence[Module]
) -> list[float]:
    is_gguf = Path(base).suffix.lower() == ".gguf"
    opened: Base = load_base_for(adapter, base) if is_gguf else open_base(base, [Path(adapter)])
    config = opened.config
    shapes = adapted_shapes(config)
    names = {theirs: ours for ours, theirs in module_names(config).items()}
    if kind_of(adapter) == "gguf":
        names = {tensor_name(ours): ours for ours in shapes}
    norms = []
    for module in modules:
        ours = names.get(module.name, "")
        if shapes.get(ours) != (module.n_out, module.n_in):
            raise _another(base, adapter, module, shapes.get(ours))
        weights = [_weight_of(config, part) for part in fused_parts(config, ours)]
        parts = [_scaled(_wide(opened.weights[name])) for name in weights]
        norms.append(math.hypot(*(size * float(np.linalg.norm(W)) for size, W in parts)))
    return norms


def _weight_of(config: Config, matrix: str) -> str:
    """The name of a matrix's weight; a tied head's is the token table's."""
    return {"embed.tokens": "embed.tokens", "head": config.head_weight}.get(matrix, f"{matrix}.weight")


def _wide(values: Array) -> Array:
    return asnumpy(values).astype(np.float64, copy=False)
