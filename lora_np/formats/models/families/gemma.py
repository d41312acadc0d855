"""Gemma (Mesnard et al. 2024): Llama with 1 + w in its norms, a GELU, and its embedding times sqrt(D)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..family import Key, classes
from .llama import LLAMA


def _more(raw: Mapping[str, Any], said: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {**LLAMA.more({"head_dim": 256, **raw}, said, where), "embed_scale": said["d_model"] ** 0.5}


# config.json's hidden_act says "gelu" in the first files, and means the approximation, as hidden_activation does.
GEMMA = replace(
    LLAMA,
    name="gemma",
    classes=classes("Gemma", ForCausalLM="lm"),
    keys={
        **LLAMA.keys,
        "max_position_embeddings": Key("n_positions", int, 8192),
        "num_key_value_heads": Key("n_kv_head", int, 16),
        "hidden_act": Key("activation", str, "gelu_pytorch_tanh"),
        "tie_word_embeddings": Key("tie_head", bool, True),
    },
    activations={"gelu_pytorch_tanh": "gelu_tanh_gated", "gelu": "gelu_tanh_gated"},
    fixed={**LLAMA.fixed, "norm": "rms_1p"},
    neutral={
        **LLAMA.neutral, "hidden_activation": (None, "gelu_pytorch_tanh"), "use_bidirectional_attention": (None, False),
    },
    more=_more,
    says=(*LLAMA.says, "embed_scale"),
    gguf="gemma",
)  # fmt: skip
