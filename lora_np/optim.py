"""AdamW, learning rates and clipping (O1 to O3), on flat dicts of arrays; nothing is updated in place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from .backend import Array, xp

Arrays: TypeAlias = Mapping[str, Array]


class AdamWState(NamedTuple):
    """Steps taken, and the running means of the gradient and of its square, by parameter."""

    step: int
    m: dict[str, Array]
    v: dict[str, Array]

    def __repr__(self) -> str:
        return f"AdamWState(step {self.step}, {sum(m.size for m in self.m.values()):,} parameters)"


def adamw(
    params: Arrays,
    grads: Arrays,
    state: AdamWState | None,
    *,
    lr: float | Mapping[str, float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[dict[str, Array], AdamWState]:
    """O1: one step of AdamW (Loshchilov and Hutter 2019, algorithm 2), with bias correction and decoupled decay.

        m = b1 m + (1 - b1) g         v = b2 v + (1 - b2) g^2
        p = p - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p)

    params, grads: the same names and shapes. state: None at the start, then what the last step gave. lr: one rate, or
    one by name (`learning_rates`). -> new params and state, of the params' dtypes. A ValueError says what does not fit.
    """
    if params.keys() != grads.keys():
        raise ValueError(f"adamw: parameters and gradients differ in {sorted(params.keys() ^ grads.keys())}")
    b1, b2 = betas
    if not (0 <= b1 < 1 and 0 <= b2 < 1 and eps > 0 and weight_decay >= 0):
        raise ValueError(
            f"adamw: expected 0 <= betas < 1, eps > 0, weight_decay >= 0, got {betas}, {eps}, {weight_decay}"
        )
    if state is None:
        state = AdamWState(
            0,
            {name: xp.zeros_like(p) for name, p in params.items()},
            {name: xp.zeros_like(p) for name, p in params.items()},
        )
    t = state.step + 1
    new, m, v = {}, {}, {}
    for name, p in params.items():
        g = grads[name]
        if g.shape != p.shape:
            raise ValueError(f"adamw: {name}: expected a gradient of shape {p.shape}, got {g.shape}")
        rate = lr if isinstance(lr, (int, float)) else lr[name]
        m[name] = b1 * state.m[name] + (1 - b1) * g
        v[name] = b2 * state.v[name] + (1 - b2) * (g * g)
        scale = xp.sqrt(v[name]) * (1 / math.sqrt(1 - b2**t)) + eps
        new[name] = p * (1 - rate * weight_decay) - (rate / (1 - b1**t)) * (m[name] / scale)
    return new, AdamWState(t, m, v)


def learning_rates(params: Arrays, lr: float, *, b_ratio: float = 1.0) -> dict[str, float]:
    """O1: the rate of each parameter: lr; b_ratio times it for B (LoRA+, Hayou et al. 2024: about 16)."""
    return {name: lr * (b_ratio if name.endswith(".B") else 1.0) for name in params}


def warmup_cosine(step: int, *, warmup: int, total: int) -> float:
    """O2: the factor on the learning rate at `step` (from 0): up in a line to 1, then down half a cosine to 0."""
    if not 0 <= warmup <= total:
        raise ValueError(f"warmup_cosine: expected 0 <= warmup <= total, got {warmup} and {total}")
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def clip(grads: Arrays, max_norm: float) -> tuple[dict[str, Array], Array]:
    """O3: gradients scaled down together so that their joint 2-norm is at most max_norm.

    -> gradients, and the norm that they had (a 0-d float64 array, on the device).
    """
    if not max_norm > 0:
        raise ValueError(f"clip: expected max_norm above 0, got {max_norm}")
    total = xp.zeros((), dtype=xp.float64)
    for g in grads.values():
        wide = g.astype(xp.float64)
        total = total + (wide * wide).sum()
    norm = xp.sqrt(total)
    scale = max_norm / xp.maximum(norm, max_norm)
    return {name: g * scale.astype(g.dtype) for name, g in grads.items()}, norm
