"""Every differentiable primitive of a transformer, its backward directly beneath it.

    y, saved = op(x, ...)            the forward gives its result and what its backward needs
    dx = op_backward(dy, saved)      the backward takes exactly that; dy has y's shape, dx has x's

dy is the gradient of the loss by y. Nothing is kept anywhere else, so one operation may run in many threads at once.
A product is linear in each factor: its "saved" is the factors themselves, which the caller has. A weight's gradient
has a function of its own, so that the gradient of a frozen weight is never formed.

Arrays are float32 or float64. Complex ones work too: every forward is analytic, which is what the complex-step
derivative of `gradcheck` needs; hence `.real` before a comparison. `...` in a shape is any number of leading axes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from .backend import FEW_ROWS, Array, DType, backend_name, blocks, xp
from .distance import PositionBias
from .storage import Held, Matrix, wide_blocks
from .threads import for_each, map_parts, pieces

Saved: TypeAlias = tuple[Array, ...]


def _rows(x: Array) -> Array:
    """x as a matrix of its last axis: (..., D) -> (M,D)."""
    return x.reshape(-1, x.shape[-1])


def _like(x: Array) -> Array:
    """Room for a result of x's shape and dtype: contiguous, however x lies in memory."""
    return xp.empty(x.shape, dtype=x.dtype)


def _in_blocks(*arrays: Array) -> Iterator[Saved]:
    """The same rows of arrays (..., D), a block that stays in cache at a time: views (m, D) to read and to fill.

    What is filled must be contiguous, as `_like` gives it: of another array `_rows` may be a copy.
    """
    matrices = [_rows(a) for a in arrays]
    for part in blocks(*matrices[0].shape):
        yield tuple(a[part] for a in matrices)


# --- T2: linear --------------------------------------------------------------------------------------------------
#
# A frozen matrix may be held in fewer bits (`storage`). It is widened a block at a time, where it is used.


def linear(x: Array, W: Matrix, b: Array | None = None) -> Array:
    """T2: y = x W^T + b. x (..., in), W (out, in), b (out,) or None -> y (..., out).

    W (N, out, in), with b (N, 1, out), holds a matrix for each row of the batch: x (N,T,in) -> y (N,T,out).
    """
    if not isinstance(W, Held) and W.ndim == 3:
        y = x @ W.swapaxes(-1, -2)  # (N,T,in) -> (N,T,out)
    else:
        # One product for all rows: a batched one would go through memory once for each.
        y = _times_transposed(_rows(x), W)  # (..., in) -> (M,in) -> (M,out)
        y = y.reshape(*x.shape[:-1], len(W))  # (M,out) -> (..., out)
    if b is not None:
        y += b
    return y


def _times_transposed(x: Array, W: Matrix) -> Array:
    """x W^T. x (M,in), W (out,in) -> (M,out)."""
    if isinstance(W, Held):
        y = xp.empty((len(x), len(W)), dtype=x.dtype)

        @for_each(zip(wide_blocks(W, len(x))))
        def _(rows: slice) -> None:
            y[:, rows] = _times_transposed(x, W[rows])

        return y
    if len(x) > FEW_ROWS:
        return _product(x, W.T)
    return xp.ascontiguousarray(_product(W, x.T).T)  # BLAS goes through W faster as the left factor


def _product(x: Array, y: Array) -> Array:
    """x y, in pieces. x (M,K), y (K,N) -> (M,N)."""
    (M, K), N = x.shape, y.shape[1]
    z = xp.empty((M, N), dtype=xp.result_type(x, y))

    @for_each(pieces(M, N, K))
    def _(rows: slice, columns: slice) -> None:
        xp.matmul(x[rows], y[:, columns], out=z[rows, columns])

    return z


def linear_backward(dy: Array, W: Matrix) -> Array:
    """T2: dx = dy W. dy (..., out), W (out, in) -> dx (..., in)."""
    return _times(_rows(dy), W).reshape(*dy.shape[:-1], W.shape[1])


def _times(dy: Array, W: Matrix) -> Array:
    """dy W. dy (M,out), W (out,in) -> (M,in)."""
    if not isinstance(W, Held):
        return _product(dy, W)
    dx = xp.zeros((len(dy), W.shape[1]), dtype=dy.dtype)
    for part in map_parts(lambda rows: _product(dy[:, rows], W[rows]), wide_blocks(W, len(dy))):
        dx += part
    return dx


def linear_weight_backward(dy: Array, x: Array) -> Array:
    """T2: dW = dy^T x, summed over all rows. dy (..., out), x (..., in) -> dW (out, in)."""
    return _product(_rows(dy).T, _rows(x))


def bias_backward(dy: Array) -> Array:
    """T2, T3: db is dy summed over all rows. dy (..., D) -> db (D,)."""
    return _rows(dy).sum(axis=0)


# --- T1: embedding -----------------------------------------------------------------------------------------------


def embedding(tokens: Array, E: Matrix) -> Array:
    """T1: row tokens[...] of the table. tokens (...) integers, E (V,D) -> (..., D).

    E (N,V,D) holds a table for each row of the batch: tokens (N,T) -> (N,T,D).
    """
    if isinstance(E, Held) or E.ndim == 2:
        return E[tokens]
    return xp.take_along_axis(E, tokens[..., None], axis=1)  # (N,V,D) -> (N,T,D)


def embedding_backward(dy: Array, tokens: Array, n: int) -> Array:
    """T1: dE sums dy over the places where each token stands. dy (..., D), tokens (...), n = V -> dE (V,D)."""
    dE = xp.zeros((n, dy.shape[-1]), dtype=dy.dtype)
    xp.add.at(dE, tokens.ravel(), _rows(dy))
    return dE


# --- Rows picked from a batch: the targets that count, or the token that a classifier reads -------------------------


def pick(x: Array, index: Array) -> Array:
    """T14, T15: rows of x, the first axes taken as one. x (N,T,D), index (M,) in 0..N*T-1 -> (M,D)."""
    return _rows(x)[index]


def pick_backward(dy: Array, index: Array, shape: tuple[int, ...]) -> Array:
    """T14, T15: zero but at the rows picked, each picked once. dy (M,D), index (M,), shape of x -> dx of that shape."""
    dx = xp.zeros(shape, dtype=dy.dtype)
    _rows(dx)[index] = dy
    return dx


# --- T3, T4: norms -----------------------------------------------------------------------------------------------


def layer_norm(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Saved]:
    """T3: y = w * xhat + b, xhat = (x - mean) / sqrt(var + eps), over the last axis.

    x (..., D), w, b (D,) -> (..., D). b (N,1,D) holds a bias for each row of the batch.
    """
    y, xhat, rstd = _like(x), _like(x), _like(x[..., :1])

    @for_each(_in_blocks(x, y, xhat, rstd))
    def _(x_: Array, y_: Array, xhat_: Array, rstd_: Array) -> None:
        xp.subtract(x_, x_.mean(axis=-1, keepdims=True), out=xhat_)
        rstd_[...] = 1 / xp.sqrt((xhat_ * xhat_).mean(axis=-1, keepdims=True) + eps)  # (m,D) -> (m,1)
        xhat_ *= rstd_
        xp.multiply(xhat_, w, out=y_)

    y += b
    return y, (xhat, rstd, w)


def layer_norm_backward(dy: Array, saved: Saved) -> Array:
    """T3: with g = w * dy, dx = (g - mean(g) - xhat * mean(g * xhat)) / sqrt(var + eps)."""
    xhat, rstd, w = saved
    dx = _like(xhat)

    @for_each(_in_blocks(dy, xhat, rstd, dx))
    def _(dy_: Array, xhat_: Array, rstd_: Array, dx_: Array) -> None:
        g = xp.multiply(dy_, w, out=dx_)
        along = (g * xhat_).mean(axis=-1, keepdims=True)
        g -= g.mean(axis=-1, keepdims=True)
        g -= xhat_ * along
        g *= rstd_

    return dx


def rms_norm(x: Array, w: Array, eps: float) -> tuple[Array, Saved]:
    """T4: y = w * xhat, xhat = x / sqrt(mean(x^2) + eps), over the last axis. x (..., D), w (D,) -> (..., D)."""
    y, xhat, rstd = _like(x), _like(x), _like(x[..., :1])

    @for_each(_in_blocks(x, y, xhat, rstd))
    def _(x_: Array, y_: Array, xhat_: Array, rstd_: Array) -> None:
        rstd_[...] = 1 / xp.sqrt((x_ * x_).mean(axis=-1, keepdims=True) + eps)  # (m,D) -> (m,1)
        xp.multiply(x_, rstd_, out=xhat_)
        xp.multiply(xhat_, w, out=y_)

    return y, (xhat, rstd, w)


def rms_norm_backward(dy: Array, saved: Saved) -> Array:
    """T4: with g = w * dy, dx = (g - xhat * mean(g * xhat)) / sqrt(mean(x^2) + eps)."""
    xhat, rstd, w = saved
    dx = _like(xhat)

    @for_each(_in_blocks(dy, xhat, rstd, dx))
    def _(dy_: Array, xhat_: Array, rstd_: Array, dx_: Array) -> None:
        g = xp.multiply(dy_, w, out=dx_)
        g -= xhat_ * (g * xhat_).mean(axis=-1, keepdims=True)
        g *= rstd_

    return dx


def norm_weight_backward(dy: Array, saved: Saved) -> Array:
    """T3, T4: dw = sum over all rows of dy * xhat. dy (..., D) -> dw (D,)."""
    return bias_backward(dy * saved[0])


# --- T5, T6, T7: activations; each saves dy/dx, so its backward is one product ------------------------------------


# In float32, erf x = sin(x + x R(y)), y = x^2 / (x^2 + 9.6): arcsin(erf x) is odd, and the sine's flat top damps the
# error of R where erf nears 1. In float64, erf x = -expm1(-t P(t) / Q(t)), t = |x|: -log(erfc t) / t is smooth and
# positive, and the exponential damps likewise. R, P and Q are weighted minimax fits, highest power first; past the
# last place erf rounds to 1. Largest error: 1.7 ulp over all float32 numbers, 6e-16 in float64.
_ERF_R = (1.8857645, -2.91408044, 0.144045615, 0.825238128, 0.736327052, -0.336979454, -1.31209554, 0.128379166)
_ERF_R_LAST = 3.9375
_ERF_P = (
    2.785965613756157e-05, 0.9986282545588538, 12.520627663591856, 71.22974912712225,
    234.94018943988553, 475.88109469080615, 566.81481919426, 320.9105283294626,
)  # fmt: skip
_ERF_Q = (1.0, 12.468796764048381, 67.38862415836066, 202.95535056501296, 341.87129035085576, 284.39955086683983)
_ERF_PQ_LAST = 5.9375


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    """The polynomial at x, by Horner's rule; coefficients from the highest power down."""
    p = coefficients[0] * x
    p += coefficients[1]
    for c in coefficients[2:]:
        p *= x
        p += c
    return p


def erf(x: Array) -> Array:
    """T5: the error function, 2/sqrt(pi) times the integral of exp(-t^2) from 0 to x, elementwise, in x's dtype.

    A complex x is taken for a real one with a small imaginary step: erf(a + i b) = erf(a) + i b erf'(a).
    """
    if x.dtype.kind == "c":
        return erf(x.real) + (2j / math.sqrt(math.pi)) * x.imag * xp.exp(-x.real * x.real)
    if x.dtype == xp.float32:
        x = xp.clip(x, -_ERF_R_LAST, _ERF_R_LAST)
        y = x * x
        y /= y + 9.6
        return xp.sin(x + x * _polynomial(_ERF_R, y))
    t = xp.minimum(xp.abs(x), _ERF_PQ_LAST)
    h = _polynomial(_ERF_P, t)
    h /= _polynomial(_ERF_Q, t)
    return xp.copysign(xp.expm1(-t * h), x)


def gelu(x: Array) -> tuple[Array, Array]:
    """T5: y = x Phi(x), Phi(x) = (1 + erf(x / sqrt 2)) / 2, elementwise. Saves dy/dx = Phi(x) + x phi(x)."""
    y, dydx = _like(x), _like(x)

    @for_each(_in_blocks(x, y, dydx))
    def _(x_: Array, y_: Array, dydx_: Array) -> None:
        Phi = erf(x_ * math.sqrt(0.5))
        Phi += 1
        Phi *= 0.5
        phi = xp.exp(x_ * x_ * -0.5) * (1 / math.sqrt(2 * math.pi))
        xp.multiply(x_, Phi, out=y_)
        xp.multiply(x_, phi, out=dydx_)
        dydx_ += Phi

    return y, dydx


def gelu_tanh(x: Array) -> tuple[Array, Array]:
    """T6: y = x P, P = (1 + tanh u) / 2, u = sqrt(2/pi) (x + 0.044715 x^3), elementwise. Saves dy/dx = P + x P'."""
    c = math.sqrt(2 / math.pi)
    y, dydx = _like(x), _like(x)

    @for_each(_in_blocks(x, y, dydx))
    def _(x_: Array, y_: Array, dydx_: Array) -> None:
        x2 = x_ * x_
        P = xp.tanh(x_ * (c + (c * 0.044715) * x2))
        P += 1
        P *= 0.5
        xp.multiply(x_, P, out=y_)
        xp.multiply(y_, 1 - P, out=dydx_)  # tanh' = 1 - tanh^2 = 4 P (1 - P), so x P' = 2 x P (1 - P) u'
        dydx_ *= (2 * c) + (6 * c * 0.044715) * x2
        dydx_ += P

    return y, dydx


def silu(x: Array) -> tuple[Array, Array]:
    """T7: y = x S, S = 1 / (1 + exp(-x)) = (1 + tanh(x/2)) / 2, elementwise. Saves dy/dx = S + x S (1 - S)."""
    y, dydx = _like(x), _like(x)

    @for_each(_in_blocks(x, y, dydx))
    def _(x_: Array, y_: Array, dydx_: Array) -> None:
        S = xp.tanh(x_ * 0.5)  # tanh overflows for no x
        S += 1
        S *= 0.5
        xp.multiply(x_, S, out=y_)
        xp.multiply(y_, 1 - S, out=dydx_)
        dydx_ += S

    return y, dydx


def relu(x: Array) -> tuple[Array, Array]:
    """T7: y = x where x > 0, else 0, elementwise. Saves dy/dx: 1 there, else 0."""
    dydx = (x.real > 0).astype(x.dtype)
    return x * dydx, dydx


def tanh(x: Array) -> tuple[Array, Array]:
    """T14: y = tanh x, the pooler's, elementwise. Saves dy/dx = 1 - y^2."""
    y = xp.tanh(x)
    return y, 1 - y * y


def activation_backward(dy: Array, dydx: Array) -> Array:
    """T5, T6, T7: dx = dy * dy/dx."""
    return dy * dydx


# --- T8, T9, T10: softmax, attention ------------------------------------------------------------------------------


def softmax(x: Array) -> tuple[Array, Array]:
    """T8: p = exp(x) / sum exp(x), over the last axis. x (..., S) -> p (..., S). A row of -inf alone gives zeros."""
    largest = x.real.max(axis=-1, keepdims=True)
    p = x - xp.maximum(largest, xp.finfo(largest.dtype).min)  # so that -inf is never taken from -inf
    xp.exp(p, out=p)
    total = p.sum(axis=-1, keepdims=True)
    p *= 1 / xp.where(total == 0, 1, total)
    return p, p


def softmax_backward(dp: Array, p: Array) -> Array:
    """T8: dx = p * (dp - sum(p * dp)), over the last axis."""
    dx = dp - (dp * p).sum(axis=-1, keepdims=True)
    dx *= p
    return dx


QUERY_ROWS = 64  # queries of a tile: of causal attention's masked half, all but a triangle of so many is left out
TILE_LISTS = 4  # of a long sequence's tiles: a head's can run in so many threads


class Tile(NamedTuple):
    """A part of the scores (N,G,R,T,S): sequences n, groups g, queries t; keys s, all that these may see."""

    n: slice
    g: slice
    t: slice
    s: slice

    def of(self, bias: PositionBias, R: int) -> PositionBias:
        """Its part of what is added; a group is R heads next to each other."""
        return bias.tile(self.n, slice(self.g.start * R, self.g.stop * R), self.t, self.s)


class AttentionSaved(NamedTuple):
    """What attention's backward needs: its inputs. The probabilities, (T,S) for each head, are computed again."""

    q: Array  # (N,G,R,T,K)
    k: Array  # (N,G,S,K)
    v: Array  # (N,G,S,K)
    hidden: Array | None  # (N,1,1,1,S): -inf at keys that do not count, else 0
    causal: bool
    window: int | None
    scale: float
    bias: PositionBias | None

    def tiles(self) -> Iterator[list[Tile]]:
        """The scores cut into tiles that stay in cache, in lists: a list's tiles add to the gradients of the same keys.

        A long sequence has some lists; later queries see more keys, so each has every fourth tile or so, and about as
        much to do. On a GPU there is one tile.
        """
        (N, G, R, T, _), S = self.q.shape, self.k.shape[2]
        rows = T if backend_name == "cupy" else QUERY_ROWS
        starts = range(0, T, rows)
        lists = TILE_LISTS if len(starts) >= TILE_LISTS**2 and self.bias is None else 1
        for n in blocks(N, G * R * rows * S):
            for g in blocks(G, R * rows * S):
                for first in range(lists):
                    yield [Tile(n, g, *self._sees(slice(t, min(t + rows, T)))) for t in starts[first::lists]]

    def _sees(self, t: slice) -> tuple[slice, slice]:
        """Some queries, and the keys that they may see: query t stands at place S - T + t."""
        S, past = self.k.shape[2], self.k.shape[2] - self.q.shape[3]
        first = 0 if self.window is None else max(0, past + t.start - self.window + 1)
        return t, slice(first, past + t.stop if self.causal else S)

    def of(self, tile: Tile) -> tuple[Array, Array, Array, Array]:
        """A tile's scale q (n,g,R*t,K), k and v (n,g,s,K), and probabilities p (n,g,R*t,s): R heads share k and v."""
        n, g, t, s = tile
        q, k, v = _joined_heads(self.q[n, g, :, t]) * self.scale, self.k[n, g, s], self.v[n, g, s]
        return q, k, v, self._probabilities(tile, q, k)

    def _probabilities(self, tile: Tile, q: Array, k: Array) -> Array:
        """T8, T9: softmax of q k^T, and what is added, of a tile. q (n,g,R*t,K), k (n,g,s,K) -> (n,g,R*t,s)."""
        t, s, R = tile.t.stop - tile.t.start, k.shape[2], self.q.shape[2]
        scores = q @ k.swapaxes(-1, -2)  # (n,g,R*t,K) (n,g,K,s) -> (n,g,R*t,s)
        of_heads = scores.reshape(*scores.shape[:2], R, t, s)  # a view
        if self.bias is not None:
            of_heads += tile.of(self.bias, R).scores().reshape(of_heads.shape)
        minus_inf = xp.full((t, t), -math.inf, dtype=scores.real.dtype)
        if self.causal and t > 1:
            of_heads[..., s - t :] += xp.triu(minus_inf, 1)  # the keys after each query
        if self.window is not None:  # the keys that its first query sees the last of, and so on
            passed = self.k.shape[2] - self.q.shape[3] + tile.t.start - self.window - tile.s.start
            of_heads[..., :t] += xp.tril(minus_inf, passed)
        if self.hidden is not None:
            of_heads += self.hidden[tile.n, ..., tile.s]
        return softmax(scores)[0]


def _joined_heads(x: Array) -> Array:
    """The queries of a group's heads, one head's behind the other's: (n,g,R,t,K) -> (n,g,R*t,K)."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool,
    mask: Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    bias: PositionBias | None = None,
) -> tuple[Array, AttentionSaved]:
    """T9, T10: softmax(q k^T / sqrt(K)) v for each head; H query heads share G key/value heads, H/G to one.

    q (N,H,T,K); k, v (N,G,S,K); mask (N,S) bool, true where a key counts -> (N,H,T,K).
    Causal: the queries are the last T of the S places, and each sees the keys up to its own; with a window, which is
    for causal attention, the last so many of them. scale: in the place of 1 / sqrt(K). bias: what is added to the
    scores (T18, T19).
    A query that sees no key gives zeros, and its gradient is zero. Memory grows with T, not with T S.
    """
    (N, H, T, K), G = q.shape, k.shape[1]
    R, scale = H // G, 1 / math.sqrt(K) if scale is None else scale
    hidden = None if mask is None else xp.where(mask, 0, -math.inf).astype(q.real.dtype)[:, None, None, None]
    saved = AttentionSaved(q.reshape(N, G, R, T, K), k, v, hidden, causal, window, scale, bias)
    out = xp.empty((N, T, H, K), dtype=q.dtype)
    heads = out.reshape(N, T, G, R, K).transpose(0, 2, 3, 1, 4)  # a view (N,G,R,T,K)

    @for_each((tile,) for tiles in saved.tiles() for tile in tiles)
    def _(tile: Tile) -> None:
        _, _, v_, p = saved.of(tile)
        y = p @ v_  # (n,g,R*t,s) (n,g,s,K) -> (n,g,R*t,K)
        part = heads[tile.n, tile.g, :, tile.t]
        part[...] = y.reshape(part.shape)

    return out.transpose(0, 2, 1, 3), saved


def attention_backward(dy: Array, saved: AttentionSaved) -> tuple[Array, Array, Array, PositionBias | None]:
    """T9, T10: dy (N,H,T,K) -> dq (N,H,T,K), dk and dv (N,G,S,K), which sum over the heads that share them; and the
    gradient of bias, where it is trained, else None."""
    (N, G, R, T, K), S = saved.q.shape, saved.k.shape[2]
    dy = dy.reshape(N, G, R, T, K)
    dq = xp.empty((N, T, G, R, K), dtype=dy.dtype).transpose(0, 2, 3, 1, 4)  # laid out as the projections want them
    dkv = xp.zeros((2, N, S, G, K), dtype=dy.dtype).transpose(0, 1, 3, 2, 4)
    dbias = saved.bias.zeros() if saved.bias is not None and saved.bias.trained else None

    def of_keys(tiles: list[Tile]) -> Array:
        """What these tiles add to dk and dv. -> (2,n,g,S,K)"""
        n, g = tiles[0].n, tiles[0].g
        sums = xp.zeros_like(dkv[:, n, g])
        dk_, dv_ = sums
        for tile in tiles:
            dy_, (q_, k_, v_, p) = _joined_heads(dy[n, g, :, tile.t]), saved.of(tile)
            dv_[:, :, tile.s] += p.swapaxes(-1, -2) @ dy_  # (n,g,s,R*t) (n,g,R*t,K) -> (n,g,s,K)
            dscores = softmax_backward(dy_ @ v_.swapaxes(-1, -2), p)  # (n,g,R*t,s)
            if dbias is not None:
                tile.of(dbias, R).add(dscores.reshape(len(dscores), -1, tile.t.stop - tile.t.start, dscores.shape[-1]))
            dk_[:, :, tile.s] += dscores.swapaxes(-1, -2) @ q_
            dq_ = (dscores @ k_) * saved.scale  # (n,g,R*t,s) (n,g,s,K) -> (n,g,R*t,K)
            dq[n, g, :, tile.t] = dq_.reshape(dq[n, g, :, tile.t].shape)
        return sums

    lists = list(saved.tiles())
    for tiles, sums in zip(lists, map_parts(of_keys, lists), strict=True):
        dkv[:, tiles[0].n, tiles[0].g] += sums
    dk, dv = dkv
    return dq.reshape(N, G * R, T, K), dk, dv, dbias


# --- T11: rotary positions -----------------------------------------------------------------------------------------


def rotary_angles(
    positions: Array, p: int, theta: float, dtype: DType, factors: tuple[float, ...] = (1.0,)
) -> tuple[Array, Array]:
    """T11: cos and sin of position / (factor_i theta^(2i/p)), i < p/2. positions (...,T) -> two (...,T,p/2).

    p is how many elements of a head are turned; factors are one or p/2. Computed in float64, rounded once.
    """
    frequencies = theta ** (xp.arange(p // 2) * (-2.0 / p))
    frequencies /= factors[0] if len(factors) == 1 else xp.asarray(factors)
    angles = positions[..., None] * frequencies
    return xp.cos(angles).astype(dtype), xp.sin(angles).astype(dtype)


def llama3_factors(p: int, theta: float, *, factor: float, low: float, high: float, original: int) -> tuple[float, ...]:
    """T11: what Llama 3 (from 3.1 on) divides its frequencies by, for sequences longer than the `original` ones.

    By 1 where a turn takes fewer than original / high places, by `factor` where more than original / low; between the
    two the inverse goes from one to the other in proportion to the turns in an original sequence. -> p/2 numbers.
    """
    factors = []
    for i in range(p // 2):
        turns = original * theta ** (-2 * i / p) / (2 * math.pi)  # in a sequence of the original length
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - share) / factor + share))
    return tuple(factors)


def rotary(x: Array, cos: Array, sin: Array) -> tuple[Array, Saved]:
    """T11: turns the pair (x_i, x_{i + p/2}) by its angle, of the first p elements of each head.

    x (N,H,T,K); cos, sin (T,p/2) or (N,1,T,p/2) -> (N,H,T,K).
    """
    y, half = _like(x), cos.shape[-1]

    @for_each((x[:, h], y[:, h]) for h in blocks(x.shape[1], x[:, 0].size))  # some of the heads
    def _(x_: Array, y_: Array) -> None:
        x1, x2 = x_[..., :half], x_[..., half : 2 * half]
        y_[..., :half] = x1 * cos - x2 * sin
        y_[..., half : 2 * half] = x2 * cos + x1 * sin
        y_[..., 2 * half :] = x_[..., 2 * half :]

    return y, (cos, sin)


def rotary_backward(dy: Array, saved: Saved) -> Array:
    """T11: a turn's transpose is the turn back."""
    cos, sin = saved
    return rotary(dy, cos, -sin)[0]


# --- T12: dropout --------------------------------------------------------------------------------------------------


def _mix(h: Array) -> Array:
    """A bijection of the 32-bit integers in which each bit of h sways every bit of the result (xor-shift, multiply)."""
    h = h ^ (h >> 16)
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    h ^= h >> 16
    return h


def dropout_mask(n: Array, t: Array, D: int, p: float, *, seed: int, stream: str, dtype: DType) -> Array:
    """T12: m (M,D), for M tokens: 0 with probability p, else 1 / (1 - p).

    An element depends on seed, on stream (the name of what it is for), on its sequence's index n (M,) in the whole
    batch and on its place there, t (M,) and d: never on how a batch is cut into shards, nor on which other tokens are
    computed. It is a hash, not a generator with a state, so it is made where it is used, on any device.
    """
    key = zlib.crc32(f"{seed} {stream}".encode())
    tokens = _mix(_mix(n.astype(xp.uint32) ^ key) ^ t.astype(xp.uint32))  # (M,)
    columns = _mix(xp.arange(D, dtype=xp.uint32) ^ (key ^ 0x9E3779B9))  # (D,)
    mask = xp.empty((len(n), D), dtype=dtype)

    @for_each(zip(blocks(len(n), D)))
    def _(m: slice) -> None:
        mask[m] = _mix(tokens[m, None] ^ columns) >= min(round(p * 2**32), 2**32 - 1)

    mask *= 1 / (1 - p)
    return mask


def dropout(x: Array, mask: Array) -> tuple[Array, Array]:
    """T12: y = m * x."""
    return x * mask, mask


def dropout_backward(dy: Array, mask: Array) -> Array:
    """T12: dx = m * dy."""
    return dy * mask


# --- T15: cross-entropy ----------------------------------------------------------------------------------------------


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, tuple[Array, Array]]:
    """T15: -log softmax(logits)[target], a row at a time. logits (M,V), targets (M,) in 0..V-1 -> losses (M,).

    Every target here counts. Those of -100 never come: `pick` leaves their rows out before logits are computed.
    The softmax takes the memory of logits, the largest array of a step: their values are lost.
    """
    losses = xp.empty(len(logits), dtype=logits.dtype)

    @for_each(zip(blocks(*logits.shape)))
    def _(m: slice) -> None:
        x = logits[m]
        x -= x.real.max(axis=-1, keepdims=True)
        at_target = x[xp.arange(len(x)), targets[m]]
        xp.exp(x, out=x)
        total = x.sum(axis=-1)  # (m,V) -> (m,)
        losses[m] = xp.log(total) - at_target
        x *= (1 / total)[:, None]

    return losses, (logits, targets)


def cross_entropy_backward(dlosses: Array, saved: tuple[Array, Array]) -> Array:
    """T15: dlogits = (softmax(logits) - onehot(target)) * dloss. dlosses (M,) -> (M,V), in the softmax's memory."""
    dlogits, targets = saved
    dlogits *= dlosses[:, None]
    dlogits[xp.arange(len(targets)), targets] -= dlosses
    return dlogits
