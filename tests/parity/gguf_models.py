"""transformers' models as llama.cpp's files: names, rows and keys written here by hand."""

import numpy as np
from families import torch
from llama_cpp import write_model

# Parts of a name there and here.
PARTS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
}  # fmt: skip
NORMS = {"post_attention_layernorm": "ffn_norm"}
MORE_NORMS = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def randomised(model, architecture):
    """Its weights at random, so that words are told apart: norms about 1."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            is_one = value.dim() == 1 and "bias" not in name and not architecture.startswith("gemma")
            value.copy_(torch.randn_like(value) * 0.3 + is_one)
    return model.eval()


def in_file(name, architecture):
    for theirs, ours in (PARTS | (MORE_NORMS if architecture in ("gemma2", "gemma3") else NORMS)).items():
        name = name.replace(theirs, ours)
    return name


def as_stored(name, value, architecture, config):
    if architecture.startswith("gemma") and "norm" in name:
        value = value + 1
    ends = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
    heads = ends.get(name.split(".", 2)[-1], 0) if architecture == "llama" else 0
    if heads:  # rows j and j + K/2 of a head become 2j and 2j + 1
        value = value.reshape(heads, 2, -1, value.shape[-1]).transpose(0, 2, 1, 3).reshape(value.shape)
    return np.ascontiguousarray(value.astype(np.float32))


def stored(model, architecture):
    """The tensors of a model's file, by their names."""
    tied = model.config.tie_word_embeddings
    tensors = {in_file(k, architecture): v for k, v in model.state_dict().items() if not (tied and "lm_head" in k)}
    return {k: as_stored(k, v.numpy(), architecture, model.config) for k, v in tensors.items()}


def keys(config):
    """What all architectures say."""
    K = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": K, "attention.value_length": K,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": 10000.0, "rope.dimension_count": K,
        "vocab_size": config.vocab_size,
    }  # fmt: skip


def base_file(path, model, architecture, *, more=None, tensors=None):
    """The file. more: keys, others or beside; tensors: beside."""
    all_keys = {**keys(model.config), **(more or {})}
    write_model(
        path, architecture, all_keys, {**stored(model, architecture), **(tensors or {})}, all_keys["vocab_size"]
    )
