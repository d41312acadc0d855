"""Adapters in PEFT's own format: adapter_config.json and adapter_model.safetensors.

A GPT-2, BERT, RoBERTa or Llama gets transformers' names and loads into PEFT; every other model gets the package's own
names in the same layout. What PEFT's configuration has no field for stands in the safetensors metadata, under one key:
our own configuration, the names of the parameters, which say how a fused tensor is split, and the base's hash.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from ...adapter import Adapter, LoRAConfig, trained_whole
from ...backend import Array, asnumpy
from ...model import Model
from ...ops import widened
from ..files.atomic import new_folder, replaced_files, write_tensors
from ..files.json_file import read_json, to_json, write_json
from ..files.messages import shown
from ..files.safetensors_file import TensorFile, open_tensors, refuse_pickle
from ..models.base import Base
from ..models.names import module_names
from .fused_qkv import put_together, stored_apart, take_apart
from .header import KEY, check_about, check_savable, read_about, write_about
from .keys import PREFIX, read_key
from .peft_config import check_keys, check_same, read_config, write_config
from .peft_tensors import read_params, slots
from .unfinished import CHECKPOINT, stands_at

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_CONFIG = "config.json"
CONVERT = "lora-np convert writes a right file"  # where a mending is certain


def save_adapter(path: str | os.PathLike[str], adapter: Adapter, model: Model) -> None:
    """Writes an adapter of `model` as a folder that PEFT reads; `load_adapter` gives it back, bit for bit.

    GPT-2's separate q, k, v become one c_attn of their summed rank, use_rslora false (L1): the same update. In an
    existing folder the two files are replaced, the configuration last; until both are on the disk, nothing is. A
    ValueError or TypeError if the adapter does not fit the model, trains what PEFT has no place for, or gives q, k, v
    of one c_attn different scales. Where q, k and v are three modules, qkv becomes three updates with the same A.
    """
    check_savable(adapter, model)
    apart = take_apart(model.config, adapter)
    config = write_config(model.config, apart.config, apart.matrices)
    tensors = {key: slot.write(apart.params, model) for key, slot in slots(model, apart.config, apart.params).items()}
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target}: expected a folder, or nothing, got a file")
    writing = replaced_files(target, last=CONFIG) if target.exists() else new_folder(target)
    with writing as folder:
        write_tensors(folder / WEIGHTS, tensors, {KEY: write_about(adapter, model)})
        write_json(folder / CONFIG, config)


def load_adapter(path: str | os.PathLike[str], model: Base) -> Adapter:
    """Reads an adapter of `model` from a folder that `save_adapter` or PEFT wrote.

    A file of save_adapter's gives the same configuration and the same bits. In a file of PEFT's own, GPT-2's c_attn is
    target qkv. float32 tensors are widened for a float64 model; the other way round is an error. save_adapter records a
    hash of the base, in the adapter's dtype: the same base widened has the same; weights that the adapter has whole
    take no part, so a new head may be another's. A FileNotFoundError or ValueError, in one line, names the file, and
    the key or tensor, that is missing, damaged, not supported, or made for another base.
    """
    folder = Path(path)
    expect_adapter(folder)
    refuse_pickle(folder, WEIGHTS, is_dict=True)
    where = str(folder / CONFIG)
    raw = read_json(folder / CONFIG)
    check_keys(raw, where)
    if not (folder / WEIGHTS).exists() and (folder / f"{WEIGHTS}.index.json").exists():
        raise ValueError(f"{folder}: in shards: expected {WEIGHTS} where the model is run; {CONVERT}")
    with open_tensors(folder / WEIGHTS) as file:
        if KEY not in file.metadata:
            lora_config, matrices = read_config(raw, model.config, where)
            names = [f"{matrix}.{factor}" for matrix in matrices for factor in "AB"]
            names += trained_whole(model.config, lora_config, matrices)
            return Adapter(lora_config, _read_params(file, model, lora_config, names, copies=_copies(model)))
        about = read_about(file.metadata[KEY], f"{file.path}: metadata")
        lora_config, names = check_about(about, model, file.dtypes.values(), f"{file.path}: metadata")
        stored_config, stored = stored_apart(model.config, lora_config, names, f"{file.path}: metadata")
        params = _read_params(file, model, stored_config, stored)
        matrices = Adapter(stored_config, params).matrices
        check_same(raw, json.loads(to_json(write_config(model.config, stored_config, matrices))), where)
        return Adapter(lora_config, put_together(model.config, params, names, str(file.path)))


def expect_adapter(folder: Path) -> None:
    """A FileNotFoundError or ValueError unless it is a folder that has an adapter's configuration.

    It says what it is instead, if that is known: training's that is not finished, or a model's.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        refuse_pickle(folder, WEIGHTS, is_dict=True)
        raise ValueError(f"{folder}: expected an adapter's folder, with {CONFIG} and {WEIGHTS}, got a file")
    if (folder / CONFIG).exists():
        return
    if (folder / CHECKPOINT).is_file():
        raise ValueError(
            f"{folder}: training is not finished: its checkpoint is at {stands_at(folder)}; the same lora-np finetune "
            "with --resume goes on from there"
        )
    if is_model(folder):
        raise ValueError(f"{folder}: expected an adapter's folder, with {CONFIG}, got a model's")
    raise FileNotFoundError(f"{folder / CONFIG}: no such file")


def is_model(folder: Path) -> bool:
    """Whether a folder is a model's, and no adapter's."""
    return (folder / MODEL_CONFIG).is_file() and not (folder / CONFIG).exists()


def records_base(folder: Path) -> bool:
    """Whether an adapter's file records which base it was made for; PEFT's own do not."""
    if not (folder / WEIGHTS).is_file():
        return False
    with open_tensors(folder / WEIGHTS) as file:
        return KEY in file.metadata


def _read_params(
    file: TensorFile,
    model: Base,
    lora_config: LoRAConfig,
    names: Sequence[str],
    copies: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Array]:
    """The parameters `names`, from a file that holds exactly them, and perhaps `copies` (key -> our name)."""
    try:
        places = slots(model, lora_config, names)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    if places and file.shapes and not any(_is_found(key, model) for key in file.shapes):
        raise ValueError(
            f"{file.path}: {len(file.shapes)} tensors, none of which has a name that PEFT would find: "
            f"{shown(min(file.shapes))}, expected {min(places)}; {CONVERT}, where it is certain which"
        )
    copies = {key: name for key, name in copies.items() if key in file.shapes and key not in places}
    shapes = {key: model.weights[name].shape for key, name in copies.items()}
    file.check_names(shapes | {key: slot.shape for key, slot in places.items()})
    params = read_params(file, model, places)
    for key, name in copies.items():
        source = params.get(name) if ".modules_to_save." in key else asnumpy(widened(model.weights[name]))
        if source is None or not np.array_equal(file.read_as(key, model.dtype), source):
            raise ValueError(f"{file.path}: {key}: expected a copy of {name}, got other values: not supported")
    return {name: params[name] for name in names}


def _is_found(key: str, model: Base) -> bool:
    """Whether PEFT would find a tensor of this name: under its own key, of one of the model's modules."""
    found = read_key(key)
    if found is None:
        return True
    module = found.module if found.part else found.module.rpartition(".")[0]  # what is trained whole is a tensor
    return found.alone == key and module in module_names(model.config).values()


def _copies(model: Base) -> dict[str, str]:
    """The keys under which PEFT writes what it has already, or what it left alone -> our names.

    The base's token table and head, when either is adapted; and with bias="all" the biases of a head trained whole
    once more, and the base's.
    """
    full, weights = module_names(model.config), model.weights
    head = PREFIX + full.get("head", "")
    table = PREFIX + full["embed.tokens"]
    names = {
        f"{table}.weight": "embed.tokens",
        f"{table}.base_layer.weight": "embed.tokens",
        f"{head}.weight": model.config.head_weight,
        f"{head}.base_layer.weight": model.config.head_weight,
    }
    for stem in ("pooler", "head") if model.config.pooler_in_head else ("head",):
        if stem in full:
            whole, _, inner = full[stem].partition(".")
            end = f"{inner}.bias" if inner else "bias"
            names[f"{PREFIX}{whole}.original_module.{end}"] = f"{stem}.bias"
            # PEFT takes its name of the adapter out of a key only where it stands last but one.
            names[f"{PREFIX}{whole}.modules_to_save.{'default.' if inner else ''}{end}"] = f"{stem}.bias"
    return {key: name for key, name in names.items() if name in weights}
