"""qwix's LoRA on Flax beside the vectors, with Flax's, JAX's and Optax's primitives and optimizer.

python with_qwix.py VECTORS RESULTS

qwix has no rank-stabilised scale and no merge, and draws dropout's mask itself.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import qwix
from flax import linen as nn
from offered import not_stabilised
from on_jax import run


def layer(base, c):
    return qwix.apply_lora_to_model(base, qwix.LoraProvider(module_path=".*", rank=c["r"], alpha=c["alpha"]))


def dense(t):
    return nn.Dense(len(t["W0"]), use_bias="b" in t), {"kernel": t["W0"].T} | ({"bias": t["b"]} if "b" in t else {})


def lora_linear(t, c):
    if "keep" in t:
        return None
    base, params = dense(t)
    params |= {"kernel_lora_a": t["A"].T, "kernel_lora_b": t["B"].T}
    return {"h": layer(base, c).apply({"params": params}, t["x"])}


def lora_start(t, c):
    base, params = dense(t)
    h = lora_linear(t, c)["h"]
    return {"h": h, "difference": h - base.apply({"params": params}, t["x"])}


def count(t, c):
    total = 0
    for matrices, n_out, n_in, r in zip(*(t[name].tolist() for name in ("matrices", "out", "in", "r")), strict=True):
        net = layer(nn.Dense(n_out, use_bias=False), {"r": r, "alpha": 1.0})
        made = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, n_in), "float32"))["params"]
        total += matrices * sum(one.size for name, one in made.items() if "_lora_" in name)
    return {"parameters": jnp.asarray(total)}


# --- The transformer's parts ------------------------------------------------------------------------------------------


def embedding(t, c):
    x = 0
    for name in ("tokens", "positions", "types"):
        if name in t:
            table = nn.Embed(*t[f"{name}_table"].shape)
            found = table.apply({"params": {"embedding": t[f"{name}_table"]}}, t[name])
            x = x + found * (c.get("scale", 1.0) if name == "tokens" else 1.0)
    return {"x": x}


def linear(t, c):
    base, params = dense({"W0": t["W"], **t})
    return {"y": base.apply({"params": params}, t["x"])}


def layer_norm(t, c):
    params = {"scale": t["w"], "bias": t["b"]}
    return {"y": nn.LayerNorm(epsilon=c["eps"]).apply({"params": params}, t["x"])}


def rms_norm(t, c):
    params = {"scale": 1 + t["w"] if c.get("one_plus") else t["w"]}
    return {"y": nn.RMSNorm(epsilon=c["eps"]).apply({"params": params}, t["x"])}


ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False), "gelu_tanh": jax.nn.gelu, "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}  # fmt: skip


def gated_mlp(t, c):
    act = ACTIVATIONS[c.get("activation", "silu")]
    return {"y": (act(t["x"] @ t["W_gate"].T) * (t["x"] @ t["W_up"].T)) @ t["W_down"].T}


def softmax(t, c):
    return {"p": jax.nn.softmax(t["x"], where=t["mask"])}


def attention(t, c):
    T, S = t["q"].shape[2], t["k"].shape[2]
    visible = t["mask"][:, None, None, :] if "mask" in t else jnp.ones((1, 1, 1, S), bool)
    places, keys = jnp.arange(S - T, S)[:, None], jnp.arange(S)
    if c["causal"]:
        visible = visible & (keys <= places)
    if "window" in c:
        visible = visible & (keys > places - c["window"])
    q, k, v = (t[name].swapaxes(1, 2) for name in "qkv")
    visible = jnp.broadcast_to(visible, (len(q), 1, T, S))
    return {"y": jax.nn.dot_product_attention(q, k, v, mask=visible, scale=c.get("scale")).swapaxes(1, 2)}


def cross_attention(t, c):
    (H, D), mask = (c["n_head"], t["x"].shape[-1]), t.get("source_mask")
    order = {"query": "q", "key": "k", "value": "v"}
    params = {name: {"kernel": t[f"W_{one}"].T.reshape(D, H, D // H)} for name, one in order.items()}
    params["out"] = {"kernel": t["W_o"].T.reshape(H, D // H, D)}
    net = nn.MultiHeadDotProductAttention(H, use_bias=False)
    return {"y": net.apply({"params": params}, t["x"], t["X"], mask=None if mask is None else mask[:, None, None, :])}


def cross_entropy(t, c):
    counted = t["targets"] != -100
    each = optax.softmax_cross_entropy_with_integer_labels(t["logits"], jnp.where(counted, t["targets"], 0))
    return {"loss": each.mean(where=counted)}


# --- Training ---------------------------------------------------------------------------------------------------------


def adamw(t, c):
    step = optax.adamw(c["lr"], c["beta1"], c["beta2"], c["eps"], weight_decay=c["weight_decay"])
    first, *rest = step.init(t["p"])
    state = (first._replace(count=jnp.int32(c["step"] - 1), mu=t["m"], nu=t["v"]), *rest)
    change, (moments, *_) = step.update(t["g"], state, t["p"])
    return {"p": optax.apply_updates(t["p"], change), "m": moments.mu, "v": moments.nu}


def clip(t, c):
    step = optax.clip_by_global_norm(c["max_norm"])
    clipped, _ = step.update(t, step.init(t))
    return {"norm": optax.global_norm(t), **{f"clipped_{name}": g for name, g in clipped.items()}}


def warmup_cosine(t, c):
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, c["warmup"], c["total"])
    return {"factor": jnp.stack([schedule(step) for step in t["steps"]])}


OPERATIONS = {
    **{f.__name__: not_stabilised(f) for f in (lora_linear, lora_start)},
    **{f.__name__: f for f in (count, embedding, linear, layer_norm, rms_norm, gated_mlp, softmax, attention,
                               cross_attention, cross_entropy, adamw, clip, warmup_cosine)},
    **{name: lambda t, c, f=f: {"y": f(t["x"])} for name, f in ACTIVATIONS.items()},
}  # fmt: skip

if __name__ == "__main__":
    run(OPERATIONS, Path(sys.argv[1]), Path(sys.argv[2]))
