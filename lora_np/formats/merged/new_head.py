"""A head that the base lacks, which an adapter has whole: its tensors' names, and what config.json says of it.

Source: transformers 5, the classes named below. Any other tensor that the base lacks is a mistake.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..adapters.contents import Contents
from ..adapters.peft_config import CONFIG
from ..adapters.prefix import change_of_prefix, moved
from ..adapters.task import TASK, load_task
from ..files.messages import shown
from .any_base import AnyBase
from .matching import known_names


class Kind(NamedTuple):
    """A task's head: the end of its class's name, its name in task.json, and the modules that may give its logits."""

    end: str
    task: str | None
    outputs: tuple[str, ...]


KINDS = {
    "SEQ_CLS": Kind(
        "ForSequenceClassification",
        "classify",
        ("score", "classifier", "classifier.out_proj", "classification_head.out_proj", "logits_proj"),
    ),
    "TOKEN_CLS": Kind("ForTokenClassification", "tag", ("classifier", "score")),
    "QUESTION_ANS": Kind("ForQuestionAnswering", None, ("qa_outputs",)),
}
# What stands before the logits: in the head, or in the trunk behind its name.
BEFORE = (
    "classifier.dense", "classification_head.dense", "pooler.dense", "pre_classifier", "sequence_summary.summary",
    "head.dense", "head.norm",
)  # fmt: skip
POOLERS = ("pooler", "pooler.dense")
# Of these types, what a classifier of texts has beside its output, and a base for words may lack.
NEEDED = {
    "deberta": "pooler.dense", "deberta-v2": "pooler.dense", "distilbert": "pre_classifier", "albert": "albert.pooler",
    "bert": "bert.pooler.dense", "ernie": "ernie.pooler.dense", "megatron-bert": "bert.pooler.dense",
    "rembert": "rembert.pooler.dense", "modernbert": "head.dense",
}  # fmt: skip
# The heads of pre-training, by their first names.
PRETRAINED = (
    "lm_head", "embed_out", "cls", "predictions", "vocab_projector", "vocab_transform", "vocab_layer_norm",
    "generator_predictions", "generator_lm_head", "discriminator_predictions", "lm_predictions", "mask_predictions",
    "lm_loss", "proj_out", "output_projection", "final_logits_bias", "decoder.weight", "decoder.bias",
)  # fmt: skip
CLASS_ENDS = r"(For[A-Z]\w*|LMHeadModel|Model)$"
CLASS_STEMS = {"gemma3_text": "Gemma3Text"}  # where a language model's name has another stem


def with_new_head(base: AnyBase, adapters: Sequence[Contents]) -> AnyBase:
    """The base as a model of the task whose head an adapter brings; itself where none does.

    It has no head of pre-training, its trunk has the name that it has in that model, and config.json names the class
    and the labels. A ValueError says which part of the head nobody has, or that it cannot be known what model it is.
    """
    for adapter in adapters:
        names = _brought(base, adapter)
        if names:
            return _with_head(base, adapter, names)
    return base


def _brought(base: AnyBase, adapter: Contents) -> list[str]:
    """The tensors of a head that it has whole, and the base does not, or for another number of labels."""
    known = known_names(base, adapter)
    return [
        name for name in adapter.whole if _is_part(name) and (name not in known or _is_resized(name, base, adapter))
    ]


def _is_part(name: str) -> bool:
    module = name.rpartition(".")[0]
    return module in BEFORE or module.partition(".")[2] in POOLERS or _is_output(module)


def _is_output(module: str) -> bool:
    return any(module in kind.outputs for kind in KINDS.values())


def _is_resized(name: str, base: AnyBase, adapter: Contents) -> bool:
    if name not in base.tensors or not _is_output(name.rpartition(".")[0]):
        return False
    shape, given = base.tensors[name].shape, adapter.whole[name].shape
    return shape != given and shape[1:] == given[1:]


def _with_head(base: AnyBase, adapter: Contents, names: Sequence[str]) -> AnyBase:
    kind = _kind(adapter)
    output = next((name for name in names if name in {f"{module}.weight" for module in kind.outputs}), None)
    tensors = {key: stored for key, stored in base.tensors.items() if not _is_pretrained(key) and key not in names}
    tensors = _renamed(base, adapter, tensors)
    needed = NEEDED.get(base.model_type) if kind.task == "classify" else None
    if output is None:
        what = f"the weight of {' or '.join(kind.outputs)}"
    elif needed is not None and not any(f"{needed}.weight" in found for found in (tensors, adapter.whole)):
        what = f"{needed}.weight too, which {kind.end} has, and without which it would start at random"
    else:
        raw = {**base.raw, **_described(base.raw, adapter, kind, output)}
        return replace(base, raw=raw, tensors=tensors, brought=frozenset(names))
    raise ValueError(
        f"{adapter.path}: {shown(names[0])}: a part of a head that {base.folder} has not: expected {what}; "
        "name it in modules_to_save"
    )


def _kind(adapter: Contents) -> Kind:
    """By task_type, or by the class that PEFT names where there is none."""
    task, mapping = adapter.raw.get("task_type"), adapter.raw.get("auto_mapping")
    trained = str(mapping.get("base_model_class")) if isinstance(mapping, dict) else ""
    if isinstance(task, str) and task in KINDS:
        return KINDS[task]
    found = next((kind for kind in KINDS.values() if trained.endswith(kind.end)), None)
    if found is None or task is not None:
        raise ValueError(
            f"{adapter.path / CONFIG}: task_type: the adapter has a head that the base lacks: expected one of "
            f"{' '.join(KINDS)}, got {task!r:.60}"
        )
    return found


def _is_pretrained(key: str) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in PRETRAINED)


def _renamed(base: AnyBase, adapter: Contents, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The base's tensors by the names that they have in the adapter's model: its trunk may have another."""
    known = known_names(base, adapter)
    unknown = [name for name in (*adapter.pairs, *adapter.rows) if name not in known]
    change = change_of_prefix(unknown, base.modules) if unknown else None
    if change is None or not change[0] or any(key.startswith(f"{change[0]}.") for key in tensors):
        return dict(tensors)
    if change[1] or "." in change[0] or adapter.raw.get("target_parameters"):
        raise ValueError(  # transformers fits a trunk without a name into one that has a name, and no other
            f"{adapter.path}: {shown(unknown[0])}: trained with a head of its own on modules that begin with "
            f"{shown(change[0])}, where {base.folder} has {shown(change[1] or 'nothing')}: transformers loads no such "
            "trunk, so not supported; expected a base saved with that head's class"
        )
    return {moved(key, *reversed(change)) or key: stored for key, stored in tensors.items()}


def _described(raw: Mapping[str, Any], adapter: Contents, kind: Kind, output: str) -> dict[str, Any]:
    """What config.json says of the head: the class, and the names of the labels."""
    shape, width = adapter.whole[output].shape, raw.get("hidden_size")
    if len(shape) != 2 or (type(width) is int and shape[1] != width):
        raise ValueError(f"{adapter.path}: {shown(output)}: expected shape (labels, {width or 'D'}), got {shape}")
    said: dict[str, Any] = {}
    classes = raw.get("architectures")
    if isinstance(classes, list) and classes:
        stem = CLASS_STEMS.get(str(raw.get("model_type")), re.sub(CLASS_ENDS, "", str(classes[0])))
        said["architectures"] = [f"{stem}{kind.end}"]
    labels = _labels(adapter.path, kind, shape[0])
    names = raw.get("id2label")
    if labels is None and not (isinstance(names, dict) and len(names) == shape[0]):
        labels = [f"LABEL_{i}" for i in range(shape[0])]
    if labels is not None:
        said["id2label"] = {str(i): label for i, label in enumerate(labels)}
        said["label2id"] = {label: i for i, label in enumerate(labels)}
    return said | ({"num_labels": shape[0]} if "num_labels" in raw else {})


def _labels(path: Path, kind: Kind, n: int) -> Sequence[str] | None:
    """The names in the adapter's task.json; None if there is none."""
    task = load_task(path)
    if task is not None and (task.name != kind.task or len(task.labels) != n):
        raise ValueError(
            f"{path / TASK}: expected task {kind.task} with {n} labels, as the weights are, got {task.name} with "
            f"{len(task.labels)}"
        )
    return None if task is None else task.labels
