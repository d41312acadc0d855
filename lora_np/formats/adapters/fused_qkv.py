"""One update of q, k and v together, for families whose q, k and v are three modules in PEFT.

With A (r, D) and B (rows of q, k and v, r) it is three updates with the same A and each its rows of B, and of DoRA's m:
nothing is rounded, and the three become the one again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from ...adapter import Adapter, LoRAConfig, fused_parts, target_of
from ...backend import Array, xp
from ...model import Config
from ..models.names import family_of


def is_apart(config: Config) -> bool:
    """Whether the family's models have no module for q, k and v together."""
    return "layers.{i}.attn.qkv" not in family_of(config).modules


def take_apart(config: Config, adapter: Adapter) -> Adapter:
    """The same updates with q, k and v in the place of qkv, where the family keeps the three apart."""
    if not is_apart(config):
        return adapter
    params = {}
    for name, value in adapter.params.items():
        names = three(name)
        parts = fused_parts(config, name[:-2]) if len(names) == 3 else {"": slice(None)}
        for part, rows in zip(names, parts.values(), strict=True):
            params[part] = value if name.endswith(".A") else value[rows]
    return Adapter(config_apart(adapter.config), params)


def config_apart(lora_config: LoRAConfig) -> LoRAConfig:
    """The configuration of `take_apart`'s result."""

    def patterns(values: Mapping[str, Any]) -> dict[str, Any]:
        return {part: value for name, value in values.items() for part in three(name)}

    return replace(
        lora_config,
        targets=tuple(part for target in lora_config.targets for part in three(target)),
        rank_pattern=patterns(lora_config.rank_pattern),
        alpha_pattern=patterns(lora_config.alpha_pattern),
    )


def stored_apart(
    config: Config, lora_config: LoRAConfig, names: Collection[str], where: str
) -> tuple[LoRAConfig, list[str]]:
    """The configuration of `take_apart`'s result, and its parameters' names; a ValueError if one is there twice."""
    if not is_apart(config):
        return lora_config, list(names)
    stored = [part for name in names for part in three(name)]
    if len(set(stored)) < len(stored):
        raise ValueError(f"{where}: params: q, k or v both alone and in qkv")
    return config_apart(lora_config), stored


def put_together(config: Config, params: Mapping[str, Array], names: Collection[str], where: str) -> dict[str, Array]:
    """The parameters `names` that `take_apart` was given; a ValueError if the three A are not one."""
    result = {}
    for name in names:
        parts = [params[part] for part in three(name)] if is_apart(config) else [params[name]]
        if name.endswith(".A") and not all(xp.array_equal(part, parts[0]) for part in parts):
            raise ValueError(f"{where}: {name}: expected the same A for q, k and v, got others")
        result[name] = parts[0] if name.endswith(".A") or len(parts) == 1 else xp.concatenate(parts)
    return result


def three(name: str) -> list[str]:
    """q, k and v in the place of qkv, in the name of a target, a matrix or a factor; any other name alone."""
    stem, end = (name[:-2], name[-2:]) if name.endswith((".A", ".B", ".m")) else (name, "")
    return [f"{stem[:-3]}{part}{end}" for part in "qkv"] if target_of(stem) == "qkv" else [name]
