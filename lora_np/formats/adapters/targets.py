"""What PEFT's configuration targets, beside the tensors of its file, and the modules of a base.

PEFT adapts the modules that the configuration names, then looks for their tensors: what the file has besides is left
out, and what it lacks keeps its start, in both cases with a warning at most.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ..files.expressions import Expression
from ..files.messages import nearest, shown
from .contents import Contents
from .peft_config import ALL_LINEAR, AUTO_SAVED, CONFIG, MODULES, Fits, Selection, endings, ends_in, expressions_in

SHOWN = 5  # lines of one kind
LISTS = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "layers_pattern")


class Known(NamedTuple):
    """What a base has.

    names       its name of each module of the adapter, and of each tensor that is trained whole
    modules     all its modules
    candidates  those that could be adapted, and are not
    linears     what "all-linear" is; None: names do not tell
    """

    names: Mapping[str, str]
    modules: Collection[str]
    candidates: Collection[str]
    linears: Collection[str] | None = None


def mistargeted(adapter: Contents, known: Known | None = None) -> list[str]:
    """Where configuration and tensors disagree, in a line each; known: the base, if there is one.

    A ValueError if the configuration's names are of another type than PEFT's.
    """
    raw, where = adapter.raw, str(adapter.path / CONFIG)
    if "peft_type" not in raw:  # mlx-lm's, which has no targets
        return []
    lists = {key: names_in(raw, key, where) for key in LISTS}
    adapted = list(adapter.pairs)
    aliases = {name: {name, known.names.get(name, name) if known else name} for name in adapted}
    others = sorted(known.candidates) if known else []
    every = sorted({*others, *(alias for both in aliases.values() for alias in both)})
    fits = expressions_in(raw, MODULES, every, where)
    linears = known.linears if known else None
    selection, saved = _selection(raw, lists, fits, linears, where), [f".{one}." for one in lists["modules_to_save"]]

    def takes(name: str) -> bool:
        return not _is_saved(name, saved) and (selection is None or selection.takes(name))

    lines = _fitting_nothing(adapter, lists, known)
    owners = _owners(lists["target_parameters"])
    unused = [
        name
        for name, both in aliases.items()
        if not any(map(takes, both)) and not (owners is None or ends_in(name, owners)) and not _is_tied(name, raw)
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
    return lines


def excluded_in_vain(adapter: Contents, known: Known) -> list[str]:
    """The names in exclude_modules that no module of a base has, in a line each."""
    names = names_in(adapter.raw, "exclude_modules", str(adapter.path / CONFIG))
    modules = {*known.modules, *(known.names[name] for name in adapter.pairs)}
    return _unfit("exclude_modules", {name: name for name in names}, modules)


def names_in(raw: Mapping[str, Any], key: str, where: str) -> list[str]:
    """A list of names; none where an expression stands in its place."""
    value = raw.get(key)
    if value is None or (isinstance(value, str) and key in MODULES):
        return []
    value = [value] if isinstance(value, str) and key == "layers_pattern" else value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{where}: {key}: expected a list of names, got {value!r:.60}")
    return value


def _selection(
    raw: Mapping[str, Any], lists: Mapping[str, list[str]], fits: Fits, linears: Collection[str] | None, where: str
) -> Selection | None:
    """What is targeted; None where that is all that is linear, and it is not known what is."""
    targets, excluded, layers = raw.get("target_modules"), raw.get("exclude_modules"), _layers(raw, where)
    out = set(fits[Expression(MODULES[1], excluded)] if isinstance(excluded, str) else lists["exclude_modules"])
    if not isinstance(targets, str):
        return Selection(set(lists["target_modules"]), layers, lists["layers_pattern"], out)
    if layers is not None or raw.get("layers_pattern") is not None:
        raise ValueError(f"{where}: target_modules: a regular expression and layers_to_transform or layers_pattern")
    taken = linears if targets.lower() == ALL_LINEAR else fits[Expression(MODULES[0], targets)]
    return None if taken is None else Selection(taken, exclude_modules=out)


def _layers(raw: Mapping[str, Any], where: str) -> set[int] | None:
    value = raw.get("layers_to_transform")
    layers = [value] if isinstance(value, int) else value
    if layers is not None and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
        raise ValueError(f"{where}: layers_to_transform: expected a list of integers, got {value!r:.60}")
    return None if layers is None else set(layers)


def _is_saved(name: str, saved: Collection[str]) -> bool:
    """Whether a module is one of these, between dots, or stands in one: PEFT never adapts what is trained whole."""
    dotted = f".{name}."
    return any(one in dotted for one in saved)


def _owners(parameters: Collection[str]) -> set[str] | None:
    """What the modules end in whose parameters are targeted; None where one is named alone: any may have it."""
    owners = {parameter.rpartition(".")[0] for parameter in parameters}
    return None if "" in owners else owners


def _is_tied(name: str, raw: Mapping[str, Any]) -> bool:
    """Whether it may be the other end of a tied table, which PEFT adapts along."""
    return _ties(raw) and not re.search(r"(^|\.)\d+(\.|$)", name)


def candidates(adapted: Collection[str], matrices: Collection[str]) -> set[str]:
    """Which of a base's matrices an adapter could have adapted, by those that it has: in the same stacks of layers.

    Another tower's, layers that transformers leaves out of the model, and what has another name in memory than in the
    files (heads, tables) are not among them.
    """
    adapted = set(adapted)
    stacks = {_stack(name) for name in adapted}
    by_expert = any(".experts." in name for name in adapted)
    layers = max((_layer(name) for name in adapted), default=0)
    return {
        name
        for name in matrices
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
    raw, here = adapter.raw, {*adapter.pairs, *adapter.rows}
    base = {*known.modules, *(known.names[name] for name in adapter.pairs)} if known else set()
    added = AUTO_SAVED.get(str(raw.get("task_type")), ())
    excluded = set(lists["exclude_modules"])
    targets = {name: name for name in lists["target_modules"] if not ends_in(name, excluded)}
    lines = _unfit("target_modules", targets, here | base)
    owners = {name: name.rpartition(".")[0] for name in lists["target_parameters"]}
    lines += _unfit("target_parameters", {name: owner for name, owner in owners.items() if owner}, here)
    if not _ties(raw):  # which saves the table in the head's place
        both = {*adapter.whole, *(known.names[name] for name in adapter.whole)} if known else set(adapter.whole)
        whole = {name[:i] for name in both for i, c in enumerate(name) if c == "."}
        backwards = sorted(name[::-1] for name in whole)
        absent = [name for name in lists["modules_to_save"] if name not in added and not _ends_one(name, backwards)]
        lines += [  # PEFT asks for no dot before a name
            f"modules_to_save: {name!r:.60}: the file has no tensor of it{nearest(name, whole)}"
            for name in absent[:SHOWN]
        ]
    return lines


def _ends_one(name: str, backwards: Sequence[str]) -> bool:
    """Whether one of these names, which are sorted and read backwards, ends in a name."""
    at = bisect_left(backwards, name[::-1])
    return at < len(backwards) and backwards[at].startswith(name[::-1])


def _unfit(key: str, names: Mapping[str, str], modules: Collection[str]) -> list[str]:
    """What is to be said of the names that no module ends in; names: how each does."""
    wanted = set(names.values())
    found = {ending for module in modules for ending in endings(module) if ending in wanted}
    unfit = [name for name, ending in names.items() if ending not in found]
    ends = {module.rpartition(".")[2] for module in modules} if unfit else set()
    return [f"{key}: {name!r:.60}: no module fits{nearest(name, {*ends, *modules})}" for name in unfit[:SHOWN]]


def _ties(raw: Mapping[str, Any]) -> bool:
    return raw.get("ensure_weight_tying") is True
