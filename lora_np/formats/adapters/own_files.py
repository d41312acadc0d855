"""Adapters in one file that `save_adapter` wrote, loralib's .safetensors and .npz, read without their base.

By the names that the file has: in .npz our own, in .safetensors those of the model's family.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...adapter import Adapter, LoRAConfig
from ...backend import Array, asnumpy
from ..files.messages import named, shown
from ..files.npz_file import HEADER, open_arrays
from ..models.names import our_names
from ..models.shards import Stored, stored_tensors
from .contents import Contents, Pair
from .fused_qkv import config_apart, three
from .header import KEY, check_config, read_about
from .loralib import FACTORS
from .npz import KINDS


@named
def read_file(path: Path) -> Contents:
    """A ValueError or FileNotFoundError, in one line, says what is missing or damaged, or not said by the file."""
    return _read_npz(path) if path.suffix.lower() == ".npz" else _read_loralib(path)


def _read_npz(path: Path) -> Contents:
    with open_arrays(path) as file:
        lora_config, names = check_config(read_about(file.header(), f"{path}: {HEADER}"), str(path))
        for name in sorted(file.members.keys() ^ {HEADER, *names}):
            missing = "is missing" if name in names else "has no place in this adapter"
            raise ValueError(f"{path}: the array {shown(name)} {missing}")
        for name in (name for name in names if file.members[name].dtype.str not in KINDS):
            raise ValueError(f"{path}: {name}: expected floats, got {file.members[name].dtype}")
        params = {name: file.read(name) for name in names}
    for name, value in params.items():
        if not np.isfinite(value).all():
            raise ValueError(f"{path}: {name}: holds NaN or infinite numbers")
    adapter = Adapter(lora_config, params)
    pairs = {
        name: [
            _pair(
                lora_config, name, params[f"{name}.A"], params[f"{name}.B"], is_look_up=name == "embed.tokens"
            )._replace(m=params.get(f"{name}.m"))
        ]
        for name in adapter.matrices
    }
    whole = {name: asnumpy(value) for name, value in adapter.whole.items()}
    return Contents(path, _described(lora_config), pairs, whole, {}, {})


def _read_loralib(path: Path) -> Contents:
    tensors = stored_tensors(path.parent, path.name)
    metadata = next((stored.file.metadata for stored in tensors.values()), {})
    if KEY not in metadata:
        raise ValueError(
            f"{path}: loralib's files do not say lora_alpha, and so no scale: lora-np convert takes it with --alpha, "
            "and writes what says it"
        )
    lora_config, names = check_config(read_about(metadata[KEY], f"{path}: metadata"), f"{path}: metadata")
    modules = dict.fromkeys(key.rpartition(".")[0] for key in tensors if key.endswith(FACTORS))
    ours = our_names(modules)
    if ours is None:
        raise ValueError(f"{path}: {shown(next(iter(modules), 'none'))}: expected modules of one family of models")
    if any(f"{name[:-1]}qkv.A" in names for name in ours.values() if name.endswith((".q", ".k", ".v"))):
        # A family that keeps the three apart.
        lora_config, names = config_apart(lora_config), [part for name in names for part in three(name)]
    pairs = {module: [_merged_linear(path, tensors, module, ours[module], lora_config, names)] for module in modules}
    whole = {key: stored.read_finite() for key, stored in tensors.items() if not key.endswith(FACTORS)}
    return Contents(path, _described(lora_config), pairs, whole, {}, {})


def _merged_linear(
    path: Path,
    tensors: Mapping[str, Stored],
    module: str,
    name: str,
    lora_config: LoRAConfig,
    names: Collection[str],
) -> Pair:
    """A module's pair; of a MergedLinear, A of its parts one below the other, and B in blocks, zero between."""
    for end in FACTORS:
        if module + end not in tensors:
            raise ValueError(f"{path}: the tensor {shown(module + end)} is missing")
    A, B = (tensors[module + end].read_finite() for end in FACTORS)
    if A.ndim != 2 or B.ndim != 2 or 0 in (*A.shape, *B.shape) or len(A) % B.shape[1]:
        raise ValueError(f"{path}: {shown(module)}: expected A (n r, in) and B (out, r), got {A.shape} and {B.shape}")
    r = B.shape[1]
    parts = [name] if f"{name}.A" in names else [f"{name[:-3]}{part}" for part in "qkv"]
    enabled = [part for part in parts if f"{part}.A" in names]
    if not enabled or len(A) != len(enabled) * r or len(B) % len(enabled) or lora_config.rank(enabled[0]) != r:
        raise ValueError(f"{path}: {shown(module)}: the metadata has other ranks than A {A.shape} and B {B.shape}")
    if parts != [name]:
        rows = len(B) // len(enabled)
        blocks = np.zeros((len(parts) * rows, len(A)), B.dtype)
        for i, part in enumerate(enabled):
            at = parts.index(part) * rows
            blocks[at : at + rows, i * r : (i + 1) * r] = B[i * rows : (i + 1) * rows]
        B = blocks
    found = _pair(lora_config, enabled[0], A, B, is_look_up=name == "embed.tokens")
    return found._replace(r=len(A), alpha=None)


def _pair(lora_config: LoRAConfig, name: str, A: Array, B: Array, *, is_look_up: bool) -> Pair:
    return Pair(A, B, lora_config.scale(name), len(A), is_look_up=is_look_up)


def _described(lora_config: LoRAConfig) -> dict[str, Any]:
    """The configuration by PEFT's keys."""
    return {
        "target_modules": list(lora_config.targets), "r": lora_config.r, "lora_alpha": lora_config.alpha,
        "lora_dropout": lora_config.dropout, "bias": lora_config.bias, "use_rslora": lora_config.rslora,
        "rank_pattern": dict(lora_config.rank_pattern), "alpha_pattern": dict(lora_config.alpha_pattern),
        "use_dora": lora_config.dora,
    }  # fmt: skip
