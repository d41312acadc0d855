"""Keras beside the vectors, on JAX: layers with enable_lora, its own primitives and optimizer.

python with_keras.py VECTORS RESULTS

It has no rank-stabilised scale and no dropout in the branch; it forms B A in every forward.
"""

import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import jax.numpy as jnp
import keras
from keras import ops
from offered import not_stabilised
from on_jax import run


def weights_of(layer, values, trainable):
    """Values in the order of the layer's variables, by name."""
    return [values[one.name] for one in (layer.trainable_variables if trainable else layer.non_trainable_variables)]


def stateless(layer, values, *inputs):
    """What a layer gives with these values of its variables."""
    return layer.stateless_call(weights_of(layer, values, True), weights_of(layer, values, False), *inputs)[0]


def dense(t, c=None, dtype="float32"):
    """A layer, adapted if scalars are given, and its variables' values."""
    W = t["W0"]
    layer = keras.layers.Dense(len(W), use_bias="b" in t, dtype=dtype)
    layer.build((None, W.shape[1]))
    if c:
        layer.enable_lora(c["r"], lora_alpha=c["alpha"])
    values = {"kernel": W.T, "bias": t.get("b")}
    return layer, values | ({"lora_kernel_a": t["A"].T, "lora_kernel_b": t["B"].T} if c else {})


def set_to(layer, values):
    for one in layer.variables:
        one.assign(values[one.name])
    return layer


def lora_update(t, c):
    layer = set_to(*dense({"W0": jnp.zeros((len(t["B"]), t["A"].shape[1])), **t}, c))
    return {"dW": layer.kernel.T, "s": jnp.float32(layer.lora_alpha / layer.lora_rank)}


def lora_linear(t, c):
    if "keep" in t:
        return None
    layer, values = dense(t, c)
    return {"h": stateless(layer, values, t["x"])}


def lora_start(t, c):
    h = lora_linear(t, c)["h"]
    layer, values = dense(t)
    return {"h": h, "difference": h - stateless(layer, values, t["x"])}


def lora_embedding(t, c):
    layer = keras.layers.Embedding(*t["E"].shape)
    layer.build()
    layer.enable_lora(c["r"], lora_alpha=c["alpha"])
    values = {"embeddings": t["E"], "lora_embeddings_a": t["A"].T, "lora_embeddings_b": t["B"].T}
    return {"h": stateless(layer, values, t["tokens"])}


def merge(t, c):
    layer = set_to(*dense(t, c, c["dtype"]))
    W = layer.kernel.T.astype("float32")  # what is saved
    plain, values = dense({**t, "W0": W})
    return {"W": W, "h": stateless(plain, values, t["x"])}


# --- The transformer's parts ------------------------------------------------------------------------------------------


def embedding(t, c):
    x = 0
    for name in ("tokens", "positions", "types"):
        if name in t:
            layer = keras.layers.Embedding(*t[f"{name}_table"].shape)
            layer.build()
            found = stateless(layer, {"embeddings": t[f"{name}_table"]}, t[name])
            x = x + found * (c.get("scale", 1.0) if name == "tokens" else 1.0)
    return {"x": x}


def linear(t, c):
    layer, values = dense({"W0": t["W"], **t})
    return {"y": stateless(layer, values, t["x"])}


def layer_norm(t, c):
    layer = keras.layers.LayerNormalization(epsilon=c["eps"])
    layer.build(t["x"].shape)
    return {"y": stateless(layer, {"gamma": t["w"], "beta": t["b"]}, t["x"])}


def rms_norm(t, c):
    layer = keras.layers.RMSNormalization(epsilon=c["eps"])
    layer.build(t["x"].shape)
    return {"y": stateless(layer, {"scale": 1 + t["w"] if c.get("one_plus") else t["w"]}, t["x"])}


ACTIVATIONS = {
    "gelu": lambda x: ops.gelu(x, approximate=False), "gelu_tanh": ops.gelu, "silu": ops.silu, "relu": ops.relu
}  # fmt: skip


def gated_mlp(t, c):
    act = ACTIVATIONS[c.get("activation", "silu")]
    return {"y": ops.matmul(act(ops.matmul(t["x"], t["W_gate"].T)) * ops.matmul(t["x"], t["W_up"].T), t["W_down"].T)}


def softmax(t, c):
    return {"p": keras.layers.Softmax()(t["x"], mask=t["mask"])}


def attention(t, c):
    if t["q"].shape[1] != t["k"].shape[1]:
        return None
    T, S = t["q"].shape[2], t["k"].shape[2]
    visible = t["mask"][:, None, None, :] if "mask" in t else jnp.ones((1, 1, 1, S), bool)
    places, keys = jnp.arange(S - T, S)[:, None], jnp.arange(S)
    if c["causal"]:
        visible = visible & (keys <= places)
    if "window" in c:
        visible = visible & (keys > places - c["window"])
    q, k, v = (t[name].swapaxes(1, 2) for name in "qkv")
    y = ops.dot_product_attention(q, k, v, mask=jnp.broadcast_to(visible, (len(q), 1, T, S)), scale=c.get("scale"))
    return {"y": y.swapaxes(1, 2)}


def cross_attention(t, c):
    H, D = c["n_head"], t["x"].shape[-1]
    layer = keras.layers.MultiHeadAttention(H, D // H, use_bias=False)
    layer.build(t["x"].shape, t["X"].shape)
    q, k, v = (t[f"W_{one}"].T.reshape(D, H, D // H) for one in "qkv")
    order = {"query": q, "key": k, "value": v, "attention_output": t["W_o"].T.reshape(H, D // H, D)}
    values = [order[one.path.split("/")[-2]] for one in layer.trainable_variables]
    state = layer.non_trainable_variables
    mask = {"attention_mask": t["source_mask"][:, None, :]} if "source_mask" in t else {}
    return {"y": layer.stateless_call(values, state, t["x"], t["X"], **mask)[0]}


def cross_entropy(t, c):
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=-100, reduction="sum_over_batch_size"
    )
    return {"loss": loss(t["targets"], t["logits"])}


# --- Training ---------------------------------------------------------------------------------------------------------


def adamw(t, c):
    p = keras.Variable(t["p"])
    optimizer = keras.optimizers.AdamW(
        c["lr"], beta_1=c["beta1"], beta_2=c["beta2"], epsilon=c["eps"], weight_decay=c["weight_decay"]
    )
    optimizer.build([p])
    by_name = {one.path.split("_")[-1]: one for one in optimizer.variables}
    optimizer.iterations.assign(c["step"] - 1)
    m, v = by_name["momentum"], by_name["velocity"]
    m.assign(t["m"])
    v.assign(t["v"])
    optimizer.apply([t["g"]], [p])
    return {"p": p.value, "m": m.value, "v": v.value}


def clip(t, c):
    """By a step of rate 1 from zero: the norm itself it does not give."""
    at = [keras.Variable(jnp.zeros_like(g)) for g in t.values()]
    keras.optimizers.SGD(1.0, global_clipnorm=c["max_norm"]).apply(list(t.values()), at)
    return {f"clipped_{name}": -one.value for name, one in zip(t, at, strict=True)}


def warmup_cosine(t, c):
    if c["warmup"] == 0:
        schedule = keras.optimizers.schedules.CosineDecay(1.0, c["total"])
    else:
        schedule = keras.optimizers.schedules.CosineDecay(
            0.0, c["total"] - c["warmup"], warmup_target=1.0, warmup_steps=c["warmup"]
        )
    return {"factor": jnp.stack([schedule(step) for step in t["steps"]])}


OPERATIONS = {
    **{f.__name__: not_stabilised(f) for f in (lora_update, lora_linear, lora_start, lora_embedding, merge)},
    **{f.__name__: f for f in (embedding, linear, layer_norm, rms_norm, gated_mlp, softmax, attention, cross_attention,
                               cross_entropy, adamw, clip, warmup_cosine)},
    **{name: lambda t, c, f=f: {"y": f(t["x"])} for name, f in ACTIVATIONS.items()},
}  # fmt: skip

if __name__ == "__main__":
    run(OPERATIONS, Path(sys.argv[1]), Path(sys.argv[2]))
