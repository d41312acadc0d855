"""An adapter by its modules' names in another format: PEFT's folder, and llama.cpp's file, on any base's folder.

What PEFT would not find, and mlx-lm's, becomes a folder that it loads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..adapters.adapter import kind_of
from ..adapters.contents import Contents, Pair, read_contents
from ..adapters.peft_config import MODULES, PATTERNS, WEIGHTS, endings
from ..adapters.peft_writer import config_of, write_peft
from ..adapters.prefix import difference, moved
from ..files.messages import shown
from .any_adapter import read_for
from .any_base import AnyBase, open_any_base
from .by_name import changes_of
from .gguf_by_name import write_gguf
from .matching import base_names, proper_names
from .new_head import with_new_head

BY_MODULE = (*MODULES, *PATTERNS, "target_parameters", "modules_to_save", "trainable_token_indices")  # keys


def convert_by_name(base_path: Path, adapter_path: Path, out: Path) -> list[str]:
    """Writes the adapter anew, by the base's names in memory, or llama.cpp's, and says what was wrong with it.

    In a folder its tensors keep their dtypes and bits. A ValueError names what does not fit the base; what is wrong
    with the configuration beyond names, this does not mend.
    """
    base = open_any_base(base_path)
    adapter = read_for(base, adapter_path)
    base = with_new_head(base, [adapter])
    remarks = changes_of(base, [adapter], [1.0]).remarks
    if kind_of(out) == "gguf":
        write_gguf(base, adapter, out)
        return remarks
    names = proper_names(base, adapter)
    pairs = {names[name]: several for name, several in adapter.pairs.items()}
    whole = {_beside_update(names[name], names, adapter): value for name, value in adapter.whole.items()}
    rows = {names[name]: found for name, found in adapter.rows.items()}
    write_peft(out, _config(base, adapter, names, pairs), pairs, whole, rows)
    return remarks


def fits_as_it_is(base_path: Path, adapter_path: Path) -> bool:
    """Whether an adapter is one file of PEFT's, in which it finds every tensor under its own name."""
    base = open_any_base(base_path)
    adapter = read_contents(adapter_path, base.names)
    if "peft_type" not in adapter.raw or not (adapter_path / WEIGHTS).exists():
        return False
    base = with_new_head(base, [adapter])
    return not adapter.remarks and not base_names(base, adapter)[1]


def _beside_update(key: str, names: Mapping[str, str], adapter: Contents) -> str:
    """The name that PEFT gives a whole tensor: what it adapts besides stands in a wrapper."""
    module, _, part = key.rpartition(".")
    if module in {names[name] for name in adapter.pairs}:
        return f"{module}.base_layer.{part}"
    if module in {names[name] for name in adapter.rows}:
        return f"{module}.token_adapter.base_layer.{part}"
    return key


def _config(
    base: AnyBase, adapter: Contents, names: Mapping[str, str], pairs: Mapping[str, list[Pair]]
) -> dict[str, Any]:
    """adapter_config.json by full names; experts' parameters, which PEFT knows by their ends, as it was."""
    targeted = adapter.raw.get("target_parameters") or []
    parameters = {f"{module}.{target.rpartition('.')[2]}" for module in pairs for target in targeted}
    raw = _renamed(adapter.raw, names, base.names | parameters)
    if raw.get("target_parameters"):
        return raw
    firsts = {name: several[0] for name, several in pairs.items()}
    alphas = {name: pair.s * pair.r if pair.alpha is None else pair.alpha for name, pair in firsts.items()}
    said = config_of(firsts)
    alpha = alphas[next(iter(alphas))] if alphas else said["lora_alpha"]
    said |= {"lora_alpha": alpha, "alpha_pattern": {f"^{n}": a for n, a in alphas.items() if a != alpha}}
    if "peft_type" not in raw:
        for name in adapter.whole:
            raise ValueError(
                f"{adapter.path}: {shown(name)}: trained whole: of mlx-lm's, PEFT's format is given A and B"
            )
        return said
    by_name = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
    return {
        **raw, **{key: said[key] for key in by_name}, "exclude_modules": None, "layers_to_transform": None,
        "layers_pattern": None,
    }  # fmt: skip


def _renamed(raw: Mapping[str, Any], names: Mapping[str, str], known: Collection[str]) -> dict[str, Any]:
    """The configuration, with the base's names of modules in the place of the file's, where those have another prefix.

    names: the base's of each of the file's; known: in full, all that may be named.
    """
    old = next((name for name in names if names[name] != name), None)
    if old is None:
        return dict(raw)
    away, to = difference(old, names[old])

    def path(one: Any) -> Any:
        if not isinstance(one, str):
            return one
        sign, name = one[: one.startswith("^")], one.removeprefix("^")
        options = (moved(name, start, to) for start in endings(away))
        return sign + next((found for found in (name, *options) if found is not None and found in known), name)

    def paths(value: Any) -> Any:
        if isinstance(value, dict):
            return {path(one): number for one, number in value.items()}
        return [path(one) for one in value] if isinstance(value, list) else value

    return {key: paths(value) if key in BY_MODULE else value for key, value in raw.items()}
