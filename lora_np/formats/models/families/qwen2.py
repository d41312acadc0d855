"""Qwen 2 and 2.5 (Yang et al. 2024): Llama, with biases on q, k and v alone, and in some a window from a layer on."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..attention import windows
from ..family import NEUTRAL, Key, classes, value_of
from .llama import LLAMA


def qwen(raw: Mapping[str, Any], said: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What Llama's config.json says, and the layers with a window: all from max_window_layers on, where it is used."""
    first = value_of(raw, "max_window_layers", Key("full_layers", int, 28, least=0), where)
    used = value_of(raw, "use_sliding_window", Key("window", bool, False), where)
    found = windows(raw, said, where, full=range(min(first, said["n_layer"])), default=4096) if used else {}
    return {**LLAMA.more(raw, said, where), **found}


QWEN2 = replace(
    LLAMA,
    name="qwen2",
    classes=classes("Qwen2", ForCausalLM="lm"),
    keys={
        **LLAMA.keys,
        "max_position_embeddings": Key("n_positions", int, 32768),
        "num_key_value_heads": Key("n_kv_head", int, 32),
    },
    fixed={**LLAMA.fixed, "qkv_bias": True},
    neutral=NEUTRAL,
    more=qwen,
    says=(*LLAMA.says, "window", "full_layers"),
    gguf="qwen2",
)
