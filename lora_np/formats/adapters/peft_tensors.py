"""Where an adapter's parameters stand in a PEFT file: each of its tensors is one parameter, or a few as blocks.

GPT-2 keeps q, k and v in one matrix, c_attn. An update of q and v alone is then, with A_q, A_v (r, D) and B_q, B_v
(D, r), one of rank 2r of the whole: A stacked, and B in blocks, zero where q's rows meet v's factors, and in k's rows:

    A = | A_q |      B = | B_q  0  |      B A = | B_q A_q |
        | A_v |          |  0   0  |            |    0    |
                         |  0  B_v |            | B_v A_v |

Every product of the two is one of the separate updates or a sum with zeros, so nothing is rounded. With DoRA the rows
between would be scaled too, by what rounding leaves of m / c = 1: then all of q, k and v must be adapted, or qkv.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from ...adapter import LoRAConfig, adapted_shapes, target_of, trained_whole
from ...backend import Array, asnumpy
from ...model import Config
from ...storage import widened
from ..files.safetensors_file import TensorFile
from ..models.base import Base
from ..models.names import family_of, module_names, module_of, module_parts, module_shapes
from .keys import PREFIX

Index: TypeAlias = tuple[slice, ...]
FACTORS = (".A", ".B", ".m")  # how the names of parameters end that are not trained whole


@dataclass(frozen=True)
class Slot:
    """One tensor of the file.

    blocks: the parameters that it holds, and where; base: the base's weights that fill the rest. What neither fills
    is zero.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    blocks: dict[str, Index]
    base: dict[str, Index] = field(default_factory=dict)

    def write(self, params: Mapping[str, Array], model: Base) -> Array:
        """The tensor, on the host."""
        tensor = np.zeros(self.shape, dtype=self.dtype)
        for source, index in [
            *((widened(model.weights[name]), index) for name, index in self.base.items()),
            *((params[name], index) for name, index in self.blocks.items()),
        ]:
            tensor[index] = asnumpy(source)
        return tensor

    def read(self, tensor: Array, model: Base, where: str) -> dict[str, Array]:
        """The parameters in a tensor; a ValueError if what lies between them is not zero, or not the base's."""
        params = {name: np.ascontiguousarray(tensor[index]) for name, index in self.blocks.items()}
        if not np.array_equal(self.write(params, model), tensor):
            raise ValueError(f"{where}: expected {' and '.join(params)} and the base's own values between, got others")
        return params


def slots(model: Base, lora_config: LoRAConfig, names: Collection[str]) -> dict[str, Slot]:
    """The tensors of PEFT's file that holds the parameters `names`, by their keys. Errors as in `param_shapes`."""
    config, full = model.config, module_names(model.config)
    groups, shapes = checked_groups(config, lora_config, names), module_shapes(config)
    result: dict[str, Slot] = {}
    for module, parts in groups.items():
        A, B = factor_slots(model, lora_config, module, parts, shapes[module])
        ends = ("lora_embedding_{}" if target_of(module) == "embed" else "lora_{}.weight").format
        result |= {f"{PREFIX}{full[module]}.{ends('A')}": A, f"{PREFIX}{full[module]}.{ends('B')}": B}
        if lora_config.dora:
            result[f"{PREFIX}{full[module]}.lora_magnitude_vector"] = _magnitude_slot(model, module, parts, B.shape[:1])
    # PEFT hides an adapted module's own bias.
    for (module, kind), slot in whole_slots(model, names).items():
        result[f"{PREFIX}{full[module]}{'.base_layer' if module in groups else ''}.{kind}"] = slot
    return result


def param_shapes(config: Config, lora_config: LoRAConfig, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter, in the order of `names`.

    A ValueError names a parameter that has no place in the model or under the configuration, or one that is missing.
    """
    adapted = {matrix for parts in checked_groups(config, lora_config, names).values() for matrix in parts}
    shapes: dict[str, tuple[int, ...]] = _whole_shapes(config)
    for name, (n_out, n_in) in adapted_shapes(config).items():
        if name in adapted:
            r = lora_config.rank(name)
            shapes |= {f"{name}.A": (r, n_in), f"{name}.B": (n_out, r), f"{name}.m": (n_out,)}
    return {name: shapes[name] for name in names}


def checked_groups(config: Config, lora_config: LoRAConfig, names: Collection[str]) -> dict[str, list[str]]:
    """`grouped`, when the names are exactly those of an adapter's parameters; else a ValueError names one."""
    matrices = [name[:-2] for name in names if name.endswith(".A")]
    groups = grouped(config, matrices)
    expected = {f"{matrix}.{factor}" for matrix in matrices for factor in ("ABm" if lora_config.dora else "AB")}
    expected.update(trained_whole(config, lora_config, matrices))
    for name in sorted(expected - set(names)):
        raise ValueError(f"adapter: {name} is missing")
    for name in sorted(set(names) - expected):
        raise ValueError(f"adapter: {name}: the configuration does not say that it is trained")
    return groups


def read_params(file: TensorFile, model: Base, places: Mapping[str, Slot]) -> dict[str, Array]:
    """The parameters in the tensors of a file, whose names are checked."""
    params: dict[str, Array] = {}
    for key, slot in places.items():
        params |= slot.read(file.read_as(key, model.dtype), model, f"{file.path}: {key}")
    return params


def grouped(config: Config, matrices: Collection[str]) -> dict[str, list[str]]:
    """The modules of the file that hold the adapted matrices, in the model's order; q, k, v may share one."""
    shapes, family = adapted_shapes(config), family_of(config)
    matrices = set(matrices)
    for name in sorted(matrices - shapes.keys()):
        raise ValueError(f"adapter: {name}: the model has no such matrix")
    groups: dict[str, list[str]] = {}
    for name in shapes:
        if name in matrices:
            groups.setdefault(module_of(name, family), []).append(name)
    for module, parts in groups.items():
        if module in parts and len(parts) > 1:
            raise ValueError(f"adapter: {module} and {parts[0]} adapt one matrix of the file")
    return {name: groups[name] for name in module_shapes(config) if name in groups}


def factor_slots(
    model: Base, lora_config: LoRAConfig, module: str, parts: list[str], shape: tuple[int, int]
) -> tuple[Slot, Slot]:
    """The tensors of one module's A and B; shape: (out, in), the module's."""
    n_out, n_in = shape
    rank = sum(lora_config.rank(part) for part in parts)
    A, B = Slot((rank, n_in), model.dtype, {}), Slot((n_out, rank), model.dtype, {})
    rows = _rows_of(model.config, module, parts)
    start = 0
    for part in parts:
        columns = slice(start, start + lora_config.rank(part))
        A.blocks[f"{part}.A"] = (columns, slice(None))
        B.blocks[f"{part}.B"] = (rows[part], columns)
        start = columns.stop
    return A, B


def _magnitude_slot(model: Base, module: str, parts: list[str], shape: tuple[int, ...]) -> Slot:
    """The tensor of one module's m (out,). A ValueError if it has rows that no part adapts."""
    rows = _rows_of(model.config, module, parts)
    if rows.keys() != set(parts):
        way = f", or {module}" if module in adapted_shapes(model.config) else ""
        raise ValueError(
            f"adapter: {module} is one matrix in PEFT, each of whose rows DoRA scales: expected all of "
            f"{' '.join(rows)} to be adapted{way}, got {' '.join(parts)}"
        )
    return Slot(shape, model.dtype, {f"{part}.m": (rows[part],) for part in parts})


def _rows_of(config: Config, module: str, parts: list[str]) -> Mapping[str, slice]:
    """The rows of a module that each matrix in it takes; of one that is adapted as it is, all."""
    return {module: slice(None)} if parts == [module] else module_parts(config, module)


def base_tensor(model: Base, module: str, kind: str) -> Array | None:
    """The base's own weight or bias of a module, by our name, as PEFT's file has it; None if it has none."""
    if module == "head" and kind == "weight":
        names = [model.config.head_weight]
    elif kind == "weight" and module in model.weights:  # a table
        names = [module]
    else:
        names = [f"{part}.{kind}" for part in module_parts(model.config, module)]
    if not all(name in model.weights for name in names) or (len(names) > 1 and kind == "weight"):
        return None
    return np.concatenate([asnumpy(widened(model.weights[name])) for name in names])


def _whole_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shapes of what may be trained whole: any weight, and a tied head's."""
    return {"head.weight": (config.head_size, config.d_model), **config.weight_shapes()}


def whole_slots(model: Base, names: Collection[str]) -> dict[tuple[str, str], Slot]:
    """The tensors of what is trained whole among the parameters, by their module, as we call it, and kind."""
    config, family, shapes = model.config, family_of(model.config), _whole_shapes(model.config)
    whole = dict.fromkeys(name for name in names if name[-2:] not in FACTORS)
    result = {}
    for name in whole:
        stem, _, kind = name.rpartition(".")
        module = module_of(stem, family)
        if module == stem:
            result[module, kind] = Slot(shapes[name], model.dtype, {name: (slice(None),)})
            continue
        places: dict[str, Index] = {f"{part}.{kind}": (rows,) for part, rows in module_parts(config, module).items()}
        result[module, kind] = Slot(
            (sum(shapes[part][0] for part in places),),
            model.dtype,
            {part: index for part, index in places.items() if part in whole},
            {part: index for part, index in places.items() if part not in whole},
        )
    return result
