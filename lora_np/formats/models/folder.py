"""A model's folder: config.json and model.safetensors. The package's own, with our names, and the way to others'."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...backend import Array, asnumpy
from ...checks import expect
from ...model import Config, Model, check_model
from ...storage import widened
from ..files.atomic import new_folder, write_tensors
from ..files.json_file import from_fields, read_json, to_fields, write_json
from ..files.messages import named
from ..files.safetensors_file import DTYPES, TensorFile, open_tensors, refuse_pickle
from .base import STORAGES, Base, Storage, Wanted, check_layers
from .families import MODEL_TYPES
from .gguf import load_gguf
from .heads import taken, with_head
from .huggingface import Files, Place, load_files, load_huggingface, read_config
from .shards import Stored
from .tokenizer import Tokenizer
from .tokenizer_files import write_tokenizer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE, FORMAT = "lora_np", 1
SUPPORTED = (MODEL_TYPE, *MODEL_TYPES)


def model_hash(model: Base) -> str:
    """The SHA-256 of a model's weights, by which an adapter knows its base. -> 64 hexadecimal digits.

    Over each weight, in the order of their names: a line with its name, dtype and shape, then its bytes, row by row,
    the least significant byte of a number first; what is held in bfloat16 counts as float32. The configuration is no
    part of it.
    """
    return weights_hash(model.weights)


def weights_hash(weights: Mapping[str, Array], dtype: str | None = None) -> str:
    """`model_hash` of a flat dict of weights. dtype: as they were in it, where it holds each number of a weight."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = np.ascontiguousarray(asnumpy(widened(weights[name])))
        if dtype is not None:
            value = _unwidened(value, dtype)
        digest.update(_heading(name, value.dtype.name, value.shape))
        digest.update(value.astype(value.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def stored_hash(tensors: Mapping[str, Stored]) -> str:
    """`model_hash` of the tensors in a file of our own, read a part at a time: it has their very bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(_heading(name, DTYPES[tensors[name].dtype], tensors[name].shape))
        for part in tensors[name].parts():
            digest.update(part)
    return digest.hexdigest()


def _heading(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """What stands before a weight's bytes in the hash."""
    return f"{name} {dtype} {'x'.join(map(str, shape))}\n".encode()


def _unwidened(value: Array, dtype: str) -> Array:
    """The same numbers in `dtype`; the array as it is where one of them would be rounded."""
    with np.errstate(over="ignore"):
        narrow = value.astype(dtype, copy=False)
    return narrow if np.array_equal(narrow, value) else value


def save_model(
    path: str | os.PathLike[str], model: Model, *, tokenizer: str | os.PathLike[str] | Tokenizer | None = None
) -> None:
    """Writes a model as a new folder, in its own dtype, bit for bit. `load_model` reads it.

    tokenizer: what `load_tokenizer` gave, or the path that it is given: it is written beside the weights, with its chat
    template, so that `load_tokenizer` and the commands take the folder; None: none is, as a model of bytes needs none.
    All is written beside it first and renamed at the end: an interrupted write leaves nothing at `path`. A
    FileExistsError if there is anything at `path`; a TypeError if the weights are complex, a ValueError if one is NaN
    or infinite; errors of `load_tokenizer`.
    """
    expect("save_model: path", path, (str, os.PathLike), "a path")
    check_model(model)
    if model.dtype.name not in ("float32", "float64"):
        raise TypeError(f"save_model: expected float32 or float64 weights, got {model.dtype}")
    for name, value in model.weights.items():
        if not np.isfinite(asnumpy(widened(value))).all():
            raise ValueError(f"save_model: {name}: holds NaN or infinite numbers")
    with new_folder(Path(path)) as folder:
        write_tensors(folder / WEIGHTS, {name: asnumpy(widened(value)) for name, value in model.weights.items()})
        write_json(folder / CONFIG, own_header(model.config, model_hash(model)))
        if tokenizer is not None:
            write_tokenizer(folder, tokenizer)


def own_header(config: Config, base_sha256: str) -> dict[str, Any]:
    """config.json of a folder of our own."""
    return {"model_type": MODEL_TYPE, "format": FORMAT, "config": to_fields(config), "base_sha256": base_sha256}


@named
def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    head: str | None = None,
    n_labels: int | None = None,
    seed: int | None = None,
    storage: Storage | None = None,
) -> Model:
    """Reads a folder that `save_model` wrote, one of Hugging Face's (the families in families/), or a .gguf file.

    All weights must be finite. Those of our own are checked against the hash that was recorded; those of others must
    all have a place in the model.
    dtype: float32 or float64; None keeps the file's, float16 and bfloat16 widened to float32.
    head, n_labels: another head than the file's (lm, classify, tag, none; labels). Weights of the file that it has no
    use for are left out; those that the file lacks are init_weights' for `seed`, which must then be given.
    storage: how matrices are held, in float32 only; they are widened where they are used, a block of rows at a time.
    "bfloat16": half the memory, where the file's numbers are bfloat16's: the same results, but for the rounding of
    products by blocks. "nf4": the layers' matrices rounded to four bits (L11), a sixth of the memory; tables and the
    head stay as they are. "gguf": a .gguf file's matrices in Q8_0, Q4_0 and Q4_1 as the file has them.
    A FileNotFoundError or ValueError, in one line, says which file is missing, of another model type, or damaged, and
    which key or tensor is at fault.
    """
    if dtype is not None and dtype not in ("float32", "float64", np.float32, np.float64):
        raise ValueError(f"load_model: dtype: expected float32 or float64, got {dtype!r}")
    dtype = None if dtype is None else np.dtype(dtype).name
    if storage is not None and dtype == "float64":
        raise ValueError(f"load_model: storage {storage}: expected dtype float32 or None, got float64")
    if storage is not None and storage not in STORAGES:
        raise ValueError(f"load_model: storage: expected {', '.join(STORAGES)} or None, got {storage!r}")
    folder, wanted = Path(path), Wanted(dtype, head, n_labels, seed, storage)
    if folder.suffix.lower() == ".gguf":
        return load_gguf(folder, wanted)
    if storage == "gguf":
        raise ValueError(f"{folder}: storage gguf: expected a .gguf file, whose blocks are kept as they are")
    header = read_header(folder)
    if header["model_type"] in MODEL_TYPES:
        return load_huggingface(folder, header, wanted)
    return load_files(folder, open_own(folder, header, head=head, n_labels=n_labels), wanted)


def read_header(folder: Path) -> dict[str, Any]:
    """config.json, of a model type that can be run."""
    header = read_any_header(folder)
    if header["model_type"] not in SUPPORTED:
        raise _unsupported(folder, header["model_type"])
    return header


def _unsupported(folder: Path, found: object) -> ValueError:
    return ValueError(
        f"{folder / CONFIG}: model type {found!r:.60} is not supported; supported: {' '.join(SUPPORTED)}; others "
        "are merged and verified by their tensors' names"
    )


def read_any_header(folder: Path) -> dict[str, Any]:
    """config.json, of any model type."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    refuse_pickle(folder, WEIGHTS)
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder with {CONFIG} and {WEIGHTS}, got a file")
    header = read_json(folder / CONFIG)
    if not isinstance(header.get("model_type"), str):
        raise _unsupported(folder, header.get("model_type"))
    return header


def can_run(folder: Path) -> bool:
    """Whether a folder's model is of an architecture that is run here, as its config.json says."""
    header = read_any_header(folder)
    if header["model_type"] not in MODEL_TYPES:
        return header["model_type"] == MODEL_TYPE
    try:
        read_config(header, str(folder / CONFIG))
    except ValueError:
        return False
    return True


def read_own(header: Mapping[str, Any], where: str) -> tuple[Config, str]:
    """The Config in a header of our own, and its weights' hash."""
    if header.get("format") != FORMAT:
        raise ValueError(f"{where}: format: expected {FORMAT}, got {header.get('format')!r:.60}")
    if not isinstance(header.get("base_sha256"), str):
        raise ValueError(f"{where}: base_sha256: expected the weights' hash, got {header.get('base_sha256')!r:.60}")
    return from_fields(Config, header.get("config"), where), header["base_sha256"]


def own_places(config: Config) -> dict[str, Place]:
    """The tensors of a folder of our own."""
    return {name: Place(shape, False, {name: slice(None)}) for name, shape in config.weight_shapes().items()}


def open_own(folder: Path, header: Mapping[str, Any], *, head: str | None, n_labels: int | None) -> Files:
    """The tensors in a folder of our own with this config.json, checked against its hash; head and n_labels as
    load_model has them."""
    saved, expected_hash = read_own(header, str(folder / CONFIG))
    with open_tensors(folder / WEIGHTS) as file:
        _check_own(file, saved)
    tensors, own = {name: Stored(file, name) for name in file.shapes}, own_places(saved)
    if stored_hash(tensors) != expected_hash:
        raise ValueError(f"{folder / WEIGHTS}: damaged: the weights are not those that were saved (SHA-256 differs)")
    config = with_head(saved, head, n_labels)
    usable = set(taken(saved, config)) & own.keys()
    kept = {name: place for name, place in own_places(config).items() if name in usable}
    return Files(saved, config, tensors, kept, own, {}, in_trunk=True)


def _check_own(file: TensorFile, config: Config) -> None:
    """A ValueError unless the tensors are exactly the configuration's weights, all of one dtype."""
    check_layers(config.n_layer + config.n_encoder, len(file.shapes), str(file.path))
    file.check_names(config.weight_shapes())
    for name, dtype in file.dtypes.items():
        if dtype not in DTYPES:
            raise ValueError(f"{file.path}: {name}: expected float32 or float64, got {dtype}")
    if len(set(file.dtypes.values())) > 1:
        raise ValueError(f"{file.path}: expected one dtype, got {' and '.join(sorted(set(file.dtypes.values())))}")
