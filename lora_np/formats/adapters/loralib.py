"""Adapters with loralib's names, in a .safetensors file.

loralib keeps a state dict: lora_A and lora_B beside each adapted module, and biases. Its Linear and Embedding have our
A (r, in) and B (out, r). Its MergedLinear, on GPT-2's c_attn, adapts n of q, k and v, each with a rank-r update of its
own (a convolution in n groups): A (n r, D) and B (n D, r) are their A and their B, one below the other. What loralib
keeps in the program and not in the file (lora_alpha, and which of q, k and v) stands in our files' metadata.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...adapter import Adapter, LoRAConfig, adapted_shapes, target_of, trained_whole
from ...backend import Array, asnumpy
from ...model import Config, Model
from ..files.atomic import new_file, write_tensors
from ..files.json_file import from_fields
from ..files.messages import shown
from ..files.safetensors_file import TensorFile, open_tensors
from ..models.base import Base
from ..models.names import family_of, module_names, module_of, module_parts
from .fused_qkv import take_apart
from .header import KEY, check_savable, write_about
from .peft_config import SAME, described, most_common
from .peft_tensors import Slot, checked_groups, read_params, whole_slots
from .saved import read_saved

FACTORS = (".lora_A", ".lora_B")
MASKS = r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"  # GPT-2's causal masks, which older files count as biases
DEFAULT_ENABLED = {2: ("q", "v"), 3: ("q", "k", "v")}  # loralib's own GPT-2 has [True, False, True]


def save_adapter(path: str | os.PathLike[str], adapter: Adapter, model: Model) -> None:
    """Writes an adapter of `model` as a new .safetensors file that a model with loralib's layers loads.

    GPT-2's separate q, k, v are one MergedLinear, so they need one rank and one scale; qkv is a Linear. lora_alpha is
    s r. A FileExistsError if there is anything at `path`; a ValueError or TypeError if the adapter does not fit the
    model, or trains what loralib has no place for: the head whole.
    """
    check_savable(adapter, model)
    apart = take_apart(model.config, adapter)
    if adapter.config.train_head:
        raise ValueError(f"{path}: loralib's files hold no head that is trained whole; save a folder, or .npz")
    places = slots(model, apart.config, list(apart.params))
    tensors = {key: slot.write(apart.params, model) for key, slot in places.items()}
    with new_file(Path(path)) as temporary:
        write_tensors(temporary, tensors, {KEY: write_about(adapter, model)})


def load_adapter(
    path: str | os.PathLike[str], model: Base, *, alpha: float | None = None, enabled: Sequence[str] | None = None
) -> Adapter:
    """Reads an adapter of `model` from a state dict of loralib's, or a file that `save_adapter` wrote, bit for bit.

    alpha: loralib's lora_alpha, which must be given for a file that does not say it; s = alpha / r.
    enabled: which of q, k, v a MergedLinear adapts, where the file does not say it. Without it two are q and v, three
    all. Names may stand with the trunk's (transformer.h.0...) or without. Where one of c_attn's biases was trained that
    no update goes with, the adapter has all biases, those that the file lacks the base's.
    A FileNotFoundError or ValueError, in one line, says what is missing, damaged, or does not fit.
    """
    path = Path(path)
    with open_tensors(path) as file:
        if KEY not in file.metadata:
            return _read_theirs(file, model, alpha, enabled)
        if alpha is not None or enabled is not None:
            raise ValueError(f"{path}: alpha and enabled are for files that do not say them; this one does")
        return read_saved(file, model, slots)[0]


def slots(model: Base, lora_config: LoRAConfig, names: Collection[str]) -> dict[str, Slot]:
    """The tensors of the file that holds the parameters `names`, by their keys. Errors as `param_shapes` has them."""
    if lora_config.dora:
        raise ValueError("loralib's files have no place for DoRA's magnitudes; save a folder, or .npz")
    full, shapes = module_names(model.config), adapted_shapes(model.config)
    result: dict[str, Slot] = {}
    for module, parts in checked_groups(model.config, lora_config, names).items():
        factors = _factor_slots(model, lora_config, module, parts, shapes[parts[0]])
        result |= {full[module] + end: slot for end, slot in zip(FACTORS, factors, strict=True)}
    return result | {f"{full[module]}.{kind}": slot for (module, kind), slot in whole_slots(model, names).items()}


def _factor_slots(
    model: Base, lora_config: LoRAConfig, module: str, parts: list[str], shape: tuple[int, int]
) -> tuple[Slot, Slot]:
    """The tensors of one module's A and B: those of its parts, one below the other; shape: (out, in), each part's."""
    if len({rows.stop - rows.start for rows in module_parts(model.config, module).values() if parts != [module]}) > 1:
        raise ValueError(f"{module}: loralib's MergedLinear has parts of one size, but here q, k and v differ")
    r, s = lora_config.rank(parts[0]), lora_config.scale(parts[0])
    for part in parts:
        if lora_config.rank(part) != r or abs(lora_config.scale(part) - s) > SAME * abs(s):
            raise ValueError(
                f"{module}: loralib gives one rank and one scale to q, k and v, but here they differ: r = {r}, "
                f"s = {s!r} for {parts[0]}, r = {lora_config.rank(part)}, s = {lora_config.scale(part)!r} for {part}"
            )
    n_out, n_in = shape
    A, B = (Slot((len(parts) * n, width), model.dtype, {}) for n, width in ((r, n_in), (n_out, r)))
    for i, part in enumerate(parts):
        A.blocks[f"{part}.A"] = (slice(i * r, (i + 1) * r), slice(None))
        B.blocks[f"{part}.B"] = (slice(i * n_out, (i + 1) * n_out), slice(None))
    return A, B


# --- Files of loralib's own ------------------------------------------------------------------------------------------


def _read_theirs(file: TensorFile, model: Base, alpha: float | None, enabled: Sequence[str] | None) -> Adapter:
    """An adapter from a file that holds tensors alone."""
    config, where, shapes = model.config, str(file.path), adapted_shapes(model.config)
    if alpha is None:
        raise ValueError(f"{where}: alpha: loralib's files do not say it: expected the program's lora_alpha, got none")
    keys = _keys(file, config)
    ranks: dict[str, int] = {}
    for module in dict.fromkeys(module for module, kind in keys if kind in FACTORS):
        for matrix in _parts(file, config, module, keys, enabled, shapes):
            ranks[matrix] = file.shapes[keys[module, FACTORS[1]]][1]
    if not ranks:
        raise ValueError(f"{where}: expected lora_A and lora_B of some module, got none")
    fields = described(config, ranks, dict.fromkeys(ranks, alpha), most_common(ranks.values(), 0), alpha)
    lora_config = from_fields(LoRAConfig, fields, where)
    factors = [f"{matrix}.{factor}" for matrix in ranks for factor in "AB"]
    biases = [f"{part}.bias" for module, kind in keys if kind == ".bias" for part in _matrices(config, module)]
    for name in biases:
        if name not in model.weights:
            raise ValueError(f"{where}: {name}: this model has no such bias")
    try:
        places = {(m, f".{kind}"): slot for (m, kind), slot in whole_slots(model, biases).items()}
        for module, parts in checked_groups(config, lora_config, factors).items():
            A, B = _factor_slots(model, lora_config, module, parts, shapes[parts[0]])
            places |= {(module, FACTORS[0]): A, (module, FACTORS[1]): B}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    by_key = {keys[place]: slot for place, slot in places.items()}
    file.check_names(
        {key: slot.shape for key, slot in by_key.items()}, left_out=file.shapes.keys() - set(keys.values())
    )
    params = read_params(file, model, by_key)
    return _with_biases(
        model, lora_config, {name: params[name] for name in factors}, {name: params[name] for name in biases}
    )


def _keys(file: TensorFile, config: Config) -> dict[tuple[str, str], str]:
    """(our name of a module, .lora_A or .lora_B or .bias) -> the file's key; the trunk's name on all, or on none."""
    wanted = [key for key in file.shapes if not re.fullmatch(MASKS, key)]
    unknown: list[str] = []
    for in_trunk in (True, False):
        ours = {theirs: name for name, theirs in module_names(config, in_trunk=in_trunk).items()}
        found = {}
        for key in wanted:
            stem, _, kind = key.rpartition(".")
            if stem in ours and f".{kind}" in (*FACTORS, ".bias"):
                found[ours[stem], f".{kind}"] = key
        if len(found) == len(wanted):
            return found
        unknown = unknown or sorted(set(wanted) - set(found.values()))
    raise ValueError(f"{file.path}: the tensor {shown(unknown[0])} has no place in this model")


def _matrices(config: Config, module: str) -> list[str]:
    """Our matrices in a module: q, k and v where they are one."""
    parts = list(module_parts(config, module))
    return parts if module_of(parts[0], family_of(config)) == module else [module]


def _parts(
    file: TensorFile,
    config: Config,
    module: str,
    keys: Mapping[tuple[str, str], str],
    enabled: Sequence[str] | None,
    shapes: Mapping[str, tuple[int, int]],
) -> list[str]:
    """The matrices that a module's lora_A and lora_B adapt: the module, or in a MergedLinear those of q, k and v.

    shapes: (out, in) of all that may be adapted.
    """
    missing = [end for end in FACTORS if (module, end) not in keys]
    if missing:
        raise ValueError(f"{file.path}: {module}: {missing[0][1:]} is missing")
    where = f"{file.path}: {keys[module, FACTORS[0]]}"
    A, B = (file.shapes[keys[module, end]] for end in FACTORS)
    if len(A) != 2 or len(B) != 2 or min(*A, *B) < 1:
        raise ValueError(f"{where}: expected matrices, got A {A} and B {B}")
    parts = _matrices(config, module)
    if len(parts) == 1 or (A[0] == B[1] and B[0] == shapes[module][0]):
        return [module]
    n, rest = divmod(A[0], B[1])
    if rest or n > 3 or B[0] != n * shapes[parts[0]][0]:
        raise ValueError(f"{where}: expected a Linear, or a MergedLinear of q, k and v, got A {A} and B {B}")
    chosen = DEFAULT_ENABLED.get(n) if enabled is None else enabled
    if chosen is None:
        raise ValueError(f"{where}: enabled: one of q, k and v is adapted: expected it to be said which, got none")
    if len(chosen) != n or len(set(chosen)) != n or not set(chosen) <= set("qkv"):
        raise ValueError(f"{where}: enabled: expected {n} of q, k and v, each once, got {chosen!r:.60}")
    return [part for part in parts if target_of(part) in chosen]


def _with_biases(
    model: Base, lora_config: LoRAConfig, factors: Mapping[str, Array], biases: dict[str, Array]
) -> Adapter:
    """The adapter with the biases that the file has: those of adapted matrices, or else all."""
    adapter = Adapter(lora_config, factors)
    if not biases:
        return adapter
    only, every = (replace(lora_config, bias=kind) for kind in ("lora_only", "all"))
    of_adapted, of_all = (trained_whole(model.config, c, adapter.matrices) for c in (only, every))
    # A MergedLinear has the bias of all c_attn beside it, of which it may have left a part alone.
    others = {name: value for name, value in biases.items() if name not in of_adapted}
    alone = all(np.array_equal(asnumpy(value), asnumpy(model.weights[name])) for name, value in others.items())
    if alone and set(of_adapted) <= biases.keys() and len(biases) < len(of_all):
        return Adapter(only, {**factors, **{name: biases[name] for name in of_adapted}})
    whole = {name: biases[name] if name in biases else model.weights[name].copy() for name in of_all}
    return Adapter(every, {**factors, **whole})
