"""Gemma 3 (Kamath et al. 2025), text: a window in most layers, with a rotary base of their own, norms on both sides of
a sublayer, and of each head's query and key. Of a multimodal folder the text model is read."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..attention import KINDS, head_width, rotary, windows
from ..family import Key, classes, value_of
from .gemma import GEMMA

SLIDING, FULL = KINDS


def _more(raw: Mapping[str, Any], said: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Older files say in rope_theta and rope_scaling what newer ones do in rope_parameters of full_attention."""
    every = value_of(raw, "sliding_window_pattern", Key("full_layers", int, 6, least=1), where)
    scalar = value_of(raw, "query_pre_attn_scalar", Key("score_scale", float, 256), where)
    d_head = head_width(raw, said, where, 256)
    found = {
        "d_head": d_head,
        "embed_scale": said["d_model"] ** 0.5,
        "score_scale": None if scalar == d_head else scalar**-0.5,
        **windows(raw, said, where, full=range(every - 1, said["n_layer"], every), default=4096),
    }
    found |= rotary(raw, {**said, **found}, where, theta=1e6, kind=FULL)
    if "window" in found:
        newer = {"rope_parameters": raw.get("rope_parameters")}
        local = value_of(raw, "rope_local_base_freq", Key("window_theta", float, 10000.0), where)
        of_window = rotary(newer, {**said, **found}, where, theta=local, kind=SLIDING)
        if of_window["rope_factors"] != [1.0]:
            raise ValueError(f"{where}: rope_parameters: {SLIDING}: scaled frequencies are not supported")
        found["window_theta"] = of_window["rope_theta"]
    return found


GEMMA3_TEXT = replace(
    GEMMA,
    name="gemma3_text",
    classes={
        **classes("Gemma3Text"), "Gemma3ForCausalLM": "lm", "Gemma3TextForSequenceClassification": "classify",
    },
    keys={
        "vocab_size": Key("vocab_size", int, 262208),
        "max_position_embeddings": Key("n_positions", int, 131072),
        "num_hidden_layers": Key("n_layer", int, 26),
        "num_attention_heads": Key("n_head", int, 8),
        "num_key_value_heads": Key("n_kv_head", int, 4),
        "hidden_size": Key("d_model", int, 2304),
        "intermediate_size": Key("d_ff", int, 9216),
        "rms_norm_eps": Key("eps", float, 1e-6),
        "hidden_activation": Key("activation", str, "gelu_pytorch_tanh"),
        "tie_word_embeddings": Key("tie_head", bool, True),
    },
    activations={"gelu_pytorch_tanh": "gelu_tanh_gated"},
    fixed={**GEMMA.fixed, "qk_norm": True, "norm_outputs": True},
    neutral={
        **GEMMA.neutral, "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,),
        "hidden_activation": ("gelu_pytorch_tanh",),
    },
    more=_more,
    says=(*GEMMA.says, "score_scale", "window", "full_layers", "window_theta"),
    modules={
        **GEMMA.modules,
        "layers.{i}.norm1_out": "layers.{i}.post_attention_layernorm",
        "layers.{i}.norm2": "layers.{i}.pre_feedforward_layernorm",
        "layers.{i}.norm2_out": "layers.{i}.post_feedforward_layernorm",
        "layers.{i}.attn.q_norm": "layers.{i}.self_attn.q_norm",
        "layers.{i}.attn.k_norm": "layers.{i}.self_attn.k_norm",
    },
    gguf="gemma3",
)  # fmt: skip

GEMMA3 = replace(
    GEMMA3_TEXT,
    name="gemma3",
    classes={"Gemma3ForConditionalGeneration": "lm"},
    within="text_config",
    trunk="model.language_model",
    heads={"lm": {"head": "lm_head"}},
    stored={"model.language_model.": "language_model.model.", "lm_head": "language_model.lm_head"},
    left_out=rf"{GEMMA3_TEXT.left_out}|(model\.)?(vision_tower|multi_modal_projector)\..*",
    gguf=None,
)
