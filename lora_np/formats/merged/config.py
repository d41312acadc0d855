"""config.json of a merged model that can be run: the base's, made to say its head, its labels, its untied tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...model import Config
from ..models.families import MODEL_TYPES


def merged_config(
    raw: Mapping[str, Any], saved: Config, config: Config, labels: Sequence[str] | None
) -> dict[str, Any]:
    """A Hugging Face config.json `raw`, which says `saved`, made to say `config`: its head, labels, untied tables."""
    result = dict(raw)
    if saved.head != config.head:
        heads = MODEL_TYPES[raw["model_type"]][0].classes
        result["architectures"] = [next(name for name, head in heads.items() if head == config.head)]
    if labels is None and config.n_labels is not None and config.n_labels != saved.n_labels:
        labels = [f"LABEL_{i}" for i in range(config.n_labels)]
    if labels is not None:
        result["id2label"] = {str(i): label for i, label in enumerate(labels)}
        result["label2id"] = {label: i for i, label in enumerate(labels)}
        result |= {"num_labels": len(labels)} if "num_labels" in raw else {}
    if saved.head == "lm" == config.head and saved.tie_head and not config.tie_head:
        result |= untied(raw)
    return result


def untied(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of a head that is tied no more; T5's is then read as unscaled, unless it says otherwise."""
    said: dict[str, Any] = {"tie_word_embeddings": False}
    if raw.get("model_type") == "t5":
        said["scale_decoder_outputs"] = raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings", True))
    return said
