"""BART (Lewis et al. 2020): post-norm in both stacks, positions from row 2 on, the head tied to the token table."""

from collections.abc import Mapping
from typing import Any

from ..family import GELU, NEUTRAL, Family, Key, check_values, value_of


def _more(raw: Mapping[str, Any], said: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Both stacks have the same sizes, but for their layers."""
    same = {"encoder_attention_heads": (said["n_head"],), "encoder_ffn_dim": (said["d_ff"],)}
    check_values(raw, same, where)
    scales = value_of(raw, "scale_embedding", Key("embed_scale", bool, False), where)
    return {"embed_scale": said["d_model"] ** 0.5 if scales else 1.0}


def _modules() -> dict[str, str]:
    names = {"embed.tokens": "shared"}
    for ours, theirs in (("encoder.", "encoder"), ("", "decoder")):
        layer, block = f"{ours}layers.{{i}}", f"{theirs}.layers.{{i}}"
        names |= {
            f"{ours}embed.positions": f"{theirs}.embed_positions",
            f"{ours}embed.norm": f"{theirs}.layernorm_embedding",
            **{f"{layer}.attn.{part}": f"{block}.self_attn.{name}" for part, name in _PARTS.items()},
            f"{layer}.norm1": f"{block}.self_attn_layer_norm",
            f"{layer}.mlp.up": f"{block}.fc1",
            f"{layer}.mlp.down": f"{block}.fc2",
            f"{layer}.norm2": f"{block}.final_layer_norm",
        }
    names |= {
        f"layers.{{i}}.cross.{part}": f"decoder.layers.{{i}}.encoder_attn.{name}" for part, name in _PARTS.items()
    }
    return {**names, "layers.{i}.norm_cross": "decoder.layers.{i}.encoder_attn_layer_norm"}


_PARTS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}

BART = Family(
    name="bart",
    classes={"BartForConditionalGeneration": "lm", "BartModel": "none"},
    keys={
        "vocab_size": Key("vocab_size", int, 50265),
        "max_position_embeddings": Key("n_positions", int, 1024, plus=2),
        "encoder_layers": Key("n_encoder", int, 12, least=1),
        "decoder_layers": Key("n_layer", int, 12),
        "decoder_attention_heads": Key("n_head", int, 16),
        "d_model": Key("d_model", int, 1024),
        "decoder_ffn_dim": Key("d_ff", int, 4096),
        "activation_function": Key("activation", str, "gelu"),
        "tie_word_embeddings": Key("tie_head", bool, True),
    },
    more=_more,
    says=("embed_scale",),
    activations={**GELU, "relu": "relu"},
    fixed={"norm_first": False, "position_offset": 2},
    neutral={**NEUTRAL, "is_encoder_decoder": (True,), "normalize_before": (False,), "add_final_layer_norm": (False,)},
    modules=_modules(),
    trunk="model",
    heads={"lm": {"head": "lm_head"}},
    copies=("encoder.embed_tokens", "decoder.embed_tokens"),
    zeros=("final_logits_bias",),
    left_out=r"(?!)",
)
