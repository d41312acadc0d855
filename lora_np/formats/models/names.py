"""Our names of a model's modules beside its family's."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cache

from ...adapter import adapted_shapes
from ...model import ENCODER, Config
from .families import FAMILIES, OWN
from .family import Family

NAMED = (*FAMILIES.values(), OWN)
# A fused module holds the rows of these, one below the other.
FUSED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.gate_up": ("mlp.gate", "mlp.up")}
_FUSED_IN = {part: module for module, parts in FUSED.items() for part in parts}


@cache
def family_of(config: Config) -> Family:
    """The family whose names a model's files use: config.family, or the first that fits; else the package's own."""
    known = FAMILIES.get(config.family or "")
    return next((family for family in (*([known] if known else []), *NAMED) if family.fits(config)), OWN)


def module_names(config: Config, *, in_trunk: bool | None = None) -> dict[str, str]:
    """Our name of each module -> its full name in the family's models: layers.0.attn.o -> transformer.h.0.attn.c_proj.

    in_trunk: whether the modules stand in the family's trunk; None: as they do in its model with this head. Names of
    modules that the configuration lacks may be among them.
    """
    family = family_of(config)
    if in_trunk is None:
        in_trunk = config.head != "none"
    trunk = f"{family.trunk}." if family.trunk and in_trunk else ""
    return _each_layer(config, {ours: trunk + theirs for ours, theirs in family.modules.items()})


def stored_name(family: Family, name: str) -> str:
    """What files call a tensor that the model in memory calls so."""
    for memory, files in family.stored.items():
        if name.startswith(memory):
            return files + name.removeprefix(memory)
    return name


def our_names(modules: Collection[str]) -> dict[str, str] | None:
    """Our name of each of these modules, by their family's, in its trunk or not; None if they are of no one family."""
    for family in NAMED:
        templates = {theirs: ours for one in (family.modules, *family.heads.values()) for ours, theirs in one.items()}
        found = {}
        for module in modules:
            bare = module.removeprefix(f"{family.trunk}.")
            layer = re.search(r"(?:^|\.)(\d+)\.", bare)
            ours = templates.get(bare if layer is None else f"{bare[: layer.start(1)]}{{i}}{bare[layer.end(1) :]}")
            if ours is not None:
                found[module] = ours.replace("{i}", layer[1] if layer else "")
        if len(found) == len(modules):
            return found
    return None


def short_names(config: Config) -> dict[str, str]:
    """Our name of each module -> what its full name ends in, in every layer: layers.0.attn.o -> attn.c_proj."""
    modules = family_of(config).modules
    return _each_layer(config, {ours: theirs.split("{i}.")[-1] for ours, theirs in modules.items()})


def module_of(matrix: str, family: Family) -> str:
    """The module that holds a matrix, by our name: itself, or the fused one that the family has in its place."""
    stem, part = _split(matrix)
    fused = f"{stem}{_FUSED_IN[part]}" if part in _FUSED_IN else matrix
    return fused if _template(fused) in family.modules and _template(matrix) not in family.modules else matrix


def module_parts(config: Config, module: str) -> dict[str, slice]:
    """The matrices in a module, by our names, and the rows of each: those of a fused one, or itself."""
    stem, part = _split(module)
    if part not in FUSED:
        return {module: slice(None)}
    shapes, start, rows = _matrix_shapes(config), 0, dict[str, slice]()
    for name in (stem + one for one in FUSED[part]):
        rows[name] = slice(start, start := start + shapes[name][0])
    return rows


def module_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """(out, in) of each module that may be adapted in the family's models, and of each matrix in one."""
    family, shapes = family_of(config), adapted_shapes(config)
    fused: dict[str, tuple[int, int]] = {}
    for name, (n_out, n_in) in _matrix_shapes(config).items():
        module = module_of(name, family)
        if module not in shapes:
            fused[module] = (fused.get(module, (0, n_in))[0] + n_out, n_in)
    return shapes | fused


def saved_whole(config: Config, stem: str = "head") -> str:
    """The module that PEFT trains whole for the head (or pooler): RoBERTa's classifier holds both of its matrices."""
    return module_names(config)[stem].split(".")[0]


def _split(name: str) -> tuple[str, str]:
    """("layers.3.", "attn.q")"""
    end = ".".join(name.split(".")[-2:])
    return name.removesuffix(end), end


def _template(name: str) -> str:
    return re.sub(r"\blayers\.\d+\.", "layers.{i}.", name)


@cache
def _matrix_shapes(config: Config) -> Mapping[str, tuple[int, int]]:
    return config.matrix_shapes()


def _each_layer(config: Config, names: Mapping[str, str]) -> dict[str, str]:
    """The names with {i} replaced by each layer's number, and the head's."""
    result = {}
    for ours, theirs in names.items():
        n_layer = config.n_encoder if ours.startswith(ENCODER) else config.n_layer
        for i in range(n_layer if "{i}" in ours else 1):
            result[ours.replace("{i}", str(i))] = theirs.replace("{i}", str(i))
    return result | dict(family_of(config).heads.get(config.head, {}))
