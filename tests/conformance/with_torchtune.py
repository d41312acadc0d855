"""torchtune beside the vectors: its LoRA layers, merged too, its modules, and its Llama with LoRA on any matrix.

python with_torchtune.py VECTORS RESULTS

It has no rank-stabilised scale, keeps nothing to unmerge, and draws tokens with a generator of its own.
"""

import sys
from pathlib import Path

import torch
from llamas import is_llama
from offered import not_stabilised
from on_torch import Masked, linear_of, rates, run
from torchtune import modules, training
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import DoRALinear, LoRALinear, get_adapter_params, get_merged_lora_ckpt

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def layer_of(t, c, kind=LoRALinear):
    n_out, n_in = t["W0"].shape
    layer = kind(n_in, n_out, rank=c["r"], alpha=c["alpha"], use_bias="b" in t)
    layer.weight, layer.lora_a.weight, layer.lora_b.weight = t["W0"], t["A"], t["B"]
    if "b" in t:
        layer.bias = t["b"]
    if "keep" in t:
        layer.dropout = Masked(t["keep"], c["p"])
    if "m" in t:
        layer.magnitude = t["m"]
    return layer


def merged(t, c, W0):
    state = {"x.weight": W0, "x.lora_a.weight": t["A"].detach(), "x.lora_b.weight": t["B"].detach()}
    state |= {"x.magnitude": t["m"]} if "m" in t else {}
    return get_merged_lora_ckpt(state, rank=c["r"], alpha=c["alpha"])["x.weight"]


def lora_update(t, c):
    return {"dW": merged(t, c, torch.zeros(len(t["B"]), t["A"].shape[1]))}


def lora_linear(t, c):
    return {"h": layer_of(t, c)(t["x"])}


def lora_start(t, c):
    h = lora_linear(t, c)["h"]
    return {"h": h, "difference": (h - linear_of(t["W0"], t["b"])(t["x"])).detach()}


def merge(t, c):
    W = merged(t, c, t["W0"].detach().to(DTYPES[c["dtype"]])).float()
    return {"W": W, "h": torch.nn.functional.linear(t["x"], W, t.get("b"))}


def dora_linear(t, c):
    return {"h": layer_of(t, c, DoRALinear)(t["x"])}


def dora_merge(t, c):
    return {"W": merged(t, c, t["W0"])}


def count(t, c):
    total = 0
    for matrices, n_out, n_in, r in zip(*(t[name].tolist() for name in ("matrices", "out", "in", "r")), strict=True):
        with torch.device("meta"):
            layer = LoRALinear(n_in, n_out, rank=r, alpha=1.0)
        total += matrices * sum(p.numel() for p in get_adapter_params(layer).values())
    return {"parameters": torch.tensor(total)}


# --- The transformer's parts ------------------------------------------------------------------------------------------


def rms_norm(t, c):
    norm = modules.RMSNorm(len(t["w"]), eps=c["eps"])
    norm.scale = torch.nn.Parameter(1 + t["w"]) if c.get("one_plus") else t["w"]
    return None if c.get("one_plus") else {"y": norm(t["x"])}


ACTIVATIONS = {
    "gelu": torch.nn.GELU(),
    "gelu_tanh": torch.nn.GELU("tanh"),
    "silu": torch.nn.SiLU(),
    "relu": torch.nn.ReLU(),
}


def gated_mlp(t, c):
    parts = {name: linear_of(t[f"W_{name}"]) for name in ("gate", "up", "down")}
    mlp = modules.FeedForward(
        gate_proj=parts["gate"], up_proj=parts["up"], down_proj=parts["down"],
        activation=ACTIVATIONS[c.get("activation", "silu")],
    )  # fmt: skip
    own = {f"{theirs}.weight": t[f"W_{ours}"] for ours, theirs in {"gate": "w1", "down": "w2", "up": "w3"}.items()}
    return {"y": torch.func.functional_call(mlp, own, (t["x"],))}


def rotary(t, c):
    """Its own pairs are neighbours, x_2i and x_(2i+1), as in Meta's files: it turns the rows of W_q and W_k to suit."""
    if "width" in c or "factors" in c:
        return None
    x = t["x"].transpose(1, 2)
    rope = modules.RotaryPositionalEmbeddings(x.shape[-1], int(t["positions"].max()) + 1, c["theta"])
    return {"y": rope(x, input_pos=t["positions"].expand(len(x), -1)).transpose(1, 2)}


def mask_of(t, N, T, S, c):
    visible = t["mask"][:, None, :].expand(N, T, S) if "mask" in t else torch.ones(N, T, S, dtype=torch.bool)
    if c["causal"]:
        visible = visible & torch.ones(T, S, dtype=torch.bool).tril(S - T)
    if "window" in c:
        visible = visible & torch.ones(T, S, dtype=torch.bool).triu(S - T - c["window"] + 1)
    return visible


def attention(t, c):
    """Its module with identities: queries are its first input, keys beside values its second."""
    if "scale" in c:
        return None
    (N, H, T, K), (_, G, S, _) = t["q"].shape, t["k"].shape
    side = torch.eye(2 * G * K)
    module = modules.MultiHeadAttention(
        embed_dim=H * K, num_heads=H, num_kv_heads=G, head_dim=K, q_proj=torch.nn.Identity(),
        k_proj=linear_of(side[: G * K]), v_proj=linear_of(side[G * K :]), output_proj=torch.nn.Identity(),
    )  # fmt: skip
    q, k, v = (t[name].transpose(1, 2).flatten(2) for name in "qkv")
    y = module(q, torch.cat([k, v], -1), mask=mask_of(t, N, T, S, c))
    return {"y": y.view(N, T, H, K).transpose(1, 2)}


def cross_attention(t, c):
    (N, T, D), S = t["x"].shape, t["X"].shape[1]
    H = c["n_head"]
    parts = {name: linear_of(t["W_q"]) for name in ("q_proj", "k_proj", "v_proj", "output_proj")}
    module = modules.MultiHeadAttention(embed_dim=D, num_heads=H, num_kv_heads=H, head_dim=D // H, **parts)
    own = {f"{part}_proj.weight": t[f"W_{part[0]}"] for part in ("q", "k", "v", "output")}
    mask = mask_of({"mask": t["source_mask"]} if "source_mask" in t else {}, N, T, S, {"causal": False})
    return {"y": torch.func.functional_call(module, own, (t["x"], t["X"]), {"mask": mask})}


def cross_entropy(t, c):
    loss = CEWithChunkedOutputLoss(num_output_chunks=c.get("shards", 1))
    return {"loss": loss([one[None] for one in t["logits"].chunk(loss.num_output_chunks)], t["targets"][None])}


# --- A whole Llama ----------------------------------------------------------------------------------------------------

FILES = {"attn": "self_attn", "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "up": "up_proj",
         "gate": "gate_proj", "down": "down_proj", "norm1": "input_layernorm",
         "norm2": "post_attention_layernorm"}  # fmt: skip
ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "output_proj"}
MLP = {"gate": "w1", "down": "w2", "up": "w3"}


def model(t, c):
    if not is_llama(t, c):
        return None
    adapted = set(c.get("adapted", ()))
    sizes = {
        "vocab_size": c["vocab_size"], "num_layers": c["n_layer"], "num_heads": c["n_head"], "norm_eps": c["eps"],
        "num_kv_heads": c["n_kv_head"], "embed_dim": c["d_model"], "max_seq_len": c["n_positions"],
        "intermediate_dim": c["d_ff"], "rope_base": c["rope_theta"],
    }  # fmt: skip
    if adapted:
        matrices = [theirs for ours, theirs in ATTENTION.items() if ours in adapted]
        more = {"lora_rank": c["r"], "lora_alpha": c["alpha"]}
        net = lora_llama3(matrices, "gate" in adapted, "head" in adapted, **sizes, **more)
    else:
        net = llama3(**sizes)
    stored = {"model.embed_tokens.weight": t["embed.tokens"], "model.norm.weight": t["norm.weight"]}
    stored["lm_head.weight"] = t["embed.tokens"] if c["tie_head"] else t["head.weight"]
    for name in (name for name in t if name.startswith("layers.") and name.endswith(".weight")):
        stored["model." + ".".join(FILES.get(part, part) for part in name.split("."))] = t[name]
    own = hf_to_tune(stored, c["n_head"], c["n_kv_head"], c["d_model"])
    for name in (name for name in t if name.endswith(".A")):
        *where, matrix, _ = name.split(".")
        there = ".".join([*where, {**ATTENTION, **MLP, "head": "output"}[matrix]])
        A, B = t[name], t[name[:-1] + "B"]
        if matrix in ("q", "k"):  # of its rows the order is W's
            B = rows_turned(B, c["d_model"] // c["n_head"])
        own |= {f"{there}.lora_a.weight": A, f"{there}.lora_b.weight": B}
    logits = torch.func.functional_call(net, own, (t["tokens"],))
    return {"logits": logits, "loss": CEWithChunkedOutputLoss(1)([logits], t["targets"])}


def rows_turned(B, K):
    return B.view(-1, 2, K // 2, B.shape[-1]).transpose(1, 2).reshape(B.shape)


def warmup_cosine(t, c):
    return rates(training.get_cosine_schedule_with_warmup, t, c)


OPERATIONS = {
    **{f.__name__: not_stabilised(f) for f in (lora_update, lora_linear, lora_start, merge, dora_linear, dora_merge)},
    **{f.__name__: f for f in (count, rms_norm, gated_mlp, rotary, attention, cross_attention, cross_entropy, model,
                               warmup_cosine)},
}  # fmt: skip

if __name__ == "__main__":
    run(OPERATIONS, Path(sys.argv[1]), Path(sys.argv[2]))
