"""Llama (Touvron et al. 2023)."""

from collections.abc import Mapping
from typing import Any

from ..attention import head_width, rotary
from ..family import NEUTRAL, Family, Key, classes


def _more(raw: Mapping[str, Any], said: Mapping[str, Any], where: str) -> dict[str, Any]:
    width = {"d_head": head_width(raw, said, where)}
    return width | rotary(raw, {**said, **width}, where)


LLAMA = Family(
    name="llama",
    classes=classes("Llama", ForCausalLM="lm"),
    keys={
        "vocab_size": Key("vocab_size", int),
        "max_position_embeddings": Key("n_positions", int, 2048),
        "num_hidden_layers": Key("n_layer", int),
        "num_attention_heads": Key("n_head", int),
        "num_key_value_heads": Key("n_kv_head", int, None),
        "hidden_size": Key("d_model", int),
        "intermediate_size": Key("d_ff", int),
        "rms_norm_eps": Key("eps", float, 1e-6),
        "hidden_act": Key("activation", str, "silu"),
        "tie_word_embeddings": Key("tie_head", bool, False),
    },
    more=_more,
    says=("d_head", "rope_theta", "rope_factors"),
    activations={"silu": "silu_gated"},
    fixed={"norm": "rms", "norm_first": True, "positions": "rotary", "causal": True, "bias": False},
    neutral={**NEUTRAL, "attention_bias": (False,), "mlp_bias": (False,)},
    modules={
        "embed.tokens": "embed_tokens",
        "layers.{i}.norm1": "layers.{i}.input_layernorm",
        "layers.{i}.attn.q": "layers.{i}.self_attn.q_proj",
        "layers.{i}.attn.k": "layers.{i}.self_attn.k_proj",
        "layers.{i}.attn.v": "layers.{i}.self_attn.v_proj",
        "layers.{i}.attn.o": "layers.{i}.self_attn.o_proj",
        "layers.{i}.norm2": "layers.{i}.post_attention_layernorm",
        "layers.{i}.mlp.gate": "layers.{i}.mlp.gate_proj",
        "layers.{i}.mlp.up": "layers.{i}.mlp.up_proj",
        "layers.{i}.mlp.down": "layers.{i}.mlp.down_proj",
        "norm": "norm",
    },
    trunk="model",
    heads={"lm": {"head": "lm_head"}, "classify": {"head": "score"}, "tag": {"head": "score"}},
    left_out=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    gguf="llama",
)
