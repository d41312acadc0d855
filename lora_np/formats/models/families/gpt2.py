"""GPT-2 (Radford et al. 2019)."""

from collections.abc import Mapping
from typing import Any

from ..family import GELU, NEUTRAL, Family, Key, classes


def _more(raw: Mapping[str, Any], said: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {"d_ff": 4 * said["d_model"]} if said["d_ff"] is None else {}


GPT2 = Family(
    name="gpt2",
    classes=classes("GPT2", LMHeadModel="lm"),
    keys={
        "vocab_size": Key("vocab_size", int),
        "n_positions": Key("n_positions", int, 1024),
        "n_layer": Key("n_layer", int),
        "n_head": Key("n_head", int),
        "n_embd": Key("d_model", int),
        "n_inner": Key("d_ff", int, None),
        "layer_norm_epsilon": Key("eps", float, 1e-5),
        "activation_function": Key("activation", str, "gelu_new"),
        "tie_word_embeddings": Key("tie_head", bool, True),
    },
    more=_more,
    activations=GELU,
    fixed={"norm": "layer", "norm_first": True, "positions": "learned", "causal": True},
    neutral={**NEUTRAL, "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
    same={
        "max_position_embeddings": "n_positions", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "hidden_size": "n_embd",
    },
    modules={
        "embed.tokens": "wte",
        "embed.positions": "wpe",
        "layers.{i}.norm1": "h.{i}.ln_1",
        "layers.{i}.attn.qkv": "h.{i}.attn.c_attn",
        "layers.{i}.attn.o": "h.{i}.attn.c_proj",
        "layers.{i}.norm2": "h.{i}.ln_2",
        "layers.{i}.mlp.up": "h.{i}.mlp.c_fc",
        "layers.{i}.mlp.down": "h.{i}.mlp.c_proj",
        "norm": "ln_f",
    },
    trunk="transformer",
    heads={"lm": {"head": "lm_head"}, "classify": {"head": "score"}, "tag": {"head": "classifier"}},
    fan_in_fan_out=True,
    left_out=r"h\.\d+\.attn\.(bias|masked_bias)",
    gguf="gpt2",
)  # fmt: skip
