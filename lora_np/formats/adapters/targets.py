"""What PEFT's configuration targets, beside the tensors of its file, and the modules of a base.

PEFT adapts the modules that the configuration names, then looks for their tensors: what the file has besides is left
out, and what it lacks keeps its start, in both cases with a warning at most.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import Any, NamedTuple

from ..files.expressions import Expression
from ..files.messages import shown
from .contents import Contents
from .peft import CONFIG
from .peft_config import ALL_LINEAR, AUTO_SAVED, MODULES, Fits, Selection, expressions_in

CANDIDATES = 5000  # names that are compared letter by letter, for a message
LISTS = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "layers_pattern")


class Known(NamedTuple):
    """What a base has.

    names     its name of each module of the adapter
    modules   all its modules
    matrices  those whose weight is a matrix
    """

    names: Mapping[str, str]
    modules: Collection[str]
    matrices: Collection[str]


def nearest(name: str, known: Collection[str]) -> str:
    """What to say of a name that is not known: the names most like it."""
    some = list(islice(known, CANDIDATES))
    close = get_close_matches(name[-200:], some, n=3, cutoff=0.6)
    return f"; nearest are {' '.join(map(shown, close))}" if close else ""


def mistargeted(adapter: Contents, known: Known | None = None) -> list[str]:
    """Where configuration and tensors disagree, in a line each; known: the base, if there is one.

    A ValueError if the configuration's names are of another type than PEFT's.
    """
    raw, where = adapter.raw, str(adapter.path / CONFIG)
    if "peft_type" not in raw:  # mlx-lm's, which has no targets
        return []
    lists = {key: _names(raw, key, where) for key in LISTS}
    adapted = list(adapter.pairs)
    aliases = {name: {name, known.names.get(name, name) if known else name} for name in adapted}
    others = sorted(_candidates(adapter, known)) if known else []
    every = sorted({*others, *(alias for both in aliases.values() for alias in both)})
    fits = expressions_in(raw, MODULES, every, where)
    selection = _selection(raw, lists, fits)

    def takes(name: str) -> bool:
        return not _is_saved(name, lists["modules_to_save"]) and (selection is None or selection.takes(name))

    lines = []
    unused = [
        name
        for name, both in aliases.items()
        if not any(map(takes, both)) and not _by_parameter(name, lists) and not _is_tied(name, raw)
    ]
    if unused:
        lines.append(
            f"target_modules: {len(unused)} modules of the file are not targeted, and PEFT would leave them out: "
            f"{shown(unused[0])}"
        )
    missing = [name for name in others if takes(name)] if selection is not None else []
    if missing:
        lines.append(
            f"target_modules: {len(missing)} modules are targeted of which the file has no tensor, so that PEFT would "
            f"leave them at their start: {shown(missing[0])}"
        )
    return lines + _fitting_nothing(adapter, lists, known)


def _names(raw: Mapping[str, Any], key: str, where: str) -> list[str]:
    """A list of names; none where an expression stands in its place."""
    value = raw.get(key)
    if value is None or (isinstance(value, str) and key in MODULES):
        return []
    value = [value] if isinstance(value, str) and key == "layers_pattern" else value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{where}: {key}: expected a list of names, got {value!r:.60}")
    return value


def _selection(raw: Mapping[str, Any], lists: Mapping[str, list[str]], fits: Fits) -> Selection | None:
    """What is targeted; None where that is all that is linear, which names do not tell."""
    targets, excluded = raw.get("target_modules"), raw.get("exclude_modules")
    out = fits[Expression(MODULES[1], excluded)] if isinstance(excluded, str) else lists["exclude_modules"]
    if isinstance(targets, str):
        every = targets.lower() == ALL_LINEAR
        return None if every else Selection(fits[Expression(MODULES[0], targets)], exclude_modules=set(out))
    layers = raw.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    return Selection(set(lists["target_modules"]), layers and set(layers), lists["layers_pattern"], set(out))


def _is_saved(name: str, saved: Collection[str]) -> bool:
    """Whether a module is trained whole, or stands in one that is: PEFT never adapts those."""
    return any(f".{one}." in f".{name}." for one in saved)


def _by_parameter(name: str, lists: Mapping[str, list[str]]) -> bool:
    """Whether a parameter of the module is targeted."""
    return any(_has_parameter(name, target) for target in lists["target_parameters"])


def _has_parameter(module: str, target: str) -> bool:
    """Whether a module may have a parameter of this name: of one part alone, any may."""
    parent = target.rpartition(".")[0]
    return f".{module}".endswith(f".{parent}") if parent else True


def _is_tied(name: str, raw: Mapping[str, Any]) -> bool:
    """Whether it may be the other end of a tied table, which PEFT adapts along."""
    return _ties(raw) and not re.search(r"(^|\.)\d+(\.|$)", name)


def _candidates(adapter: Contents, known: Known) -> set[str]:
    """Modules of the base that the adapter could have adapted: matrices in stacks of layers of which it adapts some.

    Another tower's, layers that transformers leaves out of the model, and what has another name in memory than in the
    files (heads, tables) are not among them.
    """
    adapted = set(known.names.values())
    stacks = {_stack(name) for name in adapted}
    by_expert = any(".experts." in name for name in adapted)
    layers = max((_layer(name) for name in adapted), default=0)
    return {
        name
        for name in known.matrices
        if name not in adapted
        and _stack(name) in stacks - {""}
        and _layer(name) <= layers
        and (by_expert or ".experts." not in name)
    }


def _stack(name: str) -> str:
    """What stands before the first number in a name."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[0] if re.search(r"\.\d+\.", name) else ""


def _layer(name: str) -> int:
    found = re.search(r"\.(\d{1,9})\.", name)
    return int(found[1]) if found else 0


def _fitting_nothing(adapter: Contents, lists: Mapping[str, list[str]], known: Known | None) -> list[str]:
    """The names in the configuration's lists that nothing has, in the file and in the base."""
    here = {*adapter.pairs, *adapter.rows}
    whole = {name[:i] for name in adapter.whole for i, c in enumerate(name) if c == "."}
    task = adapter.raw.get("task_type")
    added = AUTO_SAVED.get(task, ()) if isinstance(task, str) else ()
    base = set(known.modules) | set(known.names.values()) if known else set()
    lines = []
    for key, modules, what in (
        ("target_modules", here | base, "module"),
        ("exclude_modules", base, "module"),
        ("modules_to_save", whole, "tensor of the file"),
        ("target_parameters", here, "parameter of the file"),
    ):
        if (key == "exclude_modules" and known is None) or (key == "modules_to_save" and _ties(adapter.raw)):
            continue
        for name in lists[key]:
            if name in added or (key == "target_modules" and _ends_in_one(name, lists["exclude_modules"])):
                continue
            if key == "modules_to_save":
                fits = any(module.endswith(name) for module in modules)  # as PEFT has it, without a dot
            elif key == "target_parameters":
                fits = any(_has_parameter(module, name) for module in modules)
            else:
                fits = any(f".{module}".endswith(f".{name}") for module in modules)
            if not fits:
                lines.append(f"{key}: {name!r:.60}: no {what} fits{nearest(name, {*modules, *_ends(modules)})}")
    return lines


def _ties(raw: Mapping[str, Any]) -> bool:
    return raw.get("ensure_weight_tying") is True


def _ends_in_one(name: str, others: Collection[str]) -> bool:
    return any(f".{name}".endswith(f".{one}") for one in others)


def _ends(modules: Collection[str]) -> set[str]:
    """The last parts of names, as target lists have them."""
    return {module.rpartition(".")[2] for module in modules}
