"""The merge of a base's folder and adapters, planned without the base's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...adapter import check_weights
from ..adapters.contents import Contents
from ..adapters.peft import records_base
from ..files.rounding import NAMES
from ..models.folder import MODEL_TYPE, can_run
from ..models.huggingface import Place, is_no_weight
from ..models.shards import Stored
from .any_adapter import read_for
from .any_base import AnyBase, open_any_base
from .by_model import plan_by_model
from .by_name import Changed, changes_of
from .new_head import with_new_head
from .target import Plan, Target


def plan_merge(base_path: Path, adapter_paths: Sequence[Path], weights: Sequence[float]) -> Plan:
    """Reads adapters, without the base's weights, and says what each tensor of the merged model is.

    What PEFT wrote is merged by its modules' names, whatever the architecture, and llama.cpp's files onto what is not
    run; what tells our own names, onto a model that can be run. A ValueError or FileNotFoundError, in one line, says
    what does not fit.
    """
    check_weights(adapter_paths, weights)
    by_name = _by_name(base_path, adapter_paths)
    return _plan_by_name(*by_name, weights) if by_name else plan_by_model(base_path, adapter_paths, weights)


def _by_name(path: Path, adapter_paths: Sequence[Path]) -> tuple[AnyBase, list[Contents]] | None:
    """The base and the adapters, where all are to be merged by name."""
    if path.suffix.lower() == ".gguf" or not all(_is_named(one, path) for one in adapter_paths):
        return None
    base = open_any_base(path)
    if base.model_type == MODEL_TYPE:
        return None
    adapters = [read_for(base, one) for one in adapter_paths]
    return base, adapters


def _is_named(adapter: Path, base: Path) -> bool:
    """Whether an adapter goes by modules' names: PEFT's folders, and other files where no model is run."""
    return not records_base(adapter) if adapter.is_dir() else not can_run(base)


def _plan_by_name(base: AnyBase, adapters: Sequence[Contents], weights: Sequence[float]) -> Plan:
    raw, base = base.raw, with_new_head(base, adapters)
    changes = changes_of(base, adapters, weights)
    headers = {stored.path: stored.file.header for stored in base.tensors.values()}
    files: dict[Path, list[Target]] = {path: [] for path in headers}
    for key, stored in base.tensors.items():
        files[stored.path].append(_target(key, stored, changes.tensors.get(key), base.model_type))
    for key, start in changes.added.items():
        source = base.tensors[start]
        files[source.path].append(_target(key, source, changes.tensors[key], base.model_type))
    return Plan(base.folder, raw, None, changes.config(base.raw), headers, files, changes.remarks)


def _target(key: str, source: Stored, changed: Changed | None, model_type: str) -> Target:
    if changed is None or not changed.changes:
        is_weight = source.dtype in NAMES and not is_no_weight(key, model_type)
        place = Place(source.shape, False, {key: slice(None)}) if is_weight else None
        return Target(key, source.shape, source.dtype, source, place, {})
    is_whole = all(change.whole is not None for change in changed.changes.values())
    return Target(key, changed.place.shape, source.dtype, None if is_whole else source, changed.place, changed.changes)
