"""Qwen 3 (Yang et al. 2025): a norm of each head's query and key in the place of Qwen 2's biases."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..family import classes
from .llama import LLAMA
from .qwen2 import QWEN2, qwen


def _more(raw: Mapping[str, Any], said: Mapping[str, Any], where: str) -> dict[str, Any]:
    return qwen({"head_dim": 128, **raw}, said, where)


QWEN3 = replace(
    QWEN2,
    name="qwen3",
    classes=classes("Qwen3", ForCausalLM="lm"),
    fixed={**LLAMA.fixed, "qk_norm": True},
    neutral={**QWEN2.neutral, "attention_bias": (False,)},
    more=_more,
    modules={
        **QWEN2.modules,
        "layers.{i}.attn.q_norm": "layers.{i}.self_attn.q_norm",
        "layers.{i}.attn.k_norm": "layers.{i}.self_attn.k_norm",
    },
    gguf="qwen3",
)
