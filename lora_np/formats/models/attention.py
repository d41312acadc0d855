"""What config.json says of attention: a head's width, its rotary positions, the layers with a window."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...checks import is_number
from ...ops import llama3_factors
from ..files.messages import shown
from .family import Key, value_of

ROTARY = ("rope_parameters", "rope_scaling")  # the newer key, and the older
SHARE = "partial_rotary_factor"
# Kinds of scaled frequencies, and what each needs.
SCALINGS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
KINDS = ("sliding_attention", "full_attention")


def head_width(raw: Mapping[str, Any], said: Mapping[str, Any], where: str, default: int | None = None) -> int | None:
    """Config.d_head: head_dim, unless it is D / H. default: what an absent one means."""
    width: int | None = value_of(raw, "head_dim", Key("d_head", int, default, least=1), where)
    return None if width is None or width * said["n_head"] == said["d_model"] else width


def rotary(
    raw: Mapping[str, Any],
    said: Mapping[str, Any],
    where: str,
    *,
    theta: float = 10000.0,
    kind: str | None = None,
    partial: bool = False,
) -> dict[str, Any]:
    """T11: Config.rope_theta, rope_factors and rope_width, from where the older and the newer files have them.

    said: the fields so far, d_head too; theta: what an absent base means; kind: of layers, where rope_parameters has an
    object for each; partial: whether the family's models may turn a part of K. A ValueError names a scaling that is not
    linear's or Llama 3's.
    """
    found = {"rope_theta": dict[str, Any](), SHARE: dict[str, Any]()}  # by where each stands
    for name, places in found.items():
        if raw.get(name) is not None:
            places[name] = raw[name]
    scalings: dict[str, dict[str, Any]] = {}
    for key in ROTARY:
        value = raw.get(key)
        if isinstance(value, dict) and kind is not None and kind in value:
            value = value[kind]
        if value is None:
            continue
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {key}: expected an object, got {value!r:.60}")
        scalings[key] = {name: inner for name, inner in value.items() if name not in found}
        for name, places in found.items():
            if name in value:
                places[f"{key}.{name}"] = value[name]
    base, share = _one(found["rope_theta"], theta, where), _one(found[SHARE], 1.0, where)
    if share != 1 and not partial:
        raise ValueError(f"{where}: {' '.join(found[SHARE])}: {share} is not supported, only 1.0")
    width = said["d_model"] // said["n_head"] if said.get("d_head") is None else said["d_head"]
    turned = int(width * share)
    factors = {key: _factors(scaling, turned, base, f"{where}: {key}") for key, scaling in scalings.items() if scaling}
    if len(set(factors.values())) > 1:
        raise ValueError(f"{where}: {' and '.join(factors)} differ")
    fields: dict[str, Any] = {"rope_theta": base, "rope_factors": list(next(iter(factors.values()), (1.0,)))}
    return fields if turned == width else {**fields, "rope_width": turned}


def _is_positive(value: object) -> bool:
    return is_number(value) and value > 0


def _one(places: Mapping[str, Any], default: float, where: str) -> float:
    """The number that all places say."""
    for name, value in places.items():
        if not _is_positive(value):
            raise ValueError(f"{where}: {name}: expected a number above 0, got {value!r:.60}")
    if len(set(places.values())) > 1:
        raise ValueError(f"{where}: {' and '.join(places)} differ: {' '.join(map(repr, places.values()))}")
    return float(next(iter(places.values()), default))


def _factors(scaling: Mapping[str, Any], turned: int, base: float, where: str) -> tuple[float, ...]:
    """Config.rope_factors."""
    kinds = [scaling[name] for name in ("rope_type", "type") if name in scaling]
    kind = kinds[0] if kinds else "default"
    needed = SCALINGS.get(kind, ()) if isinstance(kind, str) else ()
    for name, value in scaling.items():
        is_type = name in ("rope_type", "type")
        if name not in needed and not (is_type and value == kind and kind in SCALINGS):
            raise ValueError(f"{where}: {shown(name)} = {value!r:.60} is not supported")
    for name in needed:
        if not _is_positive(scaling.get(name)):
            raise ValueError(f"{where}: {name}: expected a number above 0, got {scaling.get(name)!r:.60}")
    if kind != "llama3":
        return (float(scaling.get("factor", 1.0)),)
    factor, low, high, original = (scaling[name] for name in needed)
    if low >= high:
        raise ValueError(f"{where}: low_freq_factor: expected less than high_freq_factor, {high}, got {low}")
    return llama3_factors(turned, base, factor=factor, low=low, high=high, original=original)


def windows(
    raw: Mapping[str, Any], said: Mapping[str, Any], where: str, *, full: Iterable[int] = (), default: int | None = None
) -> dict[str, Any]:
    """T9: Config.window and full_layers, from sliding_window and layer_types.

    full: the layers without a window where layer_types is not there; default: what an absent sliding_window means.
    """
    n_layer, kinds, window = said["n_layer"], raw.get("layer_types"), raw.get("sliding_window", default)
    if window is not None:
        window = value_of(raw, "sliding_window", Key("window", int, default, least=1), where)
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != n_layer or not all(kind in KINDS for kind in kinds):
            raise ValueError(
                f"{where}: layer_types: expected one of {' '.join(KINDS)} for each layer, got {kinds!r:.60}"
            )
        full = [i for i, kind in enumerate(kinds) if kind == KINDS[1]]
    full = list(full)
    if len(full) == n_layer:
        return {}
    if window is None and kinds is not None:
        raise ValueError(f"{where}: sliding_window: expected a number of keys, as layer_types asks for, got none")
    return {} if window is None else {"window": window, "full_layers": full}
