"""Hugging Face's model folders, from config.json and safetensors, as the model's family has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...backend import asnumpy
from ...model import Config, Model
from ...storage import Matrix
from ..files.json_file import from_fields
from ..files.safetensors_file import WIDENED
from .base import Storage, Wanted, check_layers, read_held
from .families import MODEL_TYPES, family_in
from .family import Family, check_values, value_of
from .heads import completed, taken, with_head
from .names import family_of, module_names, module_of, module_parts, stored_name
from .shards import Stored, stored_tensors

CONFIG = "config.json"
BUFFERS = r".*\.(inv_freq|position_ids|masked_bias)"  # of any type


class Files(NamedTuple):
    """A folder's tensors, checked against its config.json, before any is read.

    saved, config   what the file is a model of, and what it is read as, which may have another head
    tensors         every tensor of the files, by its key
    places          the tensors that `config` has weights in; own: those that `saved` has
    tied            copies of the token table, as under the tied head's key
    in_trunk        whether the trunk's name stands in front of the keys
    """

    saved: Config
    config: Config
    tensors: dict[str, Stored]
    places: dict[str, Place]
    own: dict[str, Place]
    tied: dict[str, Place]
    in_trunk: bool

    @property
    def dtype(self) -> str:
        """What is computed in, if nothing else is asked for."""
        return "float64" if any(self.tensors[key].dtype == "F64" for key in self.own) else "float32"

    def check_tied(self, table: Matrix, dtype: str, where: str) -> None:
        """A ValueError unless each copy is the token table (V,D)."""
        for key in self.tied:
            blocks = self.tensors[key].blocks(dtype)
            if not all(np.array_equal(values, asnumpy(table[rows])) for rows, values in blocks):
                raise ValueError(
                    f"{self.tensors[key]}: {where} says that it is tied to the token table, but it differs"
                )


def open_huggingface(folder: Path, raw: Mapping[str, Any], *, head: str | None, n_labels: int | None) -> Files:
    """The tensors in a folder whose config.json says `raw`; head and n_labels as load_model has them."""
    where = str(folder / CONFIG)
    saved = read_config(raw, where)
    tensors = stored_tensors(folder)
    check_layers(saved.n_layer + saved.n_encoder, len(tensors), where)
    family = family_of(saved)
    if family.ties_absent and saved.head == "lm" and _head_key(saved) not in tensors:
        saved = replace(saved, tie_head=True)
    config = with_head(saved, head, n_labels)
    if family_of(config) is not family:
        raise ValueError(f"{folder}: a {raw['model_type']} model with head {config.head!r} is not supported")
    in_trunk = any(name.startswith(stored_name(family, f"{family.trunk}.")) for name in tensors)
    own = with_old_names(places(saved, in_trunk=in_trunk), tensors)
    usable = set(taken(saved, config))
    wanted = {
        key: place
        for key, place in with_old_names(places(config, in_trunk=in_trunk), tensors).items()
        if usable.issuperset(place.parts) and (key in tensors or key in own)
    }
    tied = _copies(saved, tensors, in_trunk=in_trunk)
    _check_tensors(folder, {**wanted, **own, **tied}, tensors, left_out(saved))
    _check_zeros(saved, tensors)
    return Files(saved, config, tensors, wanted, own, tied, in_trunk)


def load_huggingface(folder: Path, raw: Mapping[str, Any], wanted: Wanted) -> Model:
    """The model in a folder whose config.json says `raw`, as load_model is asked for it."""
    files = open_huggingface(folder, raw, head=wanted.head, n_labels=wanted.n_labels)
    return load_files(folder, files, wanted)


def load_files(folder: Path, files: Files, wanted: Wanted) -> Model:
    """The model in files, as load_model is asked for it.

    No more is held than the weights as they are kept, and some rows of one tensor as the files have them.
    """
    dtype = wanted.dtype or files.dtype
    weights: dict[str, Matrix] = {}
    for key, place in files.places.items():
        weights |= place.read(files.tensors[key], dtype, wanted.storage)
    files.check_tied(weights["embed.tokens"], dtype, str(folder / CONFIG))
    return Model(files.config, completed(files.config, weights, wanted.seed, str(folder)))


# --- config.json ---------------------------------------------------------------------------------------------------


def read_config(raw: Mapping[str, Any], where: str) -> Config:
    """The Config of a config.json; a ValueError names the key that is missing, or whose value is not supported."""
    family = family_in(raw)
    if family.within is not None:
        inner = raw.get(family.within)
        if not isinstance(inner, dict):
            raise ValueError(f"{where}: {family.within}: expected an object, got {inner!r:.60}")
        raw = {**inner, "architectures": raw.get("architectures")}
    check_values(raw, family.neutral, where)
    for other, key in family.same.items():
        if other in raw and raw[other] != raw.get(key):
            raise ValueError(f"{where}: {other}: expected {raw.get(key)!r:.60}, as {key} says, got {raw[other]!r:.60}")
    said = {key.field: value_of(raw, name, key, where) for name, key in family.keys.items()}
    said |= {**family.fixed, "activation": _activation(raw, family, where), "head": _head(raw, family, where)}
    said |= family.more(raw, said, where)
    if said["head"] in ("classify", "tag"):
        said["n_labels"] = _labels(raw, where)
    config = from_fields(Config, said, where)
    return config if family_of(config) is family else replace(config, family=family.name)


def _activation(raw: Mapping[str, Any], family: Family, where: str) -> str:
    """Our name of the activation."""
    name, key = next((name, key) for name, key in family.keys.items() if key.field == "activation")
    value = value_of(raw, name, key, where)
    if value not in family.activations:
        raise ValueError(f"{where}: {name}: {value!r:.60} is not supported, only {' '.join(family.activations)}")
    return family.activations[value]


def _head(raw: Mapping[str, Any], family: Family, where: str) -> str:
    """The head of the class that the file was saved by."""
    value = raw.get("architectures")
    names = value if isinstance(value, list) else [value]
    if len(names) != 1 or not isinstance(names[0], str) or names[0] not in family.classes:
        raise ValueError(f"{where}: architectures: expected one of {' '.join(family.classes)}, got {value!r:.60}")
    return family.classes[names[0]]


def _labels(raw: Mapping[str, Any], where: str) -> int:
    """How many labels there are: the length of id2label; 2 where nothing is said."""
    labels, number = raw.get("id2label"), raw.get("num_labels")
    if labels is not None and not isinstance(labels, dict):
        raise ValueError(f"{where}: id2label: expected an object, got {labels!r:.60}")
    if number is not None and type(number) is not int:
        raise ValueError(f"{where}: num_labels: expected an integer, got {number!r:.60}")
    if labels is not None and number is not None and len(labels) != number:
        raise ValueError(f"{where}: num_labels: id2label has {len(labels)}, got {number!r:.60}")
    return len(labels) if labels is not None else 2 if number is None else number


# --- The tensors ---------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A tensor of the files: its shape there, whether it is stored (in, out), and the rows of each weight in it."""

    shape: tuple[int, ...]
    transposed: bool
    parts: dict[str, slice]

    def read(self, tensor: Stored, dtype: str, storage: Storage | None = None) -> dict[str, Matrix]:
        """Our weights in the tensor, (out, in)."""
        blocks = tensor.blocks(dtype)
        return read_held(self.parts, self.shape, dtype, blocks, storage, str(tensor), transposed=self.transposed)


def places(config: Config, *, in_trunk: bool) -> dict[str, Place]:
    """The tensors of a model's files, by their names. in_trunk: whether the trunk's name stands in front."""
    family, full = family_of(config), module_names(config, in_trunk=in_trunk)
    result: dict[str, Place] = {}
    for name, shape in config.weight_shapes().items():
        stem, kind = (name, "weight") if name in full else name.rsplit(".", 1)
        module = module_of(stem, family)
        transposed = family.fan_in_fan_out and stem.startswith("layers.") and len(shape) == 2
        parts = {f"{part}.{kind}": rows for part, rows in module_parts(config, module).items()}
        if module == stem:
            parts = {name: slice(None)}
        else:
            shape = (max(rows.stop for rows in parts.values()), *shape[1:])
        result[stored_name(family, f"{full[module]}.{kind}")] = Place(
            shape[::-1] if transposed else shape, transposed, parts
        )
    return result


def with_old_names(result: dict[str, Place], tensors: Mapping[str, Stored]) -> dict[str, Place]:
    """The places, but gamma and beta where the files still call a norm's weight and bias so."""
    old = {"weight": "gamma", "bias": "beta"}
    names = {}
    for key, place in result.items():
        stem, _, kind = key.rpartition(".")
        is_norm = any("norm" in name for name in place.parts)
        names[key] = f"{stem}.{old[kind]}" if is_norm and f"{stem}.{old[kind]}" in tensors else key
    return {names[key]: place for key, place in result.items()}


def _head_key(saved: Config) -> str:
    return stored_name(family_of(saved), f"{module_names(saved)['head']}.weight")


def _copies(saved: Config, tensors: Mapping[str, Stored], *, in_trunk: bool) -> dict[str, Place]:
    """What the files have beside the token table: copies of it, as a tied language model's head is one."""
    family = family_of(saved)
    keys = [f"{family.trunk}.{name}.weight" if in_trunk else f"{name}.weight" for name in family.copies]
    keys += [_head_key(saved)] if saved.head == "lm" and saved.tie_head else []
    return {key: Place(saved.weight_shapes()["embed.tokens"], False, {}) for key in keys if key in tensors}


def _check_zeros(saved: Config, tensors: Mapping[str, Stored]) -> None:
    """A ValueError if a tensor is not zero that has no place in our models."""
    for key in family_of(saved).zeros:
        if key in tensors and tensors[key].read("float64").any():
            raise ValueError(f"{tensors[key]}: expected zeros, got others: it has no place in this model")


def left_out(config: Config) -> re.Pattern[str]:
    """The keys of tensors that are no weights of ours, with the trunk's name in front or without."""
    family = family_of(config)
    zeros = "".join(f"|{re.escape(key)}" for key in family.zeros)
    return re.compile(rf"({re.escape(family.trunk)}\.)?({family.left_out}){zeros}")


def is_no_weight(key: str, model_type: str) -> bool:
    """Whether files of this type of models may have a tensor of this name that is no weight, as a buffer is none."""
    known = MODEL_TYPES.get(model_type)
    return re.fullmatch(rf"(\w+\.)?({known[0].left_out})" if known else BUFFERS, key) is not None


def _check_tensors(
    folder: Path, expected: Mapping[str, Place], tensors: Mapping[str, Stored], ignored: re.Pattern[str]
) -> None:
    """A ValueError that names a tensor: one that is missing, belongs nowhere, or has another shape or dtype."""
    for key, place in expected.items():
        if key not in tensors:
            raise ValueError(f"{folder}: the tensor {key} is missing")
        if tensors[key].shape != place.shape:
            raise ValueError(f"{tensors[key]}: expected shape {place.shape}, got {tensors[key].shape}")
        if tensors[key].dtype not in WIDENED:
            raise ValueError(f"{tensors[key]}: expected one of {' '.join(WIDENED)}, got {tensors[key].dtype}")
    for key in sorted(tensors.keys() - expected.keys()):
        if not ignored.fullmatch(key):
            raise ValueError(f"{tensors[key]}: the tensor has no place in this model")
