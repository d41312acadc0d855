"""Adapters as llama.cpp has them: a GGUF file with two matrices beside the name of each tensor that is adapted.

NAME.lora_a is A (r, in), NAME.lora_b is B (out, r), and the model runs with W + (alpha / r) B A: alpha is one number
of the file, r the columns of each B, and an alpha of 0 stands for alpha / r = 1. For the token table (V, D), whose rows
are looked up, lora_a is (V, r) and lora_b (D, r). Rows stand in the order of the base's: llama's q and k have those of
each head in pairs (2j, 2j+1). GPT-2's q, k and v are one tensor, attn_qkv.

A base stands in files of many types, and its adapter fits them all: no hash of it is recorded.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...adapter import Adapter, LoRAConfig, adapted_shapes
from ...backend import Array, asnumpy, xp
from ...lora import Update
from ...model import Config, Model
from ..files.atomic import new_file
from ..files.json_file import from_fields
from ..files.messages import shown
from ..models.base import Base
from ..models.families import FAMILIES
from ..models.gguf import NAMES, file_name, paired_heads
from ..models.gguf_file import ALL, GGUFFile, import_gguf, open_gguf
from ..models.names import family_of, module_of, module_parts, module_shapes
from .fused_qkv import put_together, stored_apart, take_apart
from .gguf_alpha import folding_for, folding_of, times
from .header import KEY, check_config, check_savable, read_about, write_about_any
from .peft_config import described, most_common
from .peft_tensors import Slot, checked_groups, factor_slots

KIND, TYPE, ALPHA = "general.type", "adapter.type", "adapter.lora.alpha"
INVOCATION = "adapter.alora.invocation_tokens"
FACTORS = (".lora_a", ".lora_b")
TABLE = NAMES["embed.tokens"]


def save_adapter(path: str | os.PathLike[str], adapter: Adapter, model: Model) -> None:
    """Writes an adapter of `model` as a new .gguf file, in float32, for llama.cpp: llama, GPT-2 and BERT.

    `load_adapter` gives it back, bit for bit where B was multiplied by powers of two alone. A FileExistsError if there
    is anything at `path`; a ValueError or TypeError if the adapter does not fit the model, or is one that llama.cpp has
    no place for: what is trained whole, a tied head, a table that is tied to it, a scale of 0, float64.
    """
    check_savable(adapter, model)
    _check_supported(Path(path), adapter, model)
    architecture = _architecture(model.config, str(path))
    apart = take_apart(model.config, adapter)
    folding = folding_of(model.config, apart.config, list(apart.params), str(path))
    params = {name: times(value, folding.of(name)) for name, value in apart.params.items()}
    for name, value in params.items():
        if not np.isfinite(value).all():
            raise ValueError(f"{path}: {name}: too large for float32 when it is multiplied by {folding.of(name):g}")
    places = _places(model, apart.config, list(apart.params))
    tensors = {key: place.write(params, model) for key, place in places.items()}
    _write(Path(path), architecture, folding.alpha, tensors, {KEY: write_about_any(adapter)})


def write_updates(path: Path, architecture: str, updates: Mapping[str, Update]) -> None:
    """Writes updates by the names of the base's tensors, as these stand in its file, in float32.

    A FileExistsError if there is anything at `path`; a ValueError if a scale is 0, or a number too large for float32.
    """
    folding = folding_for({name: update.s * len(update.A) for name, update in updates.items()}, str(path))
    tensors: dict[str, Array] = {}
    for name, update in updates.items():
        with np.errstate(over="ignore"):  # refused below
            factors = (asnumpy(update.A), times(asnumpy(update.B).astype(np.float64), folding.ratios[name]))
            a, b = (np.ascontiguousarray(factor.astype(np.float32)) for factor in factors)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ValueError(f"{path}: {shown(name)}: too large for float32")
        tensors |= {name + FACTORS[0]: a, name + FACTORS[1]: b}
    _write(path, architecture, folding.alpha, tensors, {})


def _write(path: Path, architecture: str, alpha: float, tensors: Mapping[str, Array], about: Mapping[str, str]) -> None:
    writer = import_gguf().GGUFWriter(None, architecture)
    writer.add_string(KIND, "adapter")
    writer.add_string(TYPE, "lora")
    writer.add_float32(ALPHA, alpha)
    for key, value in about.items():
        writer.add_string(key, value)
    for key, tensor in tensors.items():
        writer.add_tensor(key, tensor)
    with new_file(path) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def load_adapter(path: str | os.PathLike[str], model: Base) -> Adapter:
    """Reads an adapter of `model` from a .gguf file of llama.cpp's, or one that `save_adapter` wrote.

    Tensors may be of any type that a model's may have. A FileNotFoundError or ValueError, in one line, says what is
    missing, damaged, not supported, or made for another base.
    """
    path = Path(path)
    with open_gguf(path) as file:
        alpha = _check_adapter(file)
        found, expected = file.get("general.architecture", str), _architecture(model.config, str(path))
        if found != expected:
            raise ValueError(f"{path}: made for another base: its architecture is {found!r:.60}, this is {expected}")
        if KEY not in file.metadata:
            return _read_theirs(file, model, alpha)
        where = f"{path}: {KEY}"
        lora_config, names = check_config(read_about(file.get(KEY, str), where), where)
        stored_config, stored = stored_apart(model.config, lora_config, names, where)
        try:
            folding = folding_of(model.config, stored_config, stored, KEY)
            places = _places(model, stored_config, stored)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if alpha != folding.alpha:
            raise ValueError(f"{path}: {ALPHA}: expected {folding.alpha:g}, as {KEY} has it, got {alpha:g}")
        params = _read(file, model, places)
        params = {name: xp.asarray(times(value, 1 / folding.of(name))) for name, value in params.items()}
        return Adapter(lora_config, put_together(model.config, params, names, str(path)))


def read_updates(file: GGUFFile) -> dict[str, Update]:
    """The updates in an adapter's file by the names of the base's tensors, each as that stands in its own file.

    Any architecture. -> A (r, in), B (out, r), float32, s
    """
    alpha = _check_adapter(file)
    result = {}
    for name in dict.fromkeys(key[: -len(FACTORS[0])] for key in file.tensors):
        a, b = (file.read(name + end, "float32") for end in FACTORS)
        if a.ndim != 2 or b.ndim != 2:
            raise ValueError(f"{file.path}: {name}: expected matrices, got lora_a {a.shape} and lora_b {b.shape}")
        rank = b.shape[1]
        A, B = (b.T, a) if name == TABLE else (a, b)
        if A.shape[0] != B.shape[1]:
            raise ValueError(f"{file.path}: {name}: lora_a {a.shape} and lora_b {b.shape} have different ranks")
        result[name] = Update(A, B, alpha / rank if alpha else 1.0)
    return result


# --- What is in a file -----------------------------------------------------------------------------------------------


def _architecture(config: Config, where: str) -> str:
    """What llama.cpp calls the model; a ValueError if it has no such one."""
    found = family_of(config).gguf
    if found is None or config.head not in ("lm", "none"):
        supported = ", ".join(dict.fromkeys(family.gguf for family in FAMILIES.values() if family.gguf))
        what = "this architecture" if found is None else f"a model with head {config.head!r}"
        raise ValueError(f"{where}: {what} is not supported in llama.cpp's files: {supported} are, with no labels")
    return found


def _check_supported(path: Path, adapter: Adapter, model: Model) -> None:
    """A ValueError or TypeError if it is an adapter that llama.cpp has no place for."""
    if model.dtype != np.float32:
        raise TypeError(
            f"{path}: llama.cpp's adapters hold no {model.dtype}: expected a base and an adapter of float32"
        )
    if adapter.config.dora:
        raise ValueError(f"{path}: llama.cpp's adapters have no place for DoRA's magnitudes (L10); merge it")
    for name in adapter.whole:
        raise ValueError(f"{path}: {name} is trained whole, which llama.cpp's adapters have no place for; merge it")
    if model.config.head_weight == "embed.tokens":
        for name in [name for name in adapter.matrices if name in ("embed.tokens", "head")]:
            raise ValueError(
                f"{path}: {name}: the head is tied to the token table, and llama.cpp adapts neither alone; merge it"
            )


def _check_adapter(file: GGUFFile) -> float:
    """The alpha of an adapter's file whose tensors are pairs that can be read; a ValueError says what else it is."""
    for key, expected in ((KIND, "adapter"), (TYPE, "lora")):
        found = file.get(key, str, "none")
        if found != expected:
            raise ValueError(f"{file.path}: {key}: expected {expected}, got {found!r:.60}")
    if INVOCATION in file.metadata:
        raise ValueError(f"{file.path}: {INVOCATION}: an activated LoRA (aLoRA) is not supported")
    for key in file.tensors:
        name, end = key[: -len(FACTORS[0])], key[-len(FACTORS[0]) :]
        if end not in FACTORS:
            raise ValueError(f"{file.path}: {key}: expected a name that ends in .lora_a or .lora_b: it is no LoRA's")
        for other in FACTORS:
            if name + other not in file.tensors:
                raise ValueError(f"{file.path}: {key} stands alone: {name}{other} is missing")
    if not file.tensors:
        raise ValueError(f"{file.path}: expected lora_a and lora_b of some tensor, got none")
    file.check_tensors()
    return float(file.get(ALPHA, float, 0.0))


def _read_theirs(file: GGUFFile, model: Base, alpha: float) -> Adapter:
    """An adapter from a file of llama.cpp's own."""
    config, shapes, family = model.config, module_shapes(model.config), family_of(model.config)
    modules = {tensor_name(name): name for name in shapes if module_of(name, family) == name}
    ranks, params = dict[str, int](), dict[str, Array]()
    for key in file.tensors:
        tensor, end = key[: -len(FACTORS[0])], key[-len(FACTORS[0]) :]
        if tensor not in modules:
            raise ValueError(f"{file.path}: the tensor {shown(key)} has no place in this model")
        module, rank = modules[tensor], file.tensors[tensor + FACTORS[1]].shape[-1]
        (n_out, n_in), is_turned = shapes[module], key == TABLE + FACTORS[0]
        shape = {FACTORS[0]: (n_in, rank) if is_turned else (rank, n_in), FACTORS[1]: (n_out, rank)}[end]
        if file.tensors[key].shape != shape:
            raise ValueError(f"{file.path}: {key}: expected shape {shape}, got {file.tensors[key].shape}")
        factor, heads = ("A", 0) if end == FACTORS[0] else ("B", _heads(module, config))
        values = file.read(key, model.dtype, heads=heads)
        # An Adapter has no name for gate and up together: each has the same A, and its rows of B.
        parts = {module: ALL} if module in adapted_shapes(config) else module_parts(config, module)
        for matrix, rows in parts.items():
            ranks[matrix] = rank
            params[f"{matrix}.{factor}"] = values.T if is_turned else values if factor == "A" else values[rows]
    alphas = {name: alpha or float(rank) for name, rank in ranks.items()}
    common = most_common(ranks.values(), 1), most_common(alphas.values(), 1.0)
    lora_config = from_fields(LoRAConfig, described(config, ranks, alphas, *common), str(file.path))
    names = [f"{name}.{factor}" for name in ranks for factor in "AB"]
    try:
        checked_groups(config, lora_config, names)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    return Adapter(lora_config, {name: xp.asarray(np.ascontiguousarray(params[name])) for name in names})


# --- Where a tensor's numbers stand ----------------------------------------------------------------------------------


class _Place(NamedTuple):
    """A tensor of the file: what it holds as ours are oriented, and how it stands there.

    heads: if not 0, rows of so many heads stand in pairs; turned: whether the file has the transpose
    """

    slot: Slot
    heads: int
    turned: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.slot.shape[::-1] if self.turned else self.slot.shape

    def write(self, params: Mapping[str, Array], model: Base) -> Array:
        """The tensor as the file has it."""
        tensor = self.slot.write(params, model)
        return np.ascontiguousarray(tensor.T if self.turned else in_pairs(tensor, self.heads))


def _places(model: Base, lora_config: LoRAConfig, names: Collection[str]) -> dict[str, _Place]:
    """The file's tensors by their keys. Errors as `checked_groups` has them."""
    config, shapes, result = model.config, module_shapes(model.config), {}
    for module, parts in checked_groups(config, lora_config, names).items():
        A, B = factor_slots(model, lora_config, module, parts, shapes[module])
        key = tensor_name(module)
        result[key + FACTORS[0]] = _Place(A, 0, key == TABLE)
        result[key + FACTORS[1]] = _Place(B, _heads(module, config), False)
    return result


def _read(file: GGUFFile, model: Base, places: Mapping[str, _Place]) -> dict[str, Array]:
    """The parameters in a file's tensors; a ValueError names one that is missing, unknown, or of another shape."""
    for key in sorted(file.tensors.keys() ^ places.keys()):
        missing = "is missing" if key in places else "has no place in this adapter"
        raise ValueError(f"{file.path}: the tensor {shown(key)} {missing}")
    params: dict[str, Array] = {}
    for key, place in places.items():
        if file.tensors[key].shape != place.shape:
            raise ValueError(f"{file.path}: {key}: expected shape {place.shape}, got {file.tensors[key].shape}")
        tensor = file.read(key, model.dtype, heads=place.heads)
        params |= place.slot.read(tensor.T if place.turned else tensor, model, f"{file.path}: {key}")
    return params


def tensor_name(matrix: str) -> str:
    """The name of the tensor that an adapted matrix is in llama.cpp's files."""
    return file_name(matrix if matrix in NAMES else f"{matrix}.weight")


def _heads(matrix: str, config: Config) -> int:
    """How many heads have their rows in pairs, in the file's tensor of this matrix; 0: none."""
    return paired_heads(f"{matrix}.weight", config) if family_of(config).gguf == "llama" else 0


def in_pairs(rows: Array, heads: int) -> Array:
    """The rows of each head in pairs (2j, 2j+1) that were (j, j + K/2); heads 0: as they are."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape) if heads else rows


def in_order(rows: Array, heads: int) -> Array:
    """The rows of each head in the order (j, j + K/2) that were in pairs (2j, 2j+1); heads 0: as they are."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape) if heads else rows
