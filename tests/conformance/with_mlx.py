"""MLX and mlx-lm beside the vectors: LoRA and DoRA layers, fused too, and MLX's own primitives and optimizer.

python with_mlx.py VECTORS RESULTS

mlx-lm's layers take the scale s itself: here it is computed. They draw dropout's mask themselves; nothing is
unfused. Of a table, m has one for each word.
"""

import math
import re
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx.utils
from llamas import is_llama
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from mlx_lm.tuner.utils import build_schedule, linear_to_lora_layers
from on_arrays import run

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def scale(c):
    return c["alpha"] / (math.sqrt(c["r"]) if c["rslora"] else c["r"])


def linear_of(W, b=None):
    module = nn.Linear(W.shape[1], W.shape[0], bias=b is not None)
    module.weight = W
    if b is not None:
        module.bias = b
    return module


def adapted(kind, base, t, c):
    layer = kind.from_base(base, r=c["r"], scale=scale(c))
    layer.lora_a, layer.lora_b = t["A"].T, t["B"].T
    return layer


def lora_update(t, c):
    layer = adapted(LoRALinear, linear_of(mx.zeros((t["B"].shape[0], t["A"].shape[1]))), t, c)
    return {"dW": layer.fuse().weight}


def lora_linear(t, c):
    if "keep" in t:
        return None
    return {"h": adapted(LoRALinear, linear_of(t["W0"], t.get("b")), t, c)(t["x"])}


def lora_start(t, c):
    base = linear_of(t["W0"], t["b"])
    h = adapted(LoRALinear, base, t, c)(t["x"])
    return {"h": h, "difference": h - base(t["x"])}


def lora_embedding(t, c):
    base = nn.Embedding(*t["E"].shape)
    base.weight = t["E"]
    return {"h": adapted(LoRAEmbedding, base, t, c)(t["tokens"])}


def merge(t, c):
    W = adapted(LoRALinear, linear_of(t["W0"].astype(DTYPES[c["dtype"]]), t.get("b")), t, c).fuse().weight
    W = W.astype(mx.float32)
    return {"W": W, "h": linear_of(W, t.get("b"))(t["x"])}


def dora(t, c):
    layer = adapted(DoRALinear, linear_of(t["W0"], t.get("b")), t, c)
    layer.m = t["m"]
    return layer


def dora_linear(t, c):
    return None if "keep" in t else {"h": dora(t, c)(t["x"])}


def dora_merge(t, c):
    return {"W": dora(t, c).fuse().weight}


def count(t, c):
    total = 0
    for matrices, n_out, n_in, r in zip(*(t[name].tolist() for name in ("matrices", "out", "in", "r")), strict=True):
        base = nn.Linear(n_in, n_out, bias=False)  # nothing of it is computed
        base.freeze()
        trained = mlx.utils.tree_flatten(LoRALinear.from_base(base, r=r).trainable_parameters())
        total += matrices * sum(one.size for _, one in trained)
    return {"parameters": mx.array(total, mx.int64)}


# --- The transformer's parts ------------------------------------------------------------------------------------------


def embedding(t, c):
    x = 0
    for name in ("tokens", "positions", "types"):
        if name in t:
            table = nn.Embedding(*t[f"{name}_table"].shape)
            table.weight = t[f"{name}_table"]
            x = x + table(t[name]) * (c.get("scale", 1.0) if name == "tokens" else 1.0)
    return {"x": x}


def layer_norm(t, c):
    norm = nn.LayerNorm(t["w"].size, eps=c["eps"])
    norm.weight, norm.bias = t["w"], t["b"]
    return {"y": norm(t["x"])}


def rms_norm(t, c):
    norm = nn.RMSNorm(t["w"].size, eps=c["eps"])
    norm.weight = 1 + t["w"] if c.get("one_plus") else t["w"]
    return {"y": norm(t["x"])}


ACTIVATIONS = {"gelu": nn.gelu, "gelu_tanh": nn.gelu_approx, "silu": nn.silu, "relu": nn.relu}


def gated_mlp(t, c):
    act = ACTIVATIONS[c.get("activation", "silu")]
    return {"y": (act(t["x"] @ t["W_gate"].T) * (t["x"] @ t["W_up"].T)) @ t["W_down"].T}


def softmax(t, c):
    p = nn.softmax(mx.where(t["mask"], t["x"], -mx.inf), axis=-1)
    return {"p": mx.where(t["mask"].any(-1, keepdims=True), p, 0.0)}


def attention(t, c):
    T, S = t["q"].shape[2], t["k"].shape[2]
    visible = t["mask"][:, None, None, :] if "mask" in t else mx.ones((1, 1, 1, S), dtype=mx.bool_)
    places, keys = mx.arange(S - T, S)[:, None], mx.arange(S)
    if c["causal"]:
        visible = visible & (keys <= places)
    if "window" in c:
        visible = visible & (keys > places - c["window"])
    visible = mx.broadcast_to(visible, (t["q"].shape[0], 1, T, S))
    s = c.get("scale", t["q"].shape[-1] ** -0.5)
    return {"y": mx.fast.scaled_dot_product_attention(t["q"], t["k"], t["v"], scale=s, mask=visible)}


def rotary(t, c):
    """nn.RoPE takes a first position and counts from there: other positions one at a time."""
    factors, places = c.get("factors", [1.0]), t["positions"]
    if len(factors) > 1 or places.ndim > 1:
        return None
    rope = nn.RoPE(c.get("width", t["x"].shape[-1]), base=c["theta"], scale=1 / factors[0])
    return {"y": mx.concatenate([rope(t["x"][..., i : i + 1, :], offset=p) for i, p in enumerate(places.tolist())], 2)}


def cross_attention(t, c):
    heads = lambda y: y.reshape(*y.shape[:2], c["n_head"], -1).swapaxes(1, 2)  # noqa: E731
    q, k, v = (heads(t[x] @ t[f"W_{one}"].T) for one, x in (("q", "x"), ("k", "X"), ("v", "X")))
    mask = {"mask": t["source_mask"]} if "source_mask" in t else {}
    y = attention({"q": q, "k": k, "v": v, **mask}, {"causal": False})["y"]
    return {"y": y.swapaxes(1, 2).reshape(t["x"].shape) @ t["W_o"].T}


def cross_entropy(t, c):
    """As mlx-lm's own trainer does: what counts, and the mean, by hand."""
    counted = t["targets"] >= 0
    each = nn.losses.cross_entropy(t["logits"], mx.where(counted, t["targets"], 0)) * counted
    return {"loss": each.sum() / counted.sum()}


# --- Whole models -----------------------------------------------------------------------------------------------------

FILES = {"attn": "self_attn", "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "up": "up_proj",
         "gate": "gate_proj", "down": "down_proj", "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
         "layers": "model.layers", "norm": "model.norm", "head": "lm_head"}  # fmt: skip


def llama_of(t, c):
    """A Llama, adapted, with these weights; None for other architectures: its GPT-2 has d_ff = 4 D alone.

    The head is a matrix of its own, so that it can be adapted.
    """
    if not is_llama(t, c, "rslora", "split"):
        return None
    net = llama.Model(llama.ModelArgs(
        "llama", c["d_model"], c["n_layer"], c["d_ff"], c["n_head"], c["eps"], c["vocab_size"],
        num_key_value_heads=c["n_kv_head"], head_dim=c.get("d_head"), rope_theta=c["rope_theta"],
        tie_word_embeddings=False,
    ))  # fmt: skip
    named = {"head.weight": t["embed.tokens"]} | {name: t[name] for name in t if name.endswith((".weight", ".A", ".B"))}
    own = {".".join(FILES.get(part, part) for part in name.split(".")): value for name, value in named.items()}
    own["model.embed_tokens.weight"] = t["embed.tokens"]
    adapted = [name.removesuffix(".A") for name in own if name.endswith(".A")]
    if adapted:
        keys = [re.sub(r"model\.layers\.\d+\.", "", name) for name in adapted]  # a layer's own names
        linear_to_lora_layers(net, c["n_layer"], {"rank": c["r"], "scale": scale(c), "dropout": 0.0, "keys": keys})
    for name in adapted:
        own |= {f"{name}.lora_a": own.pop(f"{name}.A").T, f"{name}.lora_b": own.pop(f"{name}.B").T}
        own[f"{name}.linear.weight"] = own.pop(f"{name}.weight")
    return net.load_weights([*own.items()])


def model(t, c):
    net = llama_of(t, c)
    if net is None:
        return None
    logits = net(t["tokens"])
    return {"logits": logits, **cross_entropy({"logits": logits, "targets": t["targets"]}, c)}


def generate(t, c):
    net = llama_of(t, c)
    if net is None:
        return None
    rows = [[*row, *(int(token) for token, _ in generate_step(mx.array(row), net, max_tokens=c["n"]))]
            for row in t["tokens"].tolist()]  # fmt: skip
    return {"tokens": mx.array(rows)}


# --- Training ---------------------------------------------------------------------------------------------------------


def adamw(t, c):
    optimizer = optim.AdamW(
        c["lr"], betas=[c["beta1"], c["beta2"]], eps=c["eps"], weight_decay=c["weight_decay"], bias_correction=True
    )
    optimizer.init({"p": t["p"]})
    optimizer.state["step"] = mx.array(c["step"] - 1, mx.uint64)
    optimizer.state["p"] = {"m": t["m"], "v": t["v"]}
    p = optimizer.apply_gradients({"p": t["g"]}, {"p": t["p"]})["p"]
    return {"p": p, **optimizer.state["p"]}


def clip(t, c):
    clipped, norm = optim.clip_grad_norm(t, c["max_norm"])
    return {"norm": norm, **{f"clipped_{name}": g for name, g in clipped.items()}}


def warmup_cosine(t, c):
    """mlx-lm's, from its configuration."""
    about = {"name": "cosine_decay", "arguments": [1.0, c["total"] - c["warmup"]], "warmup": c["warmup"]}
    schedule = build_schedule(about)
    return {"factor": mx.stack([mx.array(schedule(step)) for step in t["steps"]])}


OPERATIONS = {
    f.__name__: f
    for f in (lora_update, lora_linear, lora_start, lora_embedding, merge, dora_linear, dora_merge, count,
              embedding, layer_norm, rms_norm, gated_mlp, softmax, attention, rotary, cross_attention, cross_entropy,
              model, generate, adamw, clip, warmup_cosine)
}  # fmt: skip
OPERATIONS |= {name: lambda t, c, f=f: {"y": f(t["x"])} for name, f in ACTIVATIONS.items()}
OPERATIONS["linear"] = lambda t, c: {"y": linear_of(t["W"], t.get("b"))(t["x"])}

if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    pulled_back = lambda f, leaves, seeds: mx.vjp(f, leaves, [mx.array(one) for one in seeds])[1]  # noqa: E731
    run(OPERATIONS, Path(sys.argv[1]), Path(sys.argv[2]), array=mx.array, pulled_back=pulled_back)
