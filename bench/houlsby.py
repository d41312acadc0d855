"""Adapter layers (Houlsby et al. 2019), the sequential baseline that LoRA's latency is held against.

After each half of each layer, before it joins the residual stream: y = x + W_up gelu(W_down x + b_down) + b_up. The
base is a pre-norm model and stays frozen. Letters as in `lora_np.transformer`; m the bottleneck's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from lora_np.backend import Array, xp
from lora_np.batch import check_inputs
from lora_np.binding import AdaptedModel, bind
from lora_np.layout import Layout
from lora_np.loss import layouts
from lora_np.model import Model
from lora_np.ops import activation_backward, bias_backward, gelu_tanh, linear, linear_backward, linear_weight_backward
from lora_np.transformer import attend, attend_backward, embed, feed_forward, feed_forward_backward, norm, norm_backward

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


def half_block(base: AdaptedModel, at: Layout, params: Bottlenecks, depth: int, x: Array) -> tuple[Array, Saved]:
    """x + bottleneck(f(norm(x))), f attention at even depths, the feed-forward half at odd ones. (N,T,D) -> (N,T,D)."""
    (i, second), saved = divmod(depth, 2), Saved()
    h = norm(base, f"layers.{i}.norm{second + 1}", x, saved)
    y = feed_forward(base, i, h, at, saved) if second else attend(base, i, "attn", h, at, h, at, saved)
    y, saved["bottleneck"] = bottleneck(y, params, depth)
    y += x
    return y, saved


def half_block_backward(
    base: AdaptedModel, at: Layout, params: Bottlenecks, depth: int, dy: Array, saved: Saved, grads: dict[str, Array]
) -> Array:
    """dy (N,T,D) -> dx (N,T,D)."""
    i, second = divmod(depth, 2)
    d = bottleneck_backward(dy, params, depth, saved["bottleneck"], grads)
    if depth == 0:
        return d
    if second:
        parts = [feed_forward_backward(base, i, d, saved, {})]
    else:
        parts = attend_backward(base, i, "attn", d, at, at, saved, {})
    dh = sum(part for part in parts if part is not None)
    return dy + norm_backward(base, f"layers.{i}.norm{second + 1}", dh, saved, {})  # type: ignore[arg-type]


def states(model: Model, params: Bottlenecks, tokens: Array, *, keep: bool) -> tuple[Array, Layout, list[Saved]]:
    """The states after the last norm, their layout, and with `keep` what backward needs. tokens (N,T) -> (N,T,D)."""
    batch, base = check_inputs(model.config, tokens, None, None), _base(model)
    at, _ = layouts(base, batch)
    x, _ = embed(base, batch, at)
    stack = []
    for depth in range(2 * model.config.n_layer):
        x, saved = half_block(base, at, params, depth, x)
        stack.append(saved if keep else {})
    stack.append({})
    return norm(base, "norm", x, stack[-1]), at, stack


def states_backward(model: Model, at: Layout, params: Bottlenecks, dy: Array, stack: list[Saved]) -> dict[str, Array]:
    """dy (N,T,D) -> the gradients of every bottleneck."""
    base, grads = _base(model), dict[str, Array]()
    d = norm_backward(base, "norm", dy, stack.pop(), {})
    for depth in reversed(range(len(stack))):
        d = half_block_backward(base, at, params, depth, d, stack.pop(), grads)
    return grads


def _base(model: Model) -> AdaptedModel:
    """The frozen base; as if its table were trained, so that each projection hands dx down to the bottlenecks below."""
    return replace(bind(model, None, rows=1), trained=frozenset({"embed.tokens"}))


def forward(model: Model, params: Bottlenecks, tokens: Array) -> Array:
    """The states of a batch, for a clock. tokens (N,T) -> (N,T,D)."""
    return states(model, params, tokens, keep=False)[0]
