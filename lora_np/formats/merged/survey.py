"""What is in an adapter's folder, or in llama.cpp's file of one, read without its base."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...adapter import LoRAConfig, adapted_shapes, fused_parts
from ...backend import Array, asnumpy, xp
from ...lora import singular_directions
from ...model import Config
from ..adapters.adapter import kind_of
from ..adapters.base import load_base_for
from ..adapters.gguf import ALPHA, TABLE, read_updates, tensor_name
from ..adapters.peft import CONFIG, WEIGHTS
from ..adapters.peft_config import PATTERNS, READ, check_keys, expressions_in, resolved
from ..adapters.peft_tensors import PREFIX
from ..files.json_file import from_fields, read_json
from ..files.messages import named
from ..files.safetensors_file import TensorFile, open_tensors, refuse_pickle
from ..models.base import Base
from ..models.gguf_file import open_gguf
from ..models.names import module_names
from .base import open_base

FACTORS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}


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
    """An adapter: what adapter_config.json says, its modules, and the tensors that are trained whole."""

    config: dict[str, Any]
    modules: list[Module]
    whole: list[str]


@named
def survey(path: str | os.PathLike[str]) -> Survey:
    """Reads an adapter's folder, or a .gguf file of one, whose modules have the names of the base's tensors there.

    A FileNotFoundError or ValueError, in one line, says what is missing or damaged.
    """
    folder = Path(path)
    if kind_of(folder) == "gguf":
        return _survey_gguf(folder)
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
        others = sorted(file.shapes.keys() - factors)
        whole = [key.removeprefix(PREFIX) for key in others]
        misnamed = [key for key in whole if "lora_" in key.lower()]
        if misnamed or not pairs:
            raise ValueError(f"{file.path}: expected lora_A and lora_B of each module, got {(misnamed or whole)[:1]}")
        scales = _scales(raw, {name: _rank(file, *keys) for name, keys in pairs.items()}, str(folder / CONFIG))
        modules = [_module(name, _matrix(file, A), _matrix(file, B), scales[name]) for name, (A, B) in pairs.items()]
        for module in modules:
            if not math.isfinite(module.norm_update):
                raise ValueError(
                    f"{file.path}: {module.name}: the norm of s B A is too large, with s = {module.scale:g}"
                )
        for key in others:
            file.read_finite(key)
        return Survey(raw, modules, whole)


def _survey_gguf(path: Path) -> Survey:
    with open_gguf(path) as file:
        updates, alpha = read_updates(file), file.metadata.get(ALPHA)
    modules = []
    for name, (A, B, s, *_) in updates.items():
        if name == TABLE:  # the look-up, which counts as (D, V)
            A, B = B.T, A.T
        modules.append(_module(name, A.astype(np.float64), B.astype(np.float64), s))
    targets = sorted({name.split(".")[-2] for name in updates if "." in name})
    return Survey({"target_modules": targets, "lora_alpha": alpha}, modules, [])


def _scales(raw: dict[str, Any], ranks: dict[str, int], where: str) -> dict[str, float]:
    """s of each module (L1), whose ranks are those of its tensors; a ValueError if the configuration has others."""
    fields = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "bias": "bias", "rslora": "use_rslora"}
    config = from_fields(LoRAConfig, {ours: raw.get(key, READ[key]) for ours, key in fields.items()}, where)
    same = {name: name for name in ranks}
    fits = expressions_in(raw, PATTERNS, list(ranks), where)
    said = resolved(raw, "rank_pattern", same, config.r, fits, where)
    alphas = resolved(raw, "alpha_pattern", same, config.alpha, fits, where)
    for name, rank in ranks.items():
        if said[name] != rank:
            raise ValueError(f"{where}: {name}: expected rank {rank}, as its tensors have, got {said[name]}")
    return {name: alphas[name] / (math.sqrt(rank) if config.rslora else rank) for name, rank in ranks.items()}


def _rank(file: TensorFile, A: str, B: str) -> int:
    """The rank of two tensors; a ValueError unless they are A (r, in) and B (out, r)."""
    a, b = file.shapes[A], file.shapes[B]
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or min(a + b) < 1:
        raise ValueError(f"{file.path}: {A}: expected A (r, in) and B (out, r), got A {a} and B {b}")
    return a[0]


def _matrix(file: TensorFile, key: str) -> Array:
    return file.read_finite(key).astype(np.float64)


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
            raise ValueError(
                f"{adapter}: {module.name}: expected a module of {base}, got "
                + (f"shape {module.n_out} x {module.n_in}, there it is {shapes[ours]}" if ours in shapes else "another")
            )
        weights = [_weight_of(config, part) for part in fused_parts(config, ours)]
        parts = [_scaled(_wide(opened.weights[name])) for name in weights]
        norms.append(math.hypot(*(size * float(np.linalg.norm(W)) for size, W in parts)))
    return norms


def _weight_of(config: Config, matrix: str) -> str:
    """The name of a matrix's weight; a tied head's is the token table's."""
    return {"embed.tokens": "embed.tokens", "head": config.head_weight}.get(matrix, f"{matrix}.weight")


def _wide(values: Array) -> Array:
    return asnumpy(values).astype(np.float64, copy=False)
