"""Mistral (Jiang et al. 2023): Llama, with a window in the first of its versions."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..attention import windows
from ..family import Key, classes
from .llama import LLAMA


def _more(raw: Mapping[str, Any], said: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {**LLAMA.more(raw, said, where), **windows(raw, said, where, default=4096)}


MISTRAL = replace(
    LLAMA,
    name="mistral",
    classes=classes("Mistral", ForCausalLM="lm"),
    keys={
        **LLAMA.keys,
        "max_position_embeddings": Key("n_positions", int, 4096 * 32),
        "num_key_value_heads": Key("n_kv_head", int, 8),
    },
    more=_more,
    says=(*LLAMA.says, "window", "full_layers"),
)
