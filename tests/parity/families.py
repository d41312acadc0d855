"""Tiny models of many families, and adapters that PEFT makes on them: what they target, and how."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install lora-np[peers]")
peft = pytest.importorskip("peft", reason="pip install lora-np[peers]")
T = pytest.importorskip("transformers", reason="pip install lora-np[peers]")

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
}


def config_of(family):
    prefix, sizes = FAMILIES[family][:2]
    name = "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    return getattr(T, name)(**{"vocab_size": V, **sizes})


def make(family, dtype, seed):
    """A model with random weights."""
    torch.manual_seed(seed)
    prefix, _, end, _ = FAMILIES[family]
    return getattr(T, prefix + end)(config_of(family)).to(dtype).eval()


def adapted(model, settings, dtype, seed):
    """The model with PEFT's adapter, whose every parameter is random, and so is what is trained whole beside it."""
    module = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **settings))
    rng = np.random.default_rng(seed)
    for _, value in module.named_parameters():
        if value.requires_grad:
            value.data = torch.from_numpy(0.3 * rng.standard_normal(tuple(value.shape))).to(dtype)
    return module
