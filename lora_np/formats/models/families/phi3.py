"""Phi-3 (Abdin et al. 2024) and Phi-4: Llama, with q, k and v in one matrix, and gate and up in one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..attention import rotary, windows
from ..family import NEUTRAL, Key, classes
from .llama import LLAMA


def _more(raw: Mapping[str, Any], said: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {**rotary(raw, said, where, partial=True), **windows(raw, said, where)}


PHI3 = replace(
    LLAMA,
    name="phi3",
    classes=classes("Phi3", ForCausalLM="lm"),
    keys={
        **LLAMA.keys,
        "max_position_embeddings": Key("n_positions", int, 4096),
        "rms_norm_eps": Key("eps", float, 1e-5),
    },
    neutral={**NEUTRAL, "attention_bias": (False,)},
    more=_more,
    says=("rope_theta", "rope_factors", "rope_width", "window", "full_layers"),
    modules={
        "embed.tokens": "embed_tokens",
        "layers.{i}.norm1": "layers.{i}.input_layernorm",
        "layers.{i}.attn.qkv": "layers.{i}.self_attn.qkv_proj",
        "layers.{i}.attn.o": "layers.{i}.self_attn.o_proj",
        "layers.{i}.norm2": "layers.{i}.post_attention_layernorm",
        "layers.{i}.mlp.gate_up": "layers.{i}.mlp.gate_up_proj",
        "layers.{i}.mlp.down": "layers.{i}.mlp.down_proj",
        "norm": "norm",
    },
    gguf="phi3",
)
