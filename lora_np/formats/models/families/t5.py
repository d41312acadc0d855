"""T5 (Raffel et al. 2020), its version 1.1 with Flan-T5 (Chung et al. 2022), and mT5 (Xue et al. 2021)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..attention import head_width
from ..family import NEUTRAL, Family, Key, value_of


def _more(raw: Mapping[str, Any], said: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The first T5 ties its head, and scales what that reads; newer files say the second alone."""
    ties = value_of(raw, "tie_word_embeddings", Key("tie_head", bool, True), where)
    scales = value_of(raw, "scale_decoder_outputs", Key("head_scale", bool, ties), where)
    return {
        "n_layer": value_of(raw, "num_decoder_layers", Key("n_layer", int, said["n_encoder"]), where),
        "d_head": head_width({"head_dim": value_of(raw, "d_kv", Key("d_head", int, 64), where)}, said, where),
        "tie_head": ties and scales,
        "head_scale": said["d_model"] ** -0.5 if scales else 1.0,
    }


def _more_of_mt5(raw: Mapping[str, Any], said: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Its head is its own where the files have one, whatever newer ones say, and what it reads is never scaled."""
    return _more({**raw, "tie_word_embeddings": False, "scale_decoder_outputs": False}, said, where)


def _modules(**mlp: str) -> dict[str, str]:
    """The names of both stacks; mlp: what the feed-forward half calls its own."""
    names = {"embed.tokens": "shared"}
    for ours, theirs, last in (("encoder.", "encoder", 1), ("", "decoder", 2)):
        layer, block = f"{ours}layers.{{i}}", f"{theirs}.block.{{i}}.layer"
        names |= {
            f"{ours}embed.score_bias": f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias",
            f"{layer}.norm1": f"{block}.0.layer_norm",
            **{f"{layer}.attn.{part}": f"{block}.0.SelfAttention.{part}" for part in "qkvo"},
            f"{layer}.norm2": f"{block}.{last}.layer_norm",
            **{f"{layer}.mlp.{part}": f"{block}.{last}.DenseReluDense.{name}" for part, name in mlp.items()},
            f"{ours}norm": f"{theirs}.final_layer_norm",
        }
    cross = "decoder.block.{i}.layer.1"
    names |= {f"layers.{{i}}.cross.{part}": f"{cross}.EncDecAttention.{part}" for part in "qkvo"}
    return {**names, "layers.{i}.norm_cross": f"{cross}.layer_norm"}


T5 = Family(
    name="t5",
    classes={"T5ForConditionalGeneration": "lm", "T5Model": "none"},
    keys={
        "vocab_size": Key("vocab_size", int, 32128),
        "n_positions": Key("n_positions", int, 512),
        "num_layers": Key("n_encoder", int, 6, least=1),
        "num_heads": Key("n_head", int, 8),
        "d_model": Key("d_model", int, 512),
        "d_ff": Key("d_ff", int, 2048),
        "relative_attention_num_buckets": Key("score_buckets", int, 32, least=1),
        "relative_attention_max_distance": Key("score_distance", int, 128),
        "layer_norm_epsilon": Key("eps", float, 1e-6),
        "feed_forward_proj": Key("activation", str, "relu"),
    },
    more=_more,
    says=("n_layer", "d_head", "tie_head", "head_scale"),
    activations={"relu": "relu"},
    fixed={"norm": "rms", "positions": "none", "bias": False, "score_scale": 1.0},
    neutral={**NEUTRAL, "is_encoder_decoder": (True,)},
    modules=_modules(up="wi", down="wo"),
    trunk="",
    heads={"lm": {"head": "lm_head"}},
    ties_absent=True,
    copies=("encoder.embed_tokens", "decoder.embed_tokens"),
    left_out=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)
T5_GATED = replace(
    T5,
    name="t5-v1.1",
    type_of="t5",
    activations={"gated-gelu": "gelu_tanh_gated", "gated-silu": "silu_gated", "gated-relu": "relu_gated"},
    modules=_modules(gate="wi_0", up="wi_1", down="wo"),
)
MT5 = replace(
    T5_GATED,
    name="mt5",
    type_of=None,
    more=_more_of_mt5,
    classes={"MT5ForConditionalGeneration": "lm", "MT5Model": "none"},
    keys={**T5.keys, "feed_forward_proj": Key("activation", str, "gated-gelu")},
)
