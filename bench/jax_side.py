"""The same step in JAX: written plainly in jax.numpy, differentiated by JAX and compiled by XLA.

Decoders that norm first, learned or rotary positions: GPT-2 and Llama. Weights and factors have our names.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

import lora_np as ln
from lora_np.backend import asnumpy

from .models import work
from .timing import Cases

JaxArrays: TypeAlias = Mapping[str, Any]
ACTIVATIONS = {"gelu_tanh": jax.nn.gelu, "silu_gated": jax.nn.silu}


def loss(params: JaxArrays, weights: JaxArrays, config: ln.Config, s: float, tokens: Any, targets: Any) -> Any:
    """The mean cross-entropy of tokens (N,T) against targets (N,T); s = alpha / r."""

    def project(name: str, x: Any) -> Any:
        """x (N,T,in) -> (N,T,out)."""
        h = x @ weights[f"{name}.weight"].T
        if config.bias:
            h += weights[f"{name}.bias"]
        if f"{name}.A" in params:
            h += s * (x @ params[f"{name}.A"].T) @ params[f"{name}.B"].T
        return h

    def norm(name: str, x: Any) -> Any:
        if config.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        y = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + config.eps) * weights[f"{name}.weight"]
        return y + weights[f"{name}.bias"] if config.norm == "layer" else y

    def heads(x: Any) -> Any:
        """(N,T,H*K) -> (N,H,T,K)."""
        return x.reshape(*x.shape[:2], -1, config.head_width).swapaxes(1, 2)

    def attend(name: str, x: Any) -> Any:
        q, k, v = (heads(project(f"{name}.{part}", x)) for part in "qkv")
        if config.positions == "rotary":
            q, k = (rotate(y, config.rope_theta) for y in (q, k))
        k, v = (jnp.repeat(y, config.n_head // config.kv_heads, axis=1) for y in (k, v))  # (N,G,T,K) -> (N,H,T,K)
        scores = q @ k.swapaxes(2, 3) * config.scale  # (N,H,T,T)
        seen = jnp.tril(jnp.ones(scores.shape[2:], dtype=bool))
        y = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)) @ v
        return project(f"{name}.o", y.swapaxes(1, 2).reshape(*x.shape[:2], -1))  # (N,H,T,K) -> (N,T,H*K) -> (N,T,D)

    def feed_forward(name: str, x: Any) -> Any:
        activation, up = ACTIVATIONS[config.activation], project(f"{name}.up", x)
        act = activation(project(f"{name}.gate", x)) * up if config.gated else activation(up)
        return project(f"{name}.down", act)

    x = weights["embed.tokens"][tokens]  # (N,T) -> (N,T,D)
    if config.positions == "learned":
        x += weights["embed.positions"][: tokens.shape[1]]
    for i in range(config.n_layer):
        x += attend(f"layers.{i}.attn", norm(f"layers.{i}.norm1", x))
        x += feed_forward(f"layers.{i}.mlp", norm(f"layers.{i}.norm2", x))
    logits = norm("norm", x) @ weights[config.head_weight].T  # (N,T,D) -> (N,T,V)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1).mean()


def rotate(x: Any, theta: float) -> Any:
    """Turns the pairs (x_i, x_{i + K/2}) of x (N,H,T,K) by t / theta^(2i/K)."""
    T, K = x.shape[2:]
    angles = jnp.arange(T)[:, None] * theta ** (jnp.arange(K // 2) * (-2.0 / K))  # (T,K/2)
    cos, sin, (x1, x2) = jnp.cos(angles), jnp.sin(angles), jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def adamw(params: Any, grads: Any, state: Any, lr: float = 1e-4) -> tuple[Any, Any]:
    """AdamW without decay; state: the step t, and both moments."""
    t, m, v = state
    t = t + 1
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, grads)
    rate = lr / (1 - 0.9**t)
    step = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8), params, m, v)
    return step, (t, m, v)


def step(name: str, *, optimizer: bool = False, **sizes: Any) -> Cases:
    """A LoRA step, which gives its loss, and the seconds that compiling it took; optimizer: and AdamW's step."""
    w = work(name, **sizes)
    model = w.model()
    params, weights = (
        {key: jnp.asarray(asnumpy(value)) for key, value in arrays.items()}
        for arrays in (w.adapter(model).params, model.weights)
    )
    del model  # memory is measured here
    zeros = jax.tree.map(jnp.zeros_like, params)
    trained = [params, (0, zeros, zeros)]
    fixed = [weights, *(jnp.asarray(asnumpy(a)) for a in w.batch())]

    def found_and_trained(params: Any, state: Any, weights: Any, tokens: Any, targets: Any) -> tuple[Any, Any]:
        found, grads = jax.value_and_grad(loss)(params, weights, w.config, w.lora.alpha / w.lora.r, tokens, targets)
        return found, adamw(params, grads, state) if optimizer else grads

    start = time.perf_counter()
    compiled = jax.jit(found_and_trained).lower(*trained, *fixed).compile()
    seconds = time.perf_counter() - start

    def run() -> float:
        found, result = jax.block_until_ready(compiled(*trained, *fixed))
        if optimizer:
            trained[:] = result
        return float(found)

    return {"step": run, "compile": lambda: seconds}
