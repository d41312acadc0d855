"""An adapter's modules in a base's files: by the same names, or by names that differ in one prefix alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..adapters.contents import CONVERT, Contents
from ..adapters.prefix import change_of_prefix, moved
from ..adapters.targets import Known, candidates, excluded_in_vain, mistargeted
from ..files.messages import nearest, shown
from .any_base import AnyBase
from .renamed import in_files, in_memory

TRUNKS = ("transformer", "model", "bert", "roberta", "distilbert", "electra", "albert", "deberta", "gpt_neox")
APART = "shared"  # T5's and BART's table, which no stack looks up in by this name


def base_names(base: AnyBase, adapter: Contents) -> tuple[dict[str, str], list[str]]:
    """The base's name of each module and whole tensor of an adapter, and what is to be said of names that differ.

    A ValueError names one that the base has not.
    """
    modules, names = [*adapter.pairs, *adapter.rows], known_names(base, adapter)
    unknown = [name for name in modules if name not in names]
    remarks, change = [], change_of_prefix(unknown, base.modules) if unknown else None
    if unknown and change is None:
        raise _unknown(base, adapter, unknown[0], "module", base.modules)
    if change is not None:
        names |= {name: str(moved(name, *change)) for name in unknown}
        if not _is_trunk(change, base, adapter):
            remarks.append(
                f"{adapter.path}: {len(unknown)} modules begin with {shown(change[0] or 'nothing')}, where "
                f"{base.folder} has {shown(change[1] or 'nothing')}: {shown(unknown[0])}, "
                f"merged as {shown(names[unknown[0]])}; {CONVERT}"
            )
    if len({names[name] for name in adapter.pairs}) < len(adapter.pairs):
        raise ValueError(f"{adapter.path}: a module is there twice, under names that differ in a prefix")
    for name in adapter.whole:
        if name not in names:
            other = name if change is None else moved(name, *change)
            if other not in base.tensors:
                raise _unknown(base, adapter, name, "tensor", base.tensors)
            names[name] = str(other)
    for name in modules:
        if name in adapter.pairs and name.rpartition(".")[2] == APART:
            raise ValueError(
                f"{adapter.path}: {shown(name)}: an update of this table is not supported: encoder and decoder look up "
                "in modules of their own, embed_tokens, so PEFT's update does nothing until it is merged"
            )
    return names, remarks


def proper_names(base: AnyBase, adapter: Contents) -> dict[str, str]:
    """The name in memory of each module and whole tensor of an adapter, by which PEFT finds it."""
    names, remarks = base_names(base, adapter)
    known = known_names(base, adapter)
    mended = {name: in_memory(found, base.model_type) for name, found in names.items() if name not in known}
    return dict(zip(names, names, strict=True)) | (mended if remarks else {})


def remarks_on(base: AnyBase, adapter: Contents, names: Mapping[str, str]) -> list[str]:
    """Where an adapter's configuration and tensors disagree on this base; names: as `base_names` gives them."""
    matrices = {
        key.removesuffix(".weight")
        for key, stored in base.tensors.items()
        if key.endswith(".weight") and len(stored.shape) == 2
    }
    heads = {key.rpartition(".")[0] for key in base.tied.copies}
    adapted = {names[name] for name in adapter.pairs}
    known = Known(names, base.modules | heads, candidates(adapted, matrices))
    return mistargeted(adapter, known) + excluded_in_vain(adapter, known)


def base_keys(base: AnyBase, adapter: Contents) -> dict[str, str]:
    """The key of the base's tensor that each module of an adapter changes; a tied head's is the token table's."""
    names, _ = base_names(base, adapter)
    keys = {name: f"{found}.weight" for name, found in names.items()}
    return {name: key if key in base.tensors else str(base.tied.table) for name, key in keys.items()}


def known_names(base: AnyBase, adapter: Contents) -> dict[str, str]:
    """What the base has under these very names, or under transformers' own for its files."""
    copies = base.tied.copies
    names: dict[str, str] = {}
    for name in (*adapter.pairs, *adapter.rows, *adapter.whole):
        for one in (name, *in_files(name, base.model_type)):
            is_there = one in base.tensors or one in copies or one in base.brought
            if is_there if name in adapter.whole else one in base.modules or f"{one}.weight" in copies:
                names.setdefault(name, one)
    return names


def _unknown(base: AnyBase, adapter: Contents, name: str, what: str, known: Collection[str]) -> ValueError:
    return ValueError(
        f"{adapter.path}: {shown(name)}: expected a {what} of {base.folder}, which has none of this "
        f"name{nearest(name, known)}"
    )


def _is_trunk(change: tuple[str, str], base: AnyBase, adapter: Contents) -> bool:
    """Whether the prefixes differ as a model and the same with a head do in transformers."""
    classes = base.raw.get("architectures")
    of_base = str(classes[0]) if isinstance(classes, list) and classes else "Model"
    mapping = adapter.raw.get("auto_mapping")
    of_adapter = str(mapping.get("base_model_class", "")) if isinstance(mapping, dict) else ""
    if change[1] == "":  # GPT-2's files have no trunk's name, whatever their class
        is_left_out = change[0] in TRUNKS and change[0] not in base.modules
        return is_left_out or (of_base.endswith("Model") and not of_base.endswith("LMHeadModel"))
    return change[0] == "" and (
        adapter.raw.get("task_type") == "FEATURE_EXTRACTION"
        or (of_adapter.endswith("Model") and "LMHead" not in of_adapter)
    )
