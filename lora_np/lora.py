"""LoRA of one matrix: forward, backward, start, merge. It knows no model.

Letters as in the paper: W0 (out, in) is frozen; A (r, in) goes down to rank r, B (out, r) goes back up; s scales:

    L1  W = W0 + dW, dW = s B A, with s = alpha / r, or alpha / sqrt(r) when rank-stabilised
    L2  h = x W0^T + b + s ((m * x) A^T) B^T, m the dropout mask of the low-rank branch
    L4  dB = s g^T ((m * x) A^T), dA = s (g B)^T (m * x), dx = g W0 + s m * ((g B) A), with g = dh
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .backend import Array, DType, blocks, xp
from .checks import as_array, expect, is_number
from .ops import (
    dropout,
    dropout_backward,
    embedding,
    embedding_backward,
    linear,
    linear_backward,
    linear_weight_backward,
)
from .storage import Held, Matrix, widened


class LinearSaved(NamedTuple):
    """What the backward of an adapted linear needs."""

    x: Array  # (..., in), the low-rank branch's input: m * x under dropout
    u: Array  # (..., r), s x A^T
    W0: Matrix
    A: Array
    B: Array
    s: float
    dropout_mask: Array | None


def lora_linear(
    x: Array, W0: Matrix, b: Array | None, A: Array, B: Array, s: float, *, dropout_mask: Array | None = None
) -> tuple[Array, LinearSaved]:
    """L2 (paper 4.1, eq. 3): h = x W0^T + b + s ((m * x) A^T) B^T. The product B A is never formed.

    x (..., in), W0 (out, in), b (out,) or None, A (r, in), B (out, r); dropout_mask m like x, 0 or 1 / (1 - p).
    -> h (..., out) of x's dtype. A TypeError or ValueError says what is no array of floats, or does not fit.
    """
    x, W0, b, A, B, dropout_mask = _checked(x, W0, b, A, B, s, dropout_mask)
    h = linear(x, W0, b)
    if dropout_mask is not None:
        x, _ = dropout(x, dropout_mask)
    u = linear(x, A)  # (..., in) -> (..., r)
    u *= s
    h += linear(u, B)  # (..., r) -> (..., out)
    return h, LinearSaved(x, u, W0, A, B, s, dropout_mask)


def lora_linear_backward(dh: Array, saved: LinearSaved, *, need_dx: bool = True) -> tuple[Array | None, Array, Array]:
    """L4: dB = s g^T ((m * x) A^T), dA = s (g B)^T (m * x), dx = g W0 + s m * ((g B) A), with g = dh (..., out).

    dW0 is not formed. -> dx (..., in), dA (r, in), dB (out, r); without need_dx, dx is None and not computed.
    """
    dh, (x, u, W0, A, B, s, dropout_mask) = _checked_gradient(dh, saved), saved
    v = linear_backward(dh, B)  # (..., out) -> (..., r)
    v *= s
    dA, dB = linear_weight_backward(v, x), linear_weight_backward(dh, u)
    if not need_dx:
        return None, dA, dB
    low = linear_backward(v, A)  # (..., r) -> (..., in)
    if dropout_mask is not None:
        low = dropout_backward(low, dropout_mask)
    dx = linear_backward(dh, W0)  # (..., out) -> (..., in)
    dx += low
    return dx, dA, dB


class EmbeddingSaved(NamedTuple):
    """What the backward of an adapted embedding needs."""

    tokens: Array  # (N,T)
    u: Array  # (N,T,r), s A^T[tokens]
    A: Array
    B: Array
    s: float


def lora_embedding(tokens: Array, E: Matrix, A: Array, B: Array, s: float) -> tuple[Array, EmbeddingSaved]:
    """L2 on a look-up (T1): h = E[tokens] + s A^T[tokens] B^T, which looks up E + s (B A)^T.

    tokens (N,T), E (V,D), A (r,V), B (D,r) -> h (N,T,D).
    """
    h = embedding(tokens, E)
    u = embedding(tokens, A.swapaxes(-1, -2)) * s  # (N,T) -> (N,T,r)
    h += linear(u, B)  # (N,T,r) -> (N,T,D)
    return h, EmbeddingSaved(tokens, u, A, B, s)


def lora_embedding_backward(dh: Array, saved: EmbeddingSaved) -> tuple[Array, Array]:
    """L4 on a look-up: dh (N,T,D) -> dA (r,V), dB (D,r)."""
    tokens, u, A, B, s = saved
    v = linear_backward(dh, B)  # (N,T,D) -> (N,T,r)
    v *= s
    return embedding_backward(v, tokens, A.shape[1]).T, linear_weight_backward(dh, u)


class Update(NamedTuple):
    """L1: the update of one matrix, as forward and backward use it: dW = s B A."""

    A: Array  # (r, in), or (N, r, in): one for each row of the batch
    B: Array  # (out, r), or (N, out, r)
    s: float
    dropout: float = 0.0
    stream: str = ""  # names the dropout mask: matrices of one fused update share it
    m: Array | None = None  # (out,), or (N, 1, out): the magnitude of each row of W, where DoRA trains it (L10)
    c: Array | None = None  # likewise: the norm of each row of W0 + s B A


def stack_updates(rows: Sequence[Update | None]) -> Update:
    """L7: one update that holds a different one, or none, for each row of a batch.

    Smaller ranks are filled up with zeros, and s_i goes into B_i; a row without an update gets zeros throughout, so
    that exactly nothing is added to it; one without a magnitude gets ones. -> A (N, r, in), B (N, out, r), r the
    largest rank, s = 1; m and c (N, 1, out), if any row has them.
    """
    some = next(row for row in rows if row is not None)
    r = max(len(row.A) for row in rows if row is not None)
    A = xp.zeros((len(rows), r, some.A.shape[1]), dtype=some.A.dtype)
    B = xp.zeros((len(rows), some.B.shape[0], r), dtype=some.B.dtype)
    m, c = xp.ones((2, len(rows), 1, len(some.B)), dtype=some.B.dtype)
    for n, row in enumerate(rows):
        if row is not None:
            A[n, : len(row.A)] = row.A
            B[n, :, : len(row.A)] = row.B * row.s
            if row.m is not None:
                m[n], c[n] = row.m, row.c
    if all(row is None or row.m is None for row in rows):
        return Update(A, B, 1.0)
    return Update(A, B, 1.0, m=m, c=c)


def init_factors(
    rng: np.random.Generator, n_out: int, n_in: int, r: int, dtype: DType, *, sigma: float | None = None
) -> tuple[Array, Array]:
    """L3 (paper 4.1): B = 0, so that the adapted model starts as the base; A is U(-1/sqrt(in), 1/sqrt(in)), or with
    sigma N(0, sigma^2). -> A (r, in), B (out, r). A ValueError unless r is at most in and out."""
    if r > min(n_out, n_in):
        raise ValueError(f"expected a rank of at most min(in, out) = {min(n_out, n_in)}, got r = {r}")
    if sigma is None:
        A = rng.uniform(-1 / math.sqrt(n_in), 1 / math.sqrt(n_in), (r, n_in))
    else:
        A = rng.normal(0.0, sigma, (r, n_in))
    return xp.asarray(A.astype(dtype)), xp.zeros((n_out, r), dtype=dtype)


def merge_matrix(W0: Matrix, *updates: Update) -> Array:
    """L5 (paper 4.1): W' = round(W0 + sum_i s_i B_i A_i), summed in float64, rounded once to W0's dtype (out, in).

    A W0 that is held in fewer bits gives float32: the sum is not held in them.
    """
    W = xp.empty(W0.shape, dtype=W0.dtype)
    for rows, total in merged_blocks(W0, updates):
        W[rows] = total
    return W


def merged_blocks(W0: Matrix, updates: Sequence[Update]) -> Iterator[tuple[slice, Array]]:
    """L5: W0 + sum_i s_i B_i A_i in float64, a block of rows at a time; of complex numbers the real parts."""
    factors = [(u.A.real.astype(xp.float64, copy=False), u.B.real.astype(xp.float64, copy=False), u.s) for u in updates]
    for rows in blocks(*W0.shape):
        total = W0[rows].real.astype(xp.float64)
        for A, B, s in factors:
            total += (B[rows] @ A) * s  # (rows,r) (r,in) -> (rows,in)
        yield rows, total


def singular_directions(A: Array, B: Array) -> tuple[Array, Array, Array]:
    """U, S, V of B A = U diag(S) V^T, the largest first, from two QR decompositions; B A is not formed.

    A (r, in), B (out, r) -> U (out, k), S (k,), V (in, k), float64; k = r, or less where in or out is.
    """
    Q_B, R_B = xp.linalg.qr(B.astype(xp.float64))  # (out,r) -> (out,k) (k,r)
    Q_A, R_A = xp.linalg.qr(A.T.astype(xp.float64))  # (in,r) -> (in,l) (l,r)
    U, S, Vt = xp.linalg.svd(R_B @ R_A.T, full_matrices=False)  # of a matrix of r x r at the most
    return Q_B @ U, S, Q_A @ Vt.T


def sum_updates(updates: Sequence[Update], *, rank: int | None = None) -> tuple[Update, Array]:
    """L9: sum_i s_i B_i A_i as one update with s = 1; or, truncated to `rank`, the nearest of its rank.

    Nearest in Frobenius norm, by SVD in float64 of the factors: no dW is formed. -> the update, in A's and B's dtype,
    of rank sum r_i or at most `rank`, and all singular values of the sum, or none where it is not truncated.
    """
    A = xp.concatenate([u.A for u in updates])
    B = xp.concatenate([(u.B.astype(xp.float64) * u.s).astype(u.B.dtype) for u in updates], axis=1)
    if rank is None:
        return Update(A, B, 1.0), xp.empty(0)
    U, S, V = singular_directions(A, B)
    found = _split_directions(U, S, V, rank)
    return found._replace(A=found.A.astype(A.dtype), B=found.B.astype(B.dtype)), S


def nearest_update(dW: Array, rank: int) -> tuple[Update, Array]:
    """The update of at most `rank` that is nearest to a matrix dW (out, in) in Frobenius norm (Eckart and Young 1936).

    -> the update, float64, with s = 1, and all singular values of dW: what is lost is norm(S[rank:]).
    """
    U, S, Vt = xp.linalg.svd(dW.astype(xp.float64), full_matrices=False)
    return _split_directions(U, S, Vt.T, rank), S


def _split_directions(U: Array, S: Array, V: Array, rank: int) -> Update:
    """The leading `rank` singular directions, or as many as there are, as B = U sqrt(S) and A = sqrt(S) V^T."""
    root = xp.sqrt(S[:rank])
    return Update((V[:, :rank] * root).T, U[:, :rank] * root, 1.0)


def linear_rounding_bound(x: Array, W0: Matrix, b: Array | None, A: Array, B: Array, s: float, dtype: DType) -> Array:
    """L5: how far the merged and the unmerged output of one linear can lie apart in `dtype`, element by element.

    Let u = eps / 2, g(n) = n u / (1 - n u), eta the smallest subnormal, and let hats be computed values. A rounding
    multiplies by 1 + d, |d| <= u; where a product underflows (a sum never does) it also adds e, |e| <= eta / 2. A sum
    of n terms takes each through at most n - 1 roundings, in any order; a fused multiply-add saves one. Nothing
    overflows, nor does the bound, and (in + r + 4) u <= 1/2.

    Unmerged, h = x W0^T + b + (s x A^T) B^T. A product of x and W0 passes in roundings up to x W0^T, one in + b, one in
    the sum with the low-rank branch: in + 2. A product of the low-rank branch passes in of them in x A^T, one as s
    becomes of `dtype`, one as it multiplies, r in (..) B^T, and that last sum: in + r + 3. b passes two. So with
    M = |x||W0|^T + |s||x||A|^T|B|^T + |b|, and P = |x||A|^T: |h^ - h| <= g(in + r + 3) M + underflow, which is
    eta / 2 times in (from x W0^T), in |s| B1 (from x A^T; B1 is the sum of |B| over r), P |B|^T (from s), B1 (from s
    times x A^T) and r (from its product with B).

    Merged, W^ = round(W0 + s B A). In float64 W0 passes one rounding, a product of B and A r + 2; then each passes
    one more to a narrower dtype, where all of float64's, 2^-53 = u 2^-29 each, come to less than one of u. In
    x W^^T + b each product passes in + 1. Together in + r + 3 at most: |h'^ - h| <= g(in + r + 3) M + underflow,
    eta / 2 times (r |s| + 2) x1 (x1 is the sum of |x|; from B A, from s times it, from the narrower dtype) and in.

    So |h'^ - h^| <= 2 g(in + r + 3) M + the underflows. That these are themselves multiplied by later roundings, by
    (1 + u)^(in + r + 3) < 2 at the most, makes eta / 2 an eta. The bound is evaluated in float64, with float64 copies
    of its arguments, which takes it through in + r + 9 roundings at most; the step from in + r + 3 to in + r + 4 pays
    for them as long as in + r < 10^7. -> (..., out).
    """
    info = np.finfo(dtype)
    n_in, r = W0.shape[1], A.shape[0]
    x, W0, A, B = (xp.abs(a.astype(xp.float64)) for a in (x, widened(W0), A, B))
    n = (n_in + r + 4) * float(info.eps) / 2
    P = x @ A.T  # (..., r)
    size = x @ W0.T + (abs(s) * P) @ B.T  # in the order of the unmerged output, whose underflow is in the bound
    if b is not None:
        size += xp.abs(b.astype(xp.float64))
    underflow = P @ B.T + (1 + n_in * abs(s)) * B.sum(axis=-1) + (2 + r * abs(s)) * x.sum(axis=-1)[..., None]
    underflow += 2 * n_in + r
    return 2 * n / (1 - n) * size + float(info.smallest_subnormal) * underflow


def _checked(
    x: Array, W0: Matrix, b: Array | None, A: Array, B: Array, s: float, dropout_mask: Array | None
) -> tuple[Array, Matrix, Array | None, Array, Array, Array | None]:
    """The arrays of L2; a TypeError unless they are of floats, a ValueError unless their shapes fit together."""
    if not is_number(s):
        raise TypeError(f"lora_linear: s: expected a number, got {type(s).__name__}")
    x, A, B = _floats("x", x), _floats("A", A), _floats("B", B)
    W0 = W0 if isinstance(W0, Held) else _floats("W0", W0)
    b = None if b is None else _floats("b", b)
    dropout_mask = None if dropout_mask is None else _floats("dropout_mask", dropout_mask)
    _check_shapes(x, W0, b, A, B, dropout_mask)
    return x, W0, b, A, B, dropout_mask


def _checked_gradient(dh: Array, saved: LinearSaved) -> Array:
    """dh as an array; a TypeError or ValueError unless it is of h's shape, and saved is what came with h."""
    expect("lora_linear_backward: saved", saved, LinearSaved, "what lora_linear gave with h")
    dh, shape = as_array("lora_linear_backward: dh", dh), (*saved.x.shape[:-1], len(saved.B))
    if dh.shape != shape:
        raise ValueError(f"lora_linear_backward: dh: expected shape {shape}, got {dh.shape}")
    return dh


def _floats(name: str, a: Array) -> Array:
    """An array of floats."""
    a = as_array(f"lora_linear: {name}", a)
    if a.dtype.kind not in "fc":
        raise TypeError(f"lora_linear: {name}: expected floats, got {a.dtype}")
    return a


def _check_shapes(x: Array, W0: Matrix, b: Array | None, A: Array, B: Array, dropout_mask: Array | None) -> None:
    """A ValueError unless the shapes fit together as L2 says."""
    if x.ndim == 0 or (W0.ndim != 2 and A.ndim != 3) or A.ndim != B.ndim:
        raise ValueError(
            f"lora_linear: expected x (..., in), W0 (out, in), A (r, in), B (out, r), got "
            f"x {x.shape}, W0 {W0.shape}, A {A.shape}, B {B.shape}"
        )
    n_out, n_in = W0.shape[-2:]
    r = A.shape[-2]
    wrong = [
        f"{what}: expected {expected}, got {got}"
        for what, expected, got in [
            ("x", f"(..., {n_in})", x.shape if x.shape[-1] != n_in else None),
            ("A", f"(r, {n_in})", A.shape if A.shape[-1] != n_in else None),
            ("B", f"({n_out}, {r})", B.shape if B.shape[-2:] != (n_out, r) else None),
            ("b", f"({n_out},)", b.shape if b is not None and b.shape[-1:] != (n_out,) else None),
            (
                "dropout_mask",
                x.shape,
                dropout_mask.shape if dropout_mask is not None and dropout_mask.shape != x.shape else None,
            ),
        ]
        if got is not None
    ]
    if wrong:
        raise ValueError(f"lora_linear: W0 is ({n_out}, {n_in}); " + "; ".join(wrong))
