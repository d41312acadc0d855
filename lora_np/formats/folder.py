"""The package's own model folder: config.json, and model.safetensors with the weights under our own names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import Array, asnumpy
from ..model import Config, Model, init_weights
from .atomic import new_folder, write_tensors
from .plain import from_fields, read_json, to_fields, to_json
from .safe import TensorFile, open_tensors, refuse_pickle

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE, FORMAT = "lora_np", 1


def model_hash(model: Model) -> str:
    """The SHA-256 of a model's weights, by which an adapter knows its base. -> 64 hexadecimal digits.

    Over each weight, in the order of their names: a line with its name, dtype and shape, then its bytes, row by row,
    the least significant byte of a number first. The configuration is no part of it.
    """
    return weights_hash(model.weights)


def weights_hash(weights: Mapping[str, Array]) -> str:
    """`model_hash` of a flat dict of weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = np.ascontiguousarray(asnumpy(weights[name]))
        digest.update(f"{name} {value.dtype.name} {'x'.join(map(str, value.shape))}\n".encode())
        digest.update(value.astype(value.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def save_model(path: str | os.PathLike[str], model: Model) -> None:
    """Writes a model as a new folder, in its own dtype, bit for bit. `load_model` reads it.

    All is written beside it first and renamed at the end: an interrupted write leaves nothing at `path`. A
    FileExistsError if there is anything at `path`; a TypeError if the weights are complex.
    """
    if model.dtype.name not in ("float32", "float64"):
        raise TypeError(f"save_model: expected float32 or float64 weights, got {model.dtype}")
    header = {
        "model_type": MODEL_TYPE,
        "format": FORMAT,
        "config": to_fields(model.config),
        "base_sha256": model_hash(model),
    }
    with new_folder(Path(path)) as folder:
        write_tensors(folder / WEIGHTS, {name: asnumpy(value) for name, value in model.weights.items()})
        (folder / CONFIG).write_text(to_json(header, indent=2) + "\n", encoding="utf-8")


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    head: str | None = None,
    n_labels: int | None = None,
    seed: int | None = None,
) -> Model:
    """Reads a folder that `save_model` wrote; the weights are checked against the hash that it recorded.

    dtype: float32 or float64; None keeps the file's.
    head, n_labels: another head than the file's (lm, classify, tag, none; labels). Weights of the file that it has no
    use for are left out; those that the file lacks are init_weights' for `seed`, which must then be given.
    A FileNotFoundError or ValueError, in one line, says which file is missing, of another model type, or damaged.
    """
    folder = Path(path)
    if dtype is not None and dtype not in ("float32", "float64"):
        raise ValueError(f"load_model: dtype: expected float32 or float64, got {dtype!r}")
    saved, expected_hash = _read_header(folder)
    refuse_pickle(folder, WEIGHTS)
    with open_tensors(folder / WEIGHTS) as file:
        weights = _read_weights(file, saved)
    if weights_hash(weights) != expected_hash:
        raise ValueError(f"{folder / WEIGHTS}: damaged: the weights are not those that were saved (SHA-256 differs)")
    config = _with_head(saved, head, n_labels)
    kept = _kept(saved, config, weights)
    del weights
    missing = config.weight_shapes().keys() - kept.keys()
    if missing:
        if seed is None:
            raise ValueError(f"{folder}: expected a seed to make what it lacks: {' '.join(sorted(missing))}")
        made = init_weights(config, seed=seed, dtype=str(kept["embed.tokens"].dtype))
        kept |= {name: made[name] for name in missing}
    if dtype is not None:
        for name in kept:  # one by one, so that both copies of one weight alone are held
            kept[name] = kept[name].astype(dtype, copy=False)
    return Model(config, kept)


def _read_header(folder: Path) -> tuple[Config, str]:
    """The Config of a folder, and its weights' hash."""
    if folder.suffix.lower() == ".gguf":
        raise ValueError(f"{folder}: model type gguf is not supported; supported: {MODEL_TYPE}")
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder with {CONFIG} and {WEIGHTS}, got a file")
    where = folder / CONFIG
    header = read_json(where)
    if header.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{where}: model type {header.get('model_type')!r} is not supported; supported: {MODEL_TYPE}")
    if header.get("format") != FORMAT:
        raise ValueError(f"{where}: format: expected {FORMAT}, got {header.get('format')!r}")
    if not isinstance(header.get("base_sha256"), str):
        raise ValueError(f"{where}: base_sha256: expected the weights' hash, got {header.get('base_sha256')!r}")
    return from_fields(Config, header.get("config"), str(where)), header["base_sha256"]


def _read_weights(file: TensorFile, config: Config) -> dict[str, Array]:
    """The weights, exactly those of the configuration, all of one dtype."""
    if config.n_layer > len(file.shapes):  # before a list of weights is made that no memory holds
        raise ValueError(f"{file.path}: {CONFIG} says {config.n_layer} layers, the file has {len(file.shapes)} tensors")
    shapes = config.weight_shapes()
    file.check_names(shapes)
    if len(set(file.dtypes.values())) > 1:
        raise ValueError(f"{file.path}: expected one dtype, got {' and '.join(sorted(set(file.dtypes.values())))}")
    return {name: file.read(name) for name in shapes}


def _with_head(saved: Config, head: str | None, n_labels: int | None) -> Config:
    """The configuration with another head; None keeps what the file has."""
    if head is None and n_labels is None:
        return saved
    fields: dict[str, Any] = {
        "head": saved.head if head is None else head,
        "n_labels": saved.n_labels if n_labels is None else n_labels,
    }
    if fields["head"] not in ("classify", "tag"):
        if n_labels is not None:
            raise ValueError(f"load_model: n_labels is for head classify or tag, but the head is {fields['head']!r}")
        fields["n_labels"] = None
    return replace(saved, **fields)


def _kept(saved: Config, config: Config, weights: Mapping[str, Array]) -> dict[str, Array]:
    """What of the file's weights the configuration uses. A head of another kind or size is no use to it."""
    same_head = (saved.head, saved.n_labels) == (config.head, config.n_labels)
    return {
        name: weights[name]
        for name in config.weight_shapes()
        if name in weights and (same_head or not name.startswith("head."))
    }
