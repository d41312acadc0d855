"""Tiny models of many families, and adapters that PEFT makes on them: what they target, and how."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra peers")
peft = pytest.importorskip("peft", reason="the extra peers")
T = pytest.importorskip("transformers", reason="the extra peers")

QUIET = [  # what the peers say of themselves
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),  # PEFT's own, for experts
]
V = 64
BERT = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip
LLAMA = {**BERT, "num_key_value_heads": 1}
HEADS = {**LLAMA, "head_dim": 8}
BART = {
    "vocab_size": V, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}}
OWN = {  # those whose configurations have names of their own
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "gpt_neo": (
        "GPTNeo",
        {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    ),
    "gptj": ("GPTJ", {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}),
    "mpt": ("Mpt", {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32}),
    "mamba": ("Mamba", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "t5": ("T5", {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}),
    "distilbert": ("DistilBert", {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}),
}
MOE = {**HEADS, "num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
IN_FFN = [name.replace("mlp", "feed_forward") for name in EXPERTS]
LATENT = {  # DeepSeek's attention
    "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_routed_experts": 4,
}  # fmt: skip
IMAGES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}
TWO = {"text_config": BERT, "vision_config": IMAGES}
LLAVA = {"model_type": "llama", **LLAMA}, {"model_type": "clip_vision_model", **IMAGES}
SMALL_IMAGES = {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
# A family: its classes' prefix, sizes, the class's end, and what PEFT is asked for.
FAMILIES = {
    "gpt2": (*OWN["gpt2"], "LMHeadModel", {"target_modules": ["c_attn", "c_proj"], "bias": "all"}),
    "gpt_neo": (*OWN["gpt_neo"], "ForCausalLM", {"target_modules": ["q_proj", "v_proj"]}),
    "gpt_neox": ("GPTNeoX", BERT, "ForCausalLM", {"target_modules": ["query_key_value"], "bias": "lora_only"}),
    "gptj": (*OWN["gptj"], "ForCausalLM", {"target_modules": r".*\.(q_proj|fc_in)"}),
    "opt": (
        "OPT",
        {**BERT, "ffn_dim": 32, "word_embed_proj_dim": 16},
        "ForCausalLM",
        {"target_modules": ["q_proj", "fc2"]},
    ),
    "bloom": ("Bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 2}, "ForCausalLM", {"target_modules": "all-linear"}),
    "falcon": ("Falcon", BERT, "ForCausalLM", {"target_modules": ["query_key_value", "dense"]}),
    "mpt": (*OWN["mpt"], "ForCausalLM", {"target_modules": ["Wqkv"]}),
    "llama": ("Llama", LLAMA, "ForCausalLM", {"target_modules": ["q_proj", "v_proj"], **PATTERNS}),
    "mistral": ("Mistral", LLAMA, "ForCausalLM", {"target_modules": "all-linear"}),
    "mixtral": (
        "Mixtral",
        {**LLAMA, "num_local_experts": 4},
        "ForCausalLM",
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "qwen2": ("Qwen2", LLAMA, "ForCausalLM", {"target_modules": ["q_proj", "down_proj"], "lora_bias": False}),
    "qwen2-bias": ("Qwen2", LLAMA, "ForCausalLM", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "qwen3": ("Qwen3", HEADS, "ForCausalLM", {"target_modules": ["q_proj", "o_proj"], "use_rslora": True}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**HEADS, "num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2},
        "ForCausalLM",
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "gemma": ("Gemma", HEADS, "ForCausalLM", {"target_modules": ["q_proj", "gate_proj"]}),
    "gemma2": ("Gemma2", HEADS, "ForCausalLM", {"target_modules": "all-linear"}),
    "gemma3": ("Gemma3", HEADS, "ForCausalLM", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "phi": ("Phi", LLAMA, "ForCausalLM", {"target_modules": ["q_proj", "fc1"]}),
    "phi3": ("Phi3", {**LLAMA, "pad_token_id": 0}, "ForCausalLM", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "olmo2": ("Olmo2", LLAMA, "ForCausalLM", {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]}),
    "starcoder2": ("Starcoder2", LLAMA, "ForCausalLM", {"target_modules": ["q_proj", "c_fc"]}),
    "stablelm": ("StableLm", LLAMA, "ForCausalLM", {"target_modules": ["q_proj"], "exclude_modules": ["layers.0"]}),
    "cohere": ("Cohere", LLAMA, "ForCausalLM", {"target_modules": ["q_proj"]}),
    "granite": ("Granite", LLAMA, "ForCausalLM", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "gpt_oss": (
        "GptOss",
        {**HEADS, "intermediate_size": 16, "num_local_experts": 4, "layer_types": ["full_attention"] * 2},
        "ForCausalLM",
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "mamba": (*OWN["mamba"], "ForCausalLM", {"target_modules": ["in_proj", "x_proj"]}),
    "bert": ("Bert", BERT, "ForMaskedLM", {"target_modules": ["query", "value"]}),
    "roberta": ("Roberta", BERT, "ForMaskedLM", {"target_modules": ["query"]}),
    "distilbert": (*OWN["distilbert"], "ForMaskedLM", {"target_modules": ["q_lin"]}),
    "electra": ("Electra", {**BERT, "embedding_size": 16}, "ForMaskedLM", {"target_modules": ["query"]}),
    "albert": ("Albert", {**BERT, "embedding_size": 8}, "ForMaskedLM", {"target_modules": ["query"]}),
    "deberta_v2": ("DebertaV2", BERT, "ForMaskedLM", {"target_modules": ["query_proj"]}),
    "t5": (*OWN["t5"], "ForConditionalGeneration", {"target_modules": ["q", "v", "wo"]}),
    "bart": ("Bart", BART, "ForConditionalGeneration", {"target_modules": ["q_proj", "fc1"]}),
    "olmo": ("Olmo", LLAMA, "ForCausalLM", {"target_modules": ["q_proj", "up_proj"]}),
    "olmoe": ("Olmoe", MOE, "ForCausalLM", {"target_parameters": EXPERTS, "target_modules": []}),
    "persimmon": ("Persimmon", BERT, "ForCausalLM", {"target_modules": ["query_key_value", "dense"]}),
    "nemotron": ("Nemotron", LLAMA, "ForCausalLM", {"target_modules": "all-linear"}),
    "deepseek_v3": (
        "DeepseekV3",
        {**MOE, **LATENT},
        "ForCausalLM",
        {"target_modules": ["q_a_proj", "kv_b_proj"], "target_parameters": EXPERTS},
    ),
    "deepseek_v2": ("DeepseekV2", {**MOE, **LATENT}, "ForCausalLM", {"target_modules": "all-linear"}),
    "llama4": (
        "Llama4",
        {**HEADS, "intermediate_size_mlp": 32, "num_local_experts": 4},
        "ForCausalLM",
        {"target_modules": ["q_proj"], "target_parameters": IN_FFN},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {**MOE, "shared_expert_intermediate_size": 16},
        "ForCausalLM",
        {"target_modules": ["shared_expert.up_proj"], "target_parameters": EXPERTS},
    ),
    "phimoe": ("Phimoe", {**LLAMA, "num_local_experts": 4}, "ForCausalLM", {"target_modules": "all-linear"}),
    "jamba": (
        "Jamba",
        {
            **LLAMA,
            "num_experts": 2,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
        "ForCausalLM",
        {"target_modules": ["q_proj", "in_proj"], "target_parameters": IN_FFN},
    ),
    "falcon-new": (
        "Falcon",
        {**BERT, "new_decoder_architecture": True, "num_kv_heads": 1},
        "ForCausalLM",
        {"target_modules": ["query_key_value"]},
    ),
    "codegen": (
        "CodeGen",
        {"n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
        "ForCausalLM",
        {"target_modules": ["qkv_proj"]},
    ),
    "gpt_bigcode": ("GPTBigCode", OWN["gpt2"][1], "ForCausalLM", {"target_modules": ["c_attn", "c_proj"]}),
    "glm4": ("Glm4", {**HEADS, "pad_token_id": 0}, "ForCausalLM", {"target_modules": ["gate_up_proj"]}),
    "smollm3": ("SmolLM3", {**LLAMA, "pad_token_id": 0}, "ForCausalLM", {"target_modules": ["q_proj"]}),
    "exaone4": ("Exaone4", LLAMA, "ForCausalLM", {"target_modules": ["q_proj"]}),
    "rwkv": ("Rwkv", {"hidden_size": 16, "num_hidden_layers": 2}, "ForCausalLM", {"target_modules": ["key", "value"]}),
    "llama-classify": (
        "Llama",
        LLAMA,
        "ForSequenceClassification",
        {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
    ),
    "xlm_roberta": (
        "XLMRoberta",
        BERT,
        "ForSequenceClassification",
        {"target_modules": ["query"], "task_type": "SEQ_CLS"},
    ),
    "deberta": ("Deberta", BERT, "ForMaskedLM", {"target_modules": ["in_proj"]}),
    "modernbert": ("ModernBert", {**BERT, "pad_token_id": 0}, "ForMaskedLM", {"target_modules": ["Wqkv", "Wo"]}),
    "mbart": ("MBart", BART, "ForConditionalGeneration", {"target_modules": ["q_proj"]}),
    "mt5": ("MT5", OWN["t5"][1], "ForConditionalGeneration", {"target_modules": ["q", "wi_0"]}),
    "whisper": (
        "Whisper",
        {
            **BART,
            "num_mel_bins": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "max_source_positions": 8,
        },
        "ForConditionalGeneration",
        {"target_modules": ["q_proj", "v_proj"]},
    ),
    "clip": ("CLIP", {**TWO, "projection_dim": 16}, "Model", {"target_modules": ["q_proj"]}),
    "vit": (
        "ViT",
        IMAGES,
        "ForImageClassification",
        {"target_modules": "all-linear", "modules_to_save": ["classifier"]},
    ),
    "dinov2": ("Dinov2", IMAGES, "ForImageClassification", {"target_modules": ["q_proj", "o_proj"]}),
    "gemma3-images": (
        "Gemma3",
        {"text_config": HEADS, "vision_config": IMAGES, "mm_tokens_per_image": 4, "image_token_index": 60},
        "ForConditionalGeneration",
        {"target_modules": ["q_proj", "out_proj"]},
    ),
    "llava": (
        "Llava",
        {"text_config": LLAVA[0], "vision_config": LLAVA[1], "image_token_index": 60},
        "ForConditionalGeneration",
        {"target_modules": ["q_proj", "linear_1"], "modules_to_save": ["lm_head"]},
    ),
    "qwen2_vl": (
        "Qwen2VL",
        {"text_config": {**LLAMA, "rope_scaling": ROPE}, "vision_config": {"embed_dim": 16, **SMALL_IMAGES}},
        "ForConditionalGeneration",
        {"target_modules": ["q_proj", "qkv"]},
    ),
}


def config_of(family, **more):
    prefix, sizes, end = FAMILIES[family][:3]
    text = "Text" if prefix in ("Gemma3", "Llama4") and end == "ForCausalLM" else ""
    own = {} if "text_config" in sizes or sizes is IMAGES else {"vocab_size": V}
    return getattr(T, f"{prefix}{text}Config")(**{**own, **sizes, **more})


def make(family, dtype, seed, **more):
    """A model with random weights; more: what its configuration has beside the table's."""
    torch.manual_seed(seed)
    config = config_of(family, **more)
    config._experts_implementation = "eager"  # the others do not run in float64
    prefix, _, end, _ = FAMILIES[family]
    return getattr(T, prefix + end)(config).to(dtype).eval()


def adapted(model, settings, dtype, seed):
    """The model with PEFT's adapter, whose every parameter is random, and so is what is trained whole beside it."""
    module = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **settings))
    rng = np.random.default_rng(seed)
    for _, value in module.named_parameters():
        if value.requires_grad:
            value.data = torch.from_numpy(0.3 * rng.standard_normal(tuple(value.shape))).to(dtype)
    return module
