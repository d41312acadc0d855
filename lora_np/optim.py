"""AdamW, learning rates and clipping (O1 to O3), on flat dicts of arrays; nothing is updated in place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from .backend import Array, xp
from .checks import as_array, expect, few, is_number

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
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[dict[str, Array], AdamWState]:
    """O1: one step of AdamW (Loshchilov and Hutter 2019, algorithm 2), with bias correction and decoupled decay.

        m = b1 m + (1 - b1) g         v = b2 v + (1 - b2) g^2
        p = p - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p)

    params, grads: the same names and shapes. state: None at the start, then what the last step gave. lr: one rate, or
    one by name (`learning_rates`). -> new params and state, of the params' dtypes. A ValueError says what does not fit.
    """
    params, grads = _arrays("adamw: params", params), _arrays("adamw: grads", grads)
    _check_numbers(lr, betas, eps, weight_decay)
    b1, b2 = betas
    rates = lr if isinstance(lr, Mapping) else dict.fromkeys(params, lr)
    if state is None:
        state = AdamWState(
            0,
            {name: xp.zeros_like(p) for name, p in params.items()},
            {name: xp.zeros_like(p) for name, p in params.items()},
        )
    expect("adamw: state", state, AdamWState, "the state that the last step gave, or None")
    for what, found in (("grads", grads), ("state", state.m), ("lr", rates)):
        if found.keys() != params.keys():
            raise ValueError(f"adamw: params and {what} differ in {few(found.keys() ^ params.keys())}")
    t = state.step + 1
    new, m, v = {}, {}, {}
    for name, p in params.items():
        g = grads[name]
        if g.shape != p.shape:
            raise ValueError(f"adamw: {name}: expected a gradient of shape {p.shape}, got {g.shape}")
        rate = float(rates[name])
        m[name] = b1 * state.m[name] + (1 - b1) * g
        v[name] = b2 * state.v[name] + (1 - b2) * (g * g)
        scale = xp.sqrt(v[name]) * (1 / math.sqrt(1 - b2**t)) + eps
        new[name] = p * (1 - rate * weight_decay) - (rate / (1 - b1**t)) * (m[name] / scale)
    return new, AdamWState(t, m, v)


def _arrays(what: str, given: Arrays) -> dict[str, Array]:
    """A dict of arrays; a TypeError says what it is, or which of its values is no array."""
    expect(what, given, Mapping, "a dict of arrays (an adapter's are adapter.params)")
    return {name: as_array(f"{what}: {name}", a) for name, a in given.items()}


def _check_numbers(lr: float | Mapping[str, float], betas: Sequence[float], eps: float, weight_decay: float) -> None:
    """A ValueError unless AdamW's settings are numbers that it is defined for."""
    if not all(is_number(rate) and rate >= 0 for rate in (lr.values() if isinstance(lr, Mapping) else [lr])):
        raise ValueError(f"adamw: lr: expected a number of at least 0, or one for each parameter, got {lr!r}")
    b = list(betas) if isinstance(betas, Iterable) else []
    if not (
        len(b) == 2 and all(map(is_number, (*b, eps, weight_decay)))
        and min(b) >= 0 and max(b) < 1 and eps > 0 and weight_decay >= 0
    ):  # fmt: skip
        raise ValueError(
            f"adamw: expected 0 <= betas < 1, eps > 0, weight_decay >= 0, got {betas}, {eps}, {weight_decay}"
        )


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
    if not (is_number(max_norm) and max_norm > 0):
        raise ValueError(f"clip: expected max_norm above 0, got {max_norm!r}")
    grads = _arrays("clip: grads", grads)
    total = xp.zeros((), dtype=xp.float64)
    for g in grads.values():
        wide = g.astype(xp.float64)
        total = total + (wide * wide).sum()
    norm = xp.sqrt(total)
    scale = max_norm / xp.maximum(norm, max_norm)
    return {name: g * scale.astype(g.dtype) for name, g in grads.items()}, norm
