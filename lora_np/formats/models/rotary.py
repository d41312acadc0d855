"""Rotary positions in config.json (T11)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..files.messages import shown

ROTARY = ("rope_parameters", "rope_scaling")  # the newer key, and the older


def rope_theta(raw: Mapping[str, Any], where: str) -> float:
    """Rotary's base, from where the older and the newer files have it. No scaling is supported."""
    found = {"rope_theta": raw["rope_theta"]} if "rope_theta" in raw else {}
    for key in ROTARY:
        value = raw.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {key}: expected an object, got {value!r:.60}")
        for name, inner in value.items():
            if name == "rope_theta":
                found[f"{key}.rope_theta"] = inner
            elif (name, inner) not in [("rope_type", "default"), ("type", "default"), ("partial_rotary_factor", 1.0)]:
                raise ValueError(f"{where}: {key}: {shown(name)} = {inner!r:.60} is not supported")
    for name, value in found.items():
        if type(value) not in (int, float) or value <= 0:
            raise ValueError(f"{where}: {name}: expected a number above 0, got {value!r:.60}")
    if len(set(found.values())) > 1:
        raise ValueError(f"{where}: {' and '.join(found)} differ: {' '.join(map(repr, found.values()))}")
    return float(next(iter(found.values()), 10000.0))
