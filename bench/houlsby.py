"""Adapter layers (Houlsby et al. 2019), the sequential baseline that LoRA's latency is held against.

After each half of each layer, before it joins the residual stream: y = x + W_up gelu(W_down x + b_down) + b_up. The
base is a pre-norm model and stays frozen. Letters as in `lora_np.transformer`; m the bottleneck's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from lora_np.backend import Array, xp
from lora_np.batch import check_inputs
from lora_np.binding import Run, bind
from lora_np.model import Model
from lora_np.ops import activation_backward, bias_backward, gelu_tanh, linear, linear_backward, linear_weight_backward
from lora_np.transformer import (
    attend,
    attend_backward,
    embed,
    feed_forward,
    feed_forward_backward,
    norm,
    norm_backward,
    place,
)

# By depth: 0.down (m,D), 0.down.bias (m,), 0.up (D,m), 0.up.bias (D,), 1.down, ...
Bottlenecks: TypeAlias = Mapping[str, Array]
Saved: TypeAlias = dict[str, Any]


def init_bottlenecks(model: Model, m: int, *, seed: int) -> dict[str, Array]:
    """Two a layer, N(0, 0.02) and biases of zero, so that the model starts near the base."""
    D, rng = model.config.d_model, np.random.default_rng(seed)
    if not model.config.norm_first:
        raise ValueError("adapter layers: expected a pre-norm model")
    params: dict[str, np.ndarray] = {}
    for depth in range(2 * model.config.n_layer):
        params |= {f"{depth}.down": rng.normal(0, 0.02, (m, D)), f"{depth}.down.bias": np.zeros(m)}
        params |= {f"{depth}.up": rng.normal(0, 0.02, (D, m)), f"{depth}.up.bias": np.zeros(D)}
    return {name: xp.asarray(value.astype(model.dtype)) for name, value in params.items()}


def bottleneck(x: Array, params: Bottlenecks, depth: int) -> tuple[Array, Saved]:
    """x + W_up gelu(W_down x + b_down) + b_up. x (N,T,D) -> (N,T,D)."""
    h = linear(x, params[f"{depth}.down"], params[f"{depth}.down.bias"])  # (N,T,D) -> (N,T,m)
    h, dhdx = gelu_tanh(h)
    y = linear(h, params[f"{depth}.up"], params[f"{depth}.up.bias"])  # (N,T,m) -> (N,T,D)
    y += x
    return y, {"x": x, "h": h, "activation": dhdx}


def bottleneck_backward(dy: Array, params: Bottlenecks, depth: int, saved: Saved, grads: dict[str, Array]) -> Array:
    """dy (N,T,D) -> dx (N,T,D); the gradients of the bottleneck, into grads."""
    grads[f"{depth}.up"], grads[f"{depth}.up.bias"] = linear_weight_backward(dy, saved["h"]), bias_backward(dy)
    dh = activation_backward(linear_backward(dy, params[f"{depth}.up"]), saved["activation"])
    grads[f"{depth}.down"], grads[f"{depth}.down.bias"] = linear_weight_backward(dh, saved["x"]), bias_backward(dh)
    return dy + linear_backward(dh, params[f"{depth}.down"])


def half_block(run: Run, params: Bottlenecks, depth: int, x: Array) -> tuple[Array, Saved]:
    """x + bottleneck(f(norm(x))), f attention at even depths, the feed-forward half at odd ones. (N,T,D) -> (N,T,D)."""
    i, second = divmod(depth, 2)
    name, f = (f"layers.{i}.norm2", feed_forward) if second else (f"layers.{i}.norm1", attend)
    saved: Saved = {}
    h, saved["norm"] = norm(run, name, x)
    y, saved["f"] = f(run, i, h)
    y, saved["bottleneck"] = bottleneck(y, params, depth)
    y += x
    return y, saved


def half_block_backward(
    run: Run, params: Bottlenecks, depth: int, dy: Array, saved: Saved, grads: dict[str, Array]
) -> Array | None:
    """dy (N,T,D) -> dx (N,T,D), or None below which nothing is trained."""
    i, second = divmod(depth, 2)
    name, f_backward = (
        (f"layers.{i}.norm2", feed_forward_backward) if second else (f"layers.{i}.norm1", attend_backward)
    )
    d = bottleneck_backward(dy, params, depth, saved["bottleneck"], grads)
    if depth == 0:
        return None
    dh = f_backward(run, i, d, saved["f"], {}, need_dx=True)
    assert dh is not None
    return dy + norm_backward(run, name, dh, saved["norm"], {})


def states(model: Model, params: Bottlenecks, tokens: Array, *, keep: bool) -> tuple[Array, Run, list[Saved]]:
    """The states after the last norm, the run, and with `keep` what backward needs. tokens (N,T) -> (N,T,D)."""
    batch = check_inputs(model.config, tokens, None, None)
    run = place(bind(model, None, rows=len(batch.tokens)), batch)
    x, _ = embed(run, xp.asarray(batch.tokens), None)
    stack = []
    for depth in range(2 * model.config.n_layer):
        x, saved = half_block(run, params, depth, x)
        stack.append(saved if keep else {})
    x, saved = norm(run, "norm", x)
    return x, run, [*stack, {"norm": saved}]


def states_backward(run: Run, params: Bottlenecks, dy: Array, stack: list[Saved]) -> dict[str, Array]:
    """dy (N,T,D) -> the gradients of every bottleneck."""
    grads: dict[str, Array] = {}
    d: Array | None = norm_backward(run, "norm", dy, stack.pop()["norm"], {})
    for depth in reversed(range(len(stack))):
        assert d is not None
        d = half_block_backward(run, params, depth, d, stack.pop(), grads)
    return grads


def forward(model: Model, params: Bottlenecks, tokens: Array) -> Array:
    """The states of a batch, for a clock. tokens (N,T) -> (N,T,D)."""
    return states(model, params, tokens, keep=False)[0]
