"""What our own files of adapters say beside the tensors, as JSON: the configuration, the parameters, the base."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import numpy as np

from ...adapter import Adapter, LoRAConfig, check_adapter
from ...backend import asnumpy
from ...model import Model
from ..files.json_file import from_fields, parse_json, to_fields, to_json
from ..files.messages import shown
from ..files.safetensors_file import DTYPES, check_widens
from ..models.base import Base, LazyWeights
from ..models.folder import weights_hash
from .peft_tensors import FACTORS

KEY, FORMAT = "lora_np", 1  # the metadata's key


def write_about(adapter: Adapter, model: Model) -> str:
    """The JSON text for an adapter of `model`."""
    about_base = {"head": model.config.head, "base_sha256": base_hash(model, adapter.whole, model.dtype.name)}
    return to_json({**_about(adapter), **about_base})


def write_about_any(adapter: Adapter) -> str:
    """The JSON text for an adapter whose base may stand in files of several dtypes: it is not recorded."""
    return to_json(_about(adapter))


def _about(adapter: Adapter) -> dict[str, Any]:
    return {"format": FORMAT, "config": to_fields(adapter.config), "params": list(adapter.params)}


def check_savable(adapter: Adapter, model: Model) -> None:
    """A ValueError or TypeError unless it is an adapter of `model`, of finite float32 or float64."""
    if model.dtype.name not in DTYPES.values():
        raise TypeError(f"save_adapter: expected float32 or float64 weights, got {model.dtype}")
    check_adapter(model, adapter)
    for name, value in adapter.params.items():
        if not np.isfinite(asnumpy(value)).all():
            raise ValueError(f"save_adapter: {name}: holds NaN or infinite numbers")


def read_about(text: str | bytes, where: str) -> dict[str, Any]:
    """The object in such a text. `where` names it in a ValueError: it is damaged, or of another format."""
    about = parse_json(text, where)
    if about.get("format") != FORMAT:
        raise ValueError(f"{where}: format: expected {FORMAT}, got {about.get('format')!r:.60}")
    return about


def check_about(about: dict[str, Any], model: Base, dtypes: Iterable[str], where: str) -> tuple[LoRAConfig, list[str]]:
    """The configuration, and the names of the parameters in order; a ValueError if the adapter has another base.

    dtypes: those of the tensors, "F32" or "F64": what the adapter was made in, and so the base when it was hashed.
    """
    lora_config, names = check_config(about, where)
    dtype = made_in(dtypes, model, where)
    whole = [name for name in names if name[-2:] not in FACTORS]
    recorded, own = about.get("base_sha256"), base_hash(model, whole, dtype)
    if recorded != own:
        raise ValueError(
            f"{where}: made for another base: the SHA-256 of its base's weights starts with "
            f"{shown(str(recorded)[:12])}, this model's with {own[:12]}"
        )
    return lora_config, names


def check_config(about: dict[str, Any], where: str) -> tuple[LoRAConfig, list[str]]:
    """The configuration, and the names of the parameters in order, of any base's adapter."""
    names = about.get("params")
    if not isinstance(names, list) or not all(_is_name(name) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"{where}: params: expected a list of names, each once, got {names!r:.60}")
    return from_fields(LoRAConfig, about.get("config"), where), names


def _is_name(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.]{1,200}", value) is not None


def made_in(dtypes: Iterable[str], model: Base, where: str) -> str:
    """The dtype of an adapter's tensors, if it is one; a ValueError if they would be rounded to the model's."""
    found = {DTYPES[dtype] for dtype in dtypes if dtype in DTYPES}  # any other is refused with its tensor's name
    for dtype in found:
        check_widens(dtype, model.dtype, where)
    return found.pop() if len(found) == 1 else model.dtype.name


def base_hash(model: Base, whole: Collection[str], dtype: str) -> str:
    """`weights_hash` of what an adapter of this dtype depends on: all weights but those that it has whole.

    A weight that was widened from `dtype` is hashed as it was before: base and adapter may both be widened.
    """
    kept = (name for name in model.weights if name not in whole)
    return weights_hash(LazyWeights({name: partial(model.weights.__getitem__, name) for name in kept}), dtype)
