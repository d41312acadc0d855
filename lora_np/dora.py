"""DoRA (Liu et al. 2024): LoRA gives each row of a matrix its direction; the row's length is trained beside it.

    L10  W' = (m / c) * (W0 + s B A), row by row: m (out,) is trained, c_o is the norm of row o of W0 + s B A

At the start m = c, so the adapted model is the base. In backward c is a constant (section 4.3 of that paper), as in
PEFT: dm, dA and dB are the derivatives of the forward in which c is given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .backend import Array, xp
from .checks import as_array, expect
from .lora import (
    Update,
    lora_embedding,
    lora_embedding_backward,
    lora_linear,
    lora_linear_backward,
    merged_blocks,
)
from .ops import dropout, dropout_backward, linear, linear_backward
from .storage import Matrix


class DoraSaved(NamedTuple):
    """What the backward of a linear or an embedding needs, where DoRA adapts it."""

    low: Any  # of lora_linear, or of lora_embedding
    z: Array  # (..., out), what W0 + s B A gives
    c: Array  # (out,)
    scale: Array  # (out,), m / c
    dropout_mask: Array | None


def weight_norm(W0: Matrix, A: Array, B: Array, s: float, *, axis: int = 1) -> Array:
    """L10: c, the norm of each row of W0 + s B A, summed in float64. W0 (out, in), A (r, in), B (out, r) -> (out,).

    axis 0: of each column, which is a row of an embedding's matrix: its table is stored (V,D). Of complex numbers, as
    complex steps have them, the real parts alone: c is a constant.
    """
    squares = [(W**2).sum(axis=axis) for _, W in merged_blocks(W0, [Update(A, B, s)])]
    return xp.sqrt(xp.concatenate(squares) if axis == 1 else sum(squares)).astype(A.real.dtype)


def dora_linear(
    x: Array, W0: Matrix, b: Array | None, A: Array, B: Array, s: float, m: Array, *, norm: Array | None = None,
    dropout_mask: Array | None = None,
) -> tuple[Array, DoraSaved]:  # fmt: skip
    """L10: h = (m / c) * (x (W0 + s B A)^T) + b; W0 + s B A is not kept.

    m (out,), the others as in `lora_linear`; norm: c (out,), if it is known. A row of zeros has no direction, and stays
    zero. With a dropout mask d the update acts on d * x, in W0's part too, as in PEFT:
    h = (m / c) * ((d * x) (W0 + s B A)^T) + (x - d * x) W0^T + b.
    -> h (..., out). A TypeError or ValueError says what is no array of floats, or does not fit.
    """
    x, dropped = as_array("dora_linear: x", x), x
    if dropout_mask is not None:
        dropout_mask = as_array("dora_linear: dropout_mask", dropout_mask)
        if dropout_mask.shape != x.shape:
            raise ValueError(f"dora_linear: dropout_mask: expected shape {x.shape}, got {dropout_mask.shape}")
        dropped, _ = dropout(x, dropout_mask)
    z, low = lora_linear(dropped, W0, None, A, B, s)  # (..., in) -> (..., out)
    m, b = _checked("m", m, z), None if b is None else _checked("b", b, z)
    c, scale = _scale(m, weight_norm(low.W0, low.A, low.B, s) if norm is None else _checked("norm", norm, z))
    h = z * scale
    if dropout_mask is not None:
        h += linear(x - dropped, low.W0)
    if b is not None:
        h += b
    return h, DoraSaved(low, z, c, scale, dropout_mask)


def dora_linear_backward(
    dh: Array, saved: DoraSaved, *, need_dx: bool = True
) -> tuple[Array | None, Array, Array, Array]:
    """L10: dm = sum(dh * z) / c over all rows, z = x (W0 + s B A)^T; dA, dB and dx are L4's of (m / c) * dh.

    dh (..., out) -> dx (..., in), dA (r, in), dB (out, r), dm (out,); without need_dx, dx is None and not computed.
    """
    expect("dora_linear_backward: saved", saved, DoraSaved, "what dora_linear gave with h")
    low, z, c, scale, dropout_mask = saved
    dx, dA, dB = lora_linear_backward(dh * scale, low, need_dx=need_dx)
    dm = _summed(dh * z) / c
    if dropout_mask is not None and dx is not None:
        through_W0 = linear_backward(dh, low.W0)
        dx = dropout_backward(dx - through_W0, dropout_mask) + through_W0
    return dx, dA, dB, dm


def dora_embedding(
    tokens: Array, E: Matrix, A: Array, B: Array, s: float, m: Array, norm: Array
) -> tuple[Array, DoraSaved]:
    """L10 on a look-up: h = (m / c) * (E + s (B A)^T)[tokens]. tokens (N,T), E (V,D), m and norm (D,) -> (N,T,D)."""
    z, low = lora_embedding(tokens, E, A, B, s)
    c, scale = _scale(m, norm)
    return z * scale, DoraSaved(low, z, c, scale, None)


def dora_embedding_backward(dh: Array, saved: DoraSaved) -> tuple[Array, Array, Array]:
    """L10 on a look-up: dh (N,T,D) -> dA (r,V), dB (D,r), dm (D,)."""
    dA, dB = lora_embedding_backward(dh * saved.scale, saved.low)
    return dA, dB, _summed(dh * saved.z) / saved.c


def dora_merge_matrix(W0: Matrix, update: Update, *, axis: int = 1) -> Array:
    """L5, L10: W' = round((m / c) * (W0 + s B A)), in float64, rounded once to W0's dtype. axis as in `weight_norm`.

    c is the update's own where it has one, as rows of a table need it. It is not rounded, as m was when it was stored:
    at the start a row of W' may be W0's times 1 + d, |d| <= u.
    """
    A, B, m = (xp.asarray(part).astype(xp.float64) for part in (update.A, update.B, update.m))
    _, scale = _scale(m, weight_norm(W0, A, B, update.s, axis=axis) if update.c is None else update.c)
    W = xp.empty(W0.shape, dtype=W0.dtype)
    for rows, total in merged_blocks(W0, [update]):
        W[rows] = total * (scale[rows, None] if axis == 1 else scale)
    return W


def _summed(x: Array) -> Array:
    """Over all rows: (..., out) -> (out,)."""
    return x.reshape(-1, x.shape[-1]).sum(axis=0)


def _scale(m: Array, c: Array) -> tuple[Array, Array]:
    """c, with 1 in the place of 0, and m / c."""
    c = xp.where(c == 0, xp.ones_like(c), c)
    return c, m / c


def _checked(name: str, a: Array, z: Array) -> Array:
    """A number for each row of W0: (out,), or (N, 1, out) for different ones in each row of the batch."""
    a = as_array(f"dora_linear: {name}", a)
    if a.dtype.kind not in "fc":
        raise TypeError(f"dora_linear: {name}: expected floats, got {a.dtype}")
    if a.shape not in ((z.shape[-1],), (len(z), 1, z.shape[-1])):
        raise ValueError(f"dora_linear: {name}: expected shape ({z.shape[-1]},), got {a.shape}")
    return a
