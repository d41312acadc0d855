"""config.json as published models have it, of several ages, read as the configuration that PRESETS has by hand."""

import json
from dataclasses import replace

import pytest

import lora_np as ln
from lora_np.formats.models.families import FAMILIES
from lora_np.formats.models.huggingface import read_config
from lora_np.formats.models.names import family_of

ROPE3 = {
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
QWEN = {"hidden_act": "silu", "max_window_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_cache": True}
GEMMA3 = {
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256, "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "sliding_window_pattern": 6,
}  # fmt: skip
T5 = {
    "architectures": ["T5ForConditionalGeneration"], "decoder_start_token_id": 0, "is_encoder_decoder": True,
    "initializer_factor": 1.0, "layer_norm_epsilon": 1e-6, "n_positions": 512, "pad_token_id": 0, "vocab_size": 32128,
    "relative_attention_num_buckets": 32, "d_kv": 64,
}  # fmt: skip
PUBLISHED = {
    "llama-2-7b": ("llama", {
        "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": False,
        "vocab_size": 32000,
    }),
    "llama-3.2-1b": ("llama", {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_scaling": ROPE3, "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
    }),
    "mistral-7b": ("mistral", {
        "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "vocab_size": 32000,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": False,
    }),
    "qwen2.5-0.5b": ("qwen2", {
        **QWEN, "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "num_attention_heads": 14, "num_hidden_layers": 24, "max_window_layers": 24,
        "num_key_value_heads": 2, "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False,
        "vocab_size": 151936,
    }),
    "qwen3-0.6b": ("qwen3", {
        **QWEN, "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_size": 1024,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "num_attention_heads": 16,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "rope_scaling": None, "sliding_window": None,
        "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
    }),
    "gemma-3-270m": ("gemma3_text", {
        **GEMMA3, "architectures": ["Gemma3ForCausalLM"], "hidden_size": 640, "intermediate_size": 2048,
        "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 18, "num_key_value_heads": 1,
        "rope_local_base_freq": 10000.0, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512,
        "vocab_size": 262144,
    }),
    "deberta-v3-base": ("deberta-v2", {
        "architectures": ["DebertaV2Model"], "hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072,
        "max_position_embeddings": 512, "relative_attention": True, "position_buckets": 256, "share_att_key": True,
        "norm_rel_ebd": "layer_norm", "pos_att_type": "p2c|c2p", "layer_norm_eps": 1e-7, "max_relative_positions": -1,
        "position_biased_input": False, "num_attention_heads": 12, "num_hidden_layers": 12, "type_vocab_size": 0,
        "vocab_size": 128100,
    }),
    "t5-small": ("t5", {**T5, "d_ff": 2048, "d_model": 512, "num_heads": 8, "num_layers": 6}),
    "flan-t5-base": ("t5", {
        **T5, "d_ff": 2048, "d_model": 768, "num_heads": 12, "num_layers": 12, "num_decoder_layers": 12,
        "feed_forward_proj": "gated-gelu", "relative_attention_max_distance": 128, "tie_word_embeddings": False,
    }),
}  # fmt: skip
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "mm_tokens_per_image": 256,
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}  # fmt: skip
LLAMA, DEBERTA = (PUBLISHED[name][1] for name in ("llama-3.2-1b", "deberta-v3-base"))
PHI3 = {
    "architectures": ["Phi3ForCausalLM"], "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
    "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0,
    "sliding_window": 2047, "tie_word_embeddings": False, "vocab_size": 32064,
}  # fmt: skip
BART = {
    "architectures": ["BartModel"], "activation_function": "gelu", "add_final_layer_norm": False, "d_model": 768,
    "decoder_attention_heads": 12, "decoder_ffn_dim": 3072, "decoder_layers": 6, "encoder_attention_heads": 12,
    "encoder_ffn_dim": 3072, "encoder_layers": 6, "is_encoder_decoder": True, "max_position_embeddings": 1024,
    "normalize_before": False, "scale_embedding": False, "vocab_size": 50265,
}  # fmt: skip


def read(model_type, raw):
    return read_config({"model_type": model_type, **raw}, "config.json")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_the_presets(name):
    model_type, raw = PUBLISHED[name]
    config, preset = read(model_type, raw), ln.PRESETS[name]
    # Neither what follows from what else is said: whose names its files use, and as many heads of keys as of queries.
    ours, due = (replace(one, family=None, n_kv_head=one.kv_heads) for one in (config, preset))
    assert ours == due
    assert family_of(config) is family_of(preset)
    assert family_of(config).model_type == model_type


def test_the_text_model_of_a_multimodal_folder():
    """Whose text_config leaves out what is its class's default; its frequencies are scaled where there is no window."""
    config = read_config(GEMMA3_4B, "config.json")
    sizes = (config.vocab_size, config.n_layer, config.n_head, config.kv_heads, config.d_model, config.d_ff)
    assert sizes == (262208, 34, 8, 4, 2560, 10240)
    assert (config.head_width, config.n_positions, config.window, config.tie_head) == (256, 131072, 1024, True)
    assert config.full_layers == (5, 11, 17, 23, 29)
    assert (config.rope_theta, config.rope_factors, config.window_theta) == (1e6, (8.0,), 1e4)
    assert family_of(config) is FAMILIES["gemma3"]


def test_phi3s_and_barts():
    config = read("phi3", PHI3)
    assert (config.window, config.full_layers, config.bias, config.rope_width) == (2047, (), False, None)
    assert family_of(config) is FAMILIES["phi3"]
    config = read("bart", BART)
    assert (config.n_positions, config.position_offset, config.n_encoder, config.n_layer) == (1026, 2, 6, 6)
    assert (config.embed_scale, config.norm_first, config.tie_head, config.head) == (1.0, False, True, "none")


def test_qwens_window_begins_at_a_layer_where_older_files_use_it():
    raw = {**PUBLISHED["qwen2.5-0.5b"][1], "use_sliding_window": True, "max_window_layers": 21, "sliding_window": 99}
    config = read("qwen2", raw)
    assert (config.window, config.full_layers) == (99, tuple(range(21)))
    assert read("qwen2", {**raw, "max_window_layers": 24}).window is None
    newer = ["full_attention", *["sliding_attention"] * 23]
    assert read("qwen2", {**raw, "layer_types": newer}).full_layers == (0,)


REFUSED = {
    "longrope": (
        "phi3",
        {**PHI3, "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        "rope_scaling: type = 'longrope' is not supported",
    ),
    "yarn": (
        "llama",
        {**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "rope_scaling: rope_type = 'yarn' is not supported",
    ),
    "llama3 without a factor": (
        "llama",
        {**LLAMA, "rope_scaling": {**ROPE3, "factor": None}},
        "rope_scaling: factor: expected a number above 0, got None",
    ),
    "llama3 upside down": (
        "llama",
        {**LLAMA, "rope_scaling": {**ROPE3, "low_freq_factor": 4.0}},
        "rope_scaling: low_freq_factor: expected less than high_freq_factor, 4.0, got 4.0",
    ),
    "scaled twice": (
        "llama",
        {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "rope_parameters and rope_scaling differ",
    ),
    "a part turned": ("llama", {**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
    "a head's width": ("llama", {**LLAMA, "head_dim": 0}, "head_dim: expected at least 1, got 0"),
    "layer types": (
        "qwen3",
        {**PUBLISHED["qwen3-0.6b"][1], "use_sliding_window": True, "layer_types": ["sliding_attention"]},
        "layer_types: expected one of sliding_attention full_attention for each layer, got",
    ),
    "no window": (
        "gemma3_text",
        {**PUBLISHED["gemma-3-270m"][1], "sliding_window": None, "layer_types": ["sliding_attention"] * 18},
        "sliding_window: expected a number of keys, as layer_types asks for, got none",
    ),
    "softcapping": (
        "gemma3_text",
        {**PUBLISHED["gemma-3-270m"][1], "final_logit_softcapping": 30.0},
        "final_logit_softcapping: 30.0 is not supported, only None",
    ),
    "both ways": (
        "gemma3_text",
        {**PUBLISHED["gemma-3-270m"][1], "use_bidirectional_attention": True},
        "use_bidirectional_attention: True is not supported",
    ),
    "no text": ("gemma3", {"architectures": ["Gemma3ForConditionalGeneration"]}, "text_config: expected an object"),
    "convolution": ("deberta-v2", {**DEBERTA, "conv_kernel_size": 3}, "conv_kernel_size: 3 is not supported, only 0"),
    "keys of positions": (
        "deberta-v2",
        {**DEBERTA, "share_att_key": False},
        "share_att_key: False is not supported, only True",
    ),
    "one way of two": (
        "deberta-v2",
        {**DEBERTA, "pos_att_type": "c2p"},
        r"pos_att_type: 'c2p' is not supported, only p2c\|c2p",
    ),
    "absolute positions": (
        "deberta-v2",
        {key: value for key, value in DEBERTA.items() if key != "position_biased_input"},
        "position_biased_input: True is not supported, only False",
    ),
    "no buckets": ("deberta-v2", {**DEBERTA, "position_buckets": -1}, "score_buckets"),
    "another activation": (
        "t5",
        {**PUBLISHED["t5-small"][1], "feed_forward_proj": "gated-tanh"},
        "feed_forward_proj: 'gated-tanh' is not supported",
    ),
    "an encoder alone": ("t5", {**T5, "architectures": ["T5EncoderModel"]}, "architectures: expected one of T5For"),
    "other heads": ("bart", {**BART, "encoder_attention_heads": 6}, "encoder_attention_heads: 6 is not supported"),
    "projected tokens": (
        "opt",
        {
            "architectures": ["OPTForCausalLM"], "vocab_size": 9, "num_hidden_layers": 1, "num_attention_heads": 1,
            "hidden_size": 4, "word_embed_proj_dim": 2,
        },
        "word_embed_proj_dim: 2 is not supported, only hidden_size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_by_its_key(name):
    model_type, raw, said = REFUSED[name]
    with pytest.raises(ValueError, match=f"^config.json: .*{said}") as caught:
        read(model_type, raw)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["smollm3", "olmo2", "gemma2", "mixtral", "umt5", "deberta"])
def test_other_families_are_refused_by_name(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=f"model type '{model_type}' is not supported; .*others are merged"):
        ln.load_model(tmp_path)
