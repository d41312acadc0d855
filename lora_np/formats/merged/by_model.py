"""Adapters on a base whose model can be run: our own files, loralib's, and heads that the base lacks.

Weights go by our own names, and a family says where they stand in the base's files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...adapter import Change, merge_plan
from ...model import Config
from ..adapters.adapter import load_adapter
from ..adapters.head import label_names
from ..files.safetensors_file import Header
from ..models.heads import taken
from ..models.huggingface import Place
from ..models.names import family_of
from ..models.shards import Stored
from .base import Opened, check_complete, open_base
from .config import merged_config
from .target import Plan, Target


def plan_by_model(base_path: Path, adapter_paths: Sequence[Path], weights: Sequence[float]) -> Plan:
    """The merge of adapters with a base that `open_base` opens, with its errors and `load_adapter`'s."""
    base = open_base(base_path, adapter_paths)
    adapters = [load_adapter(path, base) for path in adapter_paths]
    check_complete(base, adapters)
    config, changes = merge_plan(base.config, adapters, weights)
    headers = {stored.path: stored.file.header for stored in base.files.tensors.values()}
    labels = next((found for path in adapter_paths if (found := label_names(path, config)) is not None), None)
    about = None if base.is_own else merged_config(base.raw, base.files.saved, config, labels)
    return Plan(base.folder, base.raw, config, about, headers, _targets(base, config, changes, headers))


def _targets(
    base: Opened, config: Config, changes: Mapping[str, Change], headers: Mapping[Path, Header]
) -> dict[Path, list[Target]]:
    """The merged tensors, in the order of the base's files, and behind them those that the base lacks."""
    tensors, saved = base.files.tensors, base.files.saved
    table = next(tensors[key] for key, place in base.files.own.items() if "embed.tokens" in place.parts)
    wanted = base.places(config, in_trunk=base.files.in_trunk)
    added = [key for key in wanted if key not in tensors]
    prefix = _prefix(base, config) if added else ""
    heads = tuple(f"{module}." for module in family_of(config).heads.get(config.head, {}).values())
    other_head = (saved.head, saved.n_labels) != (config.head, config.n_labels)
    usable = set(taken(saved, config))

    def target(key: str, source: Stored | None) -> Target:
        name = key if key.startswith(heads) else prefix + key
        if key not in wanted:
            assert source is not None
            return Target(name, source.shape, source.dtype, source, None, {})
        place, dtype = wanted[key], (source or table).dtype
        made = {part: changes[part] for part in place.parts if part in changes and _makes(changes[part])}
        all_whole = all(part in made and made[part].whole is not None for part in place.parts)
        return Target(name, place.shape, dtype, None if all_whole else source, place, made)

    files: dict[Path, list[Target]] = {}
    for path, header in headers.items():
        keys = [key for key in header.tensors if key in wanted or not other_head]  # another head's have no place here
        files[path] = [target(key, tensors[key] if _has(wanted.get(key), usable) else None) for key in keys]
    # What is added is an adapter's own, or a head that is tied no more: it starts as the token table.
    files[path] += [target(key, table if "head.weight" in wanted[key].parts else None) for key in added]
    return files


def _has(place: Place | None, usable: set[str]) -> bool:
    """Whether the base's tensor is of use in this place: not if it is another head's."""
    return place is None or usable.issuperset(place.parts)


def _makes(change: Change) -> bool:
    """Whether a change makes anything of its own: a head that is only untied is a copy."""
    return change.whole is not None or bool(change.updates)


def _prefix(base: Opened, config: Config) -> str:
    """The trunk's name where transformers puts one and the base's files do not, as beside a new head."""
    trunk = family_of(config).trunk
    return f"{trunk}." if trunk and not base.files.in_trunk and config.head != "none" else ""
