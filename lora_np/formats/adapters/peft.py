"""Adapters in PEFT's own format: adapter_config.json and adapter_model.safetensors.

A GPT-2, BERT, RoBERTa or Llama gets transformers' names and loads into PEFT; every other model gets the package's own
names in the same layout. What PEFT's configuration has no field for stands in the safetensors metadata, under one key:
our own configuration, the names of the parameters, which say how a fused tensor is split, and the base's hash.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ...adapter import Adapter
from ...model import Model
from ..files.atomic import new_folder, replaced_files, write_tensors
from ..files.json_file import read_json, to_json, write_json
from ..files.safetensors_file import open_tensors
from ..models.base import Base
from ..models.names import module_names
from .contents import read_contents
from .expected import expect_adapter
from .fused_qkv import take_apart
from .header import KEY, check_savable, write_about
from .of_model import adapter_of, check_supported
from .peft_config import CONFIG, WEIGHTS, check_keys, check_same, write_config
from .peft_tensors import Slot, slots
from .saved import read_saved


def save_adapter(path: str | os.PathLike[str], adapter: Adapter, model: Model) -> None:
    """Writes an adapter of `model` as a folder that PEFT reads; `load_adapter` gives it back, bit for bit.

    GPT-2's separate q, k, v become one c_attn of their summed rank, use_rslora false (L1): the same update. In an
    existing folder the two files are replaced, the configuration last; until both are on the disk, nothing is. A
    ValueError or TypeError if the adapter does not fit the model, trains what PEFT has no place for, or gives q, k, v
    of one c_attn different scales. Where q, k and v are three modules, qkv becomes three updates with the same A.
    """
    apart, config, places = _prepared(adapter, model)
    tensors = {key: slot.write(apart.params, model) for key, slot in places.items()}
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target}: expected a folder, or nothing, got a file")
    writing = replaced_files(target, last=CONFIG) if target.exists() else new_folder(target)
    with writing as folder:
        write_tensors(folder / WEIGHTS, tensors, {KEY: write_about(adapter, model)})
        write_json(folder / CONFIG, config)


def check_saves(adapter: Adapter, model: Model) -> None:
    """The errors of `save_adapter` that an adapter has of its own, before it is trained."""
    _prepared(adapter, model)


def _prepared(adapter: Adapter, model: Model) -> tuple[Adapter, dict[str, Any], dict[str, Slot]]:
    """The adapter as it is stored, its configuration, and the tensors that hold it."""
    check_savable(adapter, model)
    apart = take_apart(model.config, adapter)
    config = write_config(model.config, apart.config, apart.matrices)
    return apart, config, slots(model, apart.config, apart.params)


def load_adapter(path: str | os.PathLike[str], model: Base) -> Adapter:
    """Reads an adapter of `model` from a folder that `save_adapter`, PEFT or mlx-lm wrote, whole or in shards.

    A file of save_adapter's gives the same configuration and the same bits. In a file of PEFT's own, GPT-2's c_attn is
    target qkv; names that are off by one prefix, and those with wrappers in between, are read as what they mean. 16 and
    32 bits are widened to the model's dtype; what would be rounded is an error. save_adapter records a
    hash of the base, in the adapter's dtype: the same base widened has the same; weights that the adapter has whole
    take no part, so a new head may be another's. A FileNotFoundError or ValueError, in one line, names the file, and
    the key or tensor, that is missing, damaged, not supported, or made for another base.
    """
    folder = Path(path)
    expect_adapter(folder)
    if records_base(folder):
        return _load_own(folder, model)
    contents = read_contents(folder, module_names(model.config).values())
    check_supported(contents.raw, str(folder / CONFIG))
    return adapter_of(contents, model)


def _load_own(folder: Path, model: Base) -> Adapter:
    """What `save_adapter` wrote."""
    raw, where = read_json(folder / CONFIG), str(folder / CONFIG)
    check_keys(raw, where)
    with open_tensors(folder / WEIGHTS) as file:
        adapter, stored = read_saved(file, model, slots)
        due = write_config(model.config, stored.config, stored.matrices)
        check_same(raw, json.loads(to_json(due)), where)
        return adapter


def records_base(folder: Path) -> bool:
    """Whether an adapter's file records which base it was made for; PEFT's own do not."""
    if not (folder / WEIGHTS).is_file():
        return False
    with open_tensors(folder / WEIGHTS) as file:
        return KEY in file.metadata
