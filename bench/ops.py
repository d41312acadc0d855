"""Each primitive, forward and backward, at the sizes of a GPT-2 small layer: 1024 tokens, float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lora_np import lora, ops
from lora_np.backend import Array, xp

M, D, F, H, T, V, R = 1024, 768, 3072, 12, 256, 50257, 8


def cases() -> dict[str, tuple[Callable[[], Any], float]]:
    """Functions to time, and the floating-point operations of the products in each (0: there are none)."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return xp.asarray(rng.standard_normal(shape, dtype=np.float32))

    x, wide, w, b, W = normal(M, D), normal(M, F), normal(D), normal(D), normal(D, D)
    A, B, logits = normal(R, D), normal(D, R), normal(256, V)
    heads = normal(M // T, H, T, D // H)
    targets, ones = xp.asarray(rng.integers(0, V, 256)), xp.ones(256, dtype="float32")
    product, low = 2.0 * M * D * D, 4.0 * M * D * R
    scores = 4.0 * M * T * D
    saved_norm, saved_gelu, saved_tanh = ops.layer_norm(x, w, b, 1e-5)[1], ops.gelu(wide)[1], ops.gelu_tanh(wide)[1]
    saved_lora = lora.lora_linear(x, W, b, A, B, 2.0)[1]
    saved_attention = ops.attention(heads, heads, heads, causal=True)[1]
    saved_loss = ops.cross_entropy(logits, targets)[1]
    return {
        "linear": (lambda: ops.linear(x, W, b), product),
        "linear, backward": (lambda: ops.linear_backward(x, W), product),
        "lora_linear": (lambda: lora.lora_linear(x, W, b, A, B, 2.0), product + low),
        "lora_linear, backward": (lambda: lora.lora_linear_backward(x, saved_lora), product + 2 * low),
        "layer_norm": (lambda: ops.layer_norm(x, w, b, 1e-5), 0),
        "layer_norm, backward": (lambda: ops.layer_norm_backward(x, saved_norm), 0),
        "gelu": (lambda: ops.gelu(wide), 0),
        "gelu, backward": (lambda: ops.activation_backward(wide, saved_gelu), 0),
        "gelu_tanh": (lambda: ops.gelu_tanh(wide), 0),
        "gelu_tanh, backward": (lambda: ops.activation_backward(wide, saved_tanh), 0),
        "silu": (lambda: ops.silu(wide), 0),
        "attention": (lambda: ops.attention(heads, heads, heads, causal=True), scores),
        "attention, backward": (lambda: ops.attention_backward(heads, saved_attention), 2 * scores),
        "cross_entropy": (lambda: ops.cross_entropy(logits, targets), 0),
        "cross_entropy, backward": (lambda: ops.cross_entropy_backward(ones, saved_loss), 0),
    }
