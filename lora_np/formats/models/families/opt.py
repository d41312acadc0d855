"""OPT (Zhang et al. 2022): GPT-2 with a ReLU, its three matrices apart, and positions from row 2 on."""

from collections.abc import Mapping
from typing import Any

from ..family import NEUTRAL, Family, Key, classes


def _more(raw: Mapping[str, Any], said: Mapping[str, Any], where: str) -> dict[str, Any]:
    width = raw.get("word_embed_proj_dim", said["d_model"])
    if width != said["d_model"]:
        raise ValueError(f"{where}: word_embed_proj_dim: {width!r:.60} is not supported, only hidden_size")
    return {}


OPT = Family(
    name="opt",
    classes=classes("OPT", ForCausalLM="lm"),
    keys={
        "vocab_size": Key("vocab_size", int),
        "max_position_embeddings": Key("n_positions", int, 2048, plus=2),
        "num_hidden_layers": Key("n_layer", int),
        "num_attention_heads": Key("n_head", int),
        "hidden_size": Key("d_model", int),
        "ffn_dim": Key("d_ff", int, 3072),
        "activation_function": Key("activation", str, "relu"),
        "tie_word_embeddings": Key("tie_head", bool, True),
    },
    more=_more,
    activations={"relu": "relu", "gelu": "gelu"},
    fixed={"position_offset": 2},
    neutral={
        **NEUTRAL, "do_layer_norm_before": (True,), "_remove_final_layer_norm": (False,), "enable_bias": (True,),
        "layer_norm_elementwise_affine": (True,),
    },
    modules={
        "embed.tokens": "decoder.embed_tokens",
        "embed.positions": "decoder.embed_positions",
        "layers.{i}.norm1": "decoder.layers.{i}.self_attn_layer_norm",
        "layers.{i}.attn.q": "decoder.layers.{i}.self_attn.q_proj",
        "layers.{i}.attn.k": "decoder.layers.{i}.self_attn.k_proj",
        "layers.{i}.attn.v": "decoder.layers.{i}.self_attn.v_proj",
        "layers.{i}.attn.o": "decoder.layers.{i}.self_attn.out_proj",
        "layers.{i}.norm2": "decoder.layers.{i}.final_layer_norm",
        "layers.{i}.mlp.up": "decoder.layers.{i}.fc1",
        "layers.{i}.mlp.down": "decoder.layers.{i}.fc2",
        "norm": "decoder.final_layer_norm",
    },
    trunk="model",
    heads={"lm": {"head": "lm_head"}, "classify": {"head": "score"}},
    left_out=r"(?!)",
)  # fmt: skip
