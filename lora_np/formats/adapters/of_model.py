"""An adapter's file on a model that is run: its modules by our names. What it says, `contents` has read.

What `merge` takes by name and no Adapter holds is refused here, by the command that takes it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...adapter import Adapter, LoRAConfig, adapted_shapes, trained_whole
from ...backend import Array
from ...model import Config
from ..files.json_file import from_fields
from ..files.messages import nearest, shown
from ..files.safetensors_file import DTYPES, check_widens
from ..models.base import Base
from ..models.names import module_names, module_parts, module_shapes, saved_whole
from .contents import Contents, Pair
from .peft_config import AUTO_SAVED, CONFIG, MERGE, READ, check_keys, described, most_common
from .peft_tensors import base_tensor, whole_slots
from .prefix import change_of_prefix, moved
from .targets import Known, mistargeted, names_in


def check_supported(raw: Mapping[str, Any], where: str) -> None:
    """A ValueError if a configuration asks for what no Adapter holds; mlx-lm's asks for nothing of the kind."""
    if "peft_type" in raw or "fine_tune_type" not in raw:
        check_keys(raw, where)


def adapter_of(contents: Contents, model: Base) -> Adapter:
    """The adapter of a model that a file says, its dtype widened to the model's, never rounded.

    A ValueError names what does not fit the model, what the configuration and the tensors say unlike, and what no
    Adapter holds.
    """
    config, where = model.config, str(contents.weights)
    full, trains_head = _full_names(contents, config), _trains_head(contents, config)
    ours = {theirs: name for name, theirs in module_names(config).items()}
    for line in [*mistargeted(contents, _known(contents, config, full)), *contents.left_out]:
        raise ValueError(f"{contents.path / CONFIG}: {line}")
    found = {ours[full[module]]: (module, several) for module, several in contents.pairs.items()}
    shapes, params, pairs = module_shapes(config), dict[str, Array](), dict[str, Pair]()
    adaptable = adapted_shapes(config)
    for name in (name for name in shapes if name in found):
        module, several = found[name]
        pair = _one(several, name, shapes[name], f"{where}: {shown(module)}")
        stem = f"{where}: {shown(module)}.lora_"
        A, B = (_wide(values, model.dtype, stem + factor) for factor, values in (("A", pair.A), ("B", pair.B)))
        m = None if pair.m is None else _wide(pair.m, model.dtype, f"{stem}magnitude_vector")
        # An Adapter has no name for gate and up together: each has the same A, and its rows of B.
        parts = {name: slice(None)} if name in adaptable else module_parts(config, name)
        for matrix, rows in parts.items():
            pairs[matrix] = pair
            params |= {f"{matrix}.A": A, f"{matrix}.B": np.ascontiguousarray(B[rows])}
            params |= {} if m is None else {f"{matrix}.m": np.ascontiguousarray(m[rows])}
    lora_config = replace(_config(contents, config, pairs), train_head=trains_head)
    return Adapter(lora_config, params | _whole(contents, model, full, trained_whole(config, lora_config, pairs)))


def _full_names(contents: Contents, config: Config) -> dict[str, str]:
    """The family's name of each module of the file, and of each tensor that is trained whole.

    Where one prefix in the place of another makes all modules known, that is mended.
    """
    known = module_names(config)
    theirs, adaptable = set(known.values()), {known[name] for name in module_shapes(config) if name in known}
    unknown = [module for module in contents.pairs if module not in theirs]
    change = change_of_prefix(unknown, theirs) if unknown else None
    if unknown and change is None:
        near = nearest(unknown[0], adaptable)
        raise ValueError(f"{contents.weights}: {shown(unknown[0])}: this model has no such module to adapt{near}")
    names = {module: module for module in contents.pairs}
    if change is not None:
        names |= {module: str(moved(module, *change)) for module in unknown}
    for module, name in names.items():
        if name not in adaptable:
            raise ValueError(f"{contents.weights}: {shown(module)}: not adapted where the model is run; {MERGE}")
    if len(set(names.values())) < len(names):
        raise ValueError(f"{contents.weights}: a module is there twice, under names that differ in a prefix")
    for name in (*contents.whole, *contents.originals):
        options = [name, *([moved(name, *change)] if change else [])]
        found = next((one for one in options if one and one.rpartition(".")[0] in theirs), None)
        if found is None:
            raise ValueError(f"{contents.weights}: the tensor {shown(name)} has no place in this model")
        names[name] = found
    return names


def _known(contents: Contents, config: Config, full: Mapping[str, str]) -> Known:
    """What the configuration may name of the model: all matrices, and which of them PEFT takes for linear."""
    names, shapes = module_names(config), config.weight_shapes()
    linear = {names[name] for name in module_shapes(config) if name in names}
    tables = {names[name] for name in names if len(shapes.get(name, shapes.get(f"{name}.weight", ()))) == 2}
    matrices, output = linear | tables, names.get("head", "")
    # PEFT knows a language model's output, and a classifier's by its name, which RoBERTa's does not have.
    is_named = contents.raw.get("task_type") == "SEQ_CLS" and output in AUTO_SAVED["SEQ_CLS"]
    linear -= {names["embed.tokens"], *([output] if config.head == "lm" or is_named else [])}
    return Known(full, matrices, matrices - {full[module] for module in contents.pairs}, linear)


def _one(several: Sequence[Pair], name: str, shape: tuple[int, int], where: str) -> Pair:
    """The one pair of a matrix of this shape."""
    if len(several) > 1:
        raise ValueError(f"{where}: expected one A and B of a module, got {len(several)}; {MERGE}")
    pair, (n_out, n_in) = several[0], shape
    if (len(pair.B), pair.A.shape[1], pair.is_look_up) != (n_out, n_in, name == "embed.tokens"):
        raise ValueError(
            f"{where}: expected {'a look-up of ' if name == 'embed.tokens' else ''}A (r, {n_in}) and B ({n_out}, r), "
            f"got A {pair.A.shape} and B {pair.B.shape}"
        )
    return pair


def _wide(values: Array, dtype: np.dtype[Any], where: str) -> Array:
    """An array in the model's dtype; a ValueError if it would be rounded."""
    stored = values.dtype.name if values.dtype.name in DTYPES.values() else "float32"  # which holds 16 bits
    check_widens(stored, dtype, where)
    return np.ascontiguousarray(values.astype(dtype, copy=False))


def _config(contents: Contents, config: Config, pairs: Mapping[str, Pair]) -> LoRAConfig:
    """Our configuration; mlx-lm's file has a scale alone, whose alpha is s r."""
    raw, where = contents.raw, str(contents.path / CONFIG)
    ranks = {name: pair.r for name, pair in pairs.items()}
    alphas = {name: pair.s * pair.r if pair.alpha is None else pair.alpha for name, pair in pairs.items()}
    if "peft_type" not in raw:
        raw = {"r": most_common(ranks.values(), 1), "lora_alpha": most_common(alphas.values(), 1.0)}
    said = {key: raw.get(key, default) for key, default in READ.items()}
    fields = described(config, ranks, alphas, said["r"], said["lora_alpha"]) | {
        "dropout": said["lora_dropout"],
        "bias": said["bias"],
        "rslora": said["use_rslora"],
        "dora": contents.has_dora,
    }
    if said["init_lora_weights"] == "gaussian":
        fields |= {"init": "normal", "sigma": 1 / said["r"]}  # PEFT's
    return from_fields(LoRAConfig, fields, where)


def _trains_head(contents: Contents, config: Config) -> bool:
    """Whether modules_to_save names the head. No other module can be trained whole."""
    raw, where = contents.raw, str(contents.path / CONFIG)
    heads = names_in(raw, "modules_to_save", where)
    if not heads:
        return False
    if config.head == "none":
        raise ValueError(f"{where}: modules_to_save: this model has no head, got {heads!r:.60}")
    head, task = saved_whole(config), raw.get("task_type")
    known = {head, *([saved_whole(config, "pooler")] if config.pooler_in_head and config.has_pooler else [])}
    known.update(AUTO_SAVED.get(task, ()) if isinstance(task, str) else ())
    for name in heads:
        if name not in known:
            raise ValueError(
                f"{where}: modules_to_save: {name!r:.60}: only the head, {head}, can be trained whole; {MERGE}"
            )
    return head in heads


def _whole(contents: Contents, model: Base, full: Mapping[str, str], names: Collection[str]) -> dict[str, Array]:
    """The parameters `names` that are trained whole; any other tensor must be the base's own."""
    theirs, where = module_names(model.config), str(contents.weights)
    slots = {f"{theirs[module]}.{kind}": slot for (module, kind), slot in whole_slots(model, names).items()}
    given = {full[name]: values for name, values in contents.whole.items()}
    for name in (name for name in slots if name not in given):
        raise ValueError(f"{where}: the tensor {shown(name)} is missing")
    params: dict[str, Array] = {}
    for name, slot in slots.items():
        if given[name].shape != slot.shape:
            raise ValueError(f"{where}: {shown(name)}: expected shape {slot.shape}, got {given[name].shape}")
        params |= slot.read(_wide(given[name], model.dtype, f"{where}: {name}"), model, f"{where}: {name}")
    originals = {full[name]: stored.read_finite() for name, stored in contents.originals.items()}
    others = {name: values for name, values in given.items() if name not in slots}
    ours = {module: name for name, module in theirs.items()}
    for name, values in (*others.items(), *originals.items()):
        module, _, kind = name.rpartition(".")
        own = base_tensor(model, ours[module], kind)
        if own is None:
            raise ValueError(f"{where}: the tensor {shown(name)} has no place in this model")
        own_name = ours[module] if ours[module] in model.weights else f"{ours[module]}.{kind}"
        if not np.array_equal(values.astype(np.float64), own.astype(np.float64)):
            raise ValueError(
                f"{where}: {shown(name)}: expected a copy of {own_name}, got other values: where the model "
                f"is run, biases and the head alone are trained whole; {MERGE}"
            )
    return {name: params[name] for name in names}
