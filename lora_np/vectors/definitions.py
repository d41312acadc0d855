"""The statements of the specification once more, as plain formulas in arithmetic that carries its rounding error.

Nothing here is fast or shared with the package's own forward and backward: each function is its equation, letter by
letter, and gets its gradients and error bounds from `tracked`. Where two ways of computing are common, the formula is
the one that rounds worse, so that a correct implementation of either stays within the bound.

Every function takes the case's inputs t by name (floats as Tracked; integers and booleans as arrays) and its scalars c,
and gives its outputs by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from ..backend import Array
from .buckets import deberta_bucket, t5_bucket
from .precision import U, gamma, rounded
from .tracked import FUNCTION, Tracked, cos, erf, exp, joined, log, sin, sqrt, tanh, tracked

Inputs: TypeAlias = Mapping[str, Any]
Scalars: TypeAlias = Mapping[str, Any]
Outputs: TypeAlias = dict[str, Tracked]
Definition: TypeAlias = Callable[[Inputs, Scalars], Outputs]

IGNORED = -100


# --- L1 to L9 ----------------------------------------------------------------------------------------------------


def scale(c: Scalars) -> float:
    """L1: s = alpha / r, or alpha / sqrt(r) when rank-stabilised."""
    return float(c["alpha"] / (math.sqrt(c["r"]) if c["rslora"] else c["r"]))


def dropped(x: Tracked, t: Inputs, c: Scalars) -> Tracked:
    """T12: m * x, with m = keep / (1 - p), where the case has a mask."""
    return x * (t["keep"] * tracked(1 / (1 - c["p"]), x)) if "keep" in t else x


def affine(x: Tracked, W: Tracked, b: Tracked | None) -> Tracked:
    """T2: x W^T + b."""
    y = x @ W.mT
    return y if b is None else y + b


def lora_update(t: Inputs, c: Scalars) -> Outputs:
    return {"s": tracked(scale(c), t["A"]), "dW": (t["B"] @ t["A"]) * scale(c)}


def lora_linear(t: Inputs, c: Scalars) -> Outputs:
    low = (dropped(t["x"], t, c) @ t["A"].mT) @ t["B"].mT
    return {"h": affine(t["x"], t["W0"], t.get("b")) + low * scale(c)}


def lora_embedding(t: Inputs, c: Scalars) -> Outputs:
    return {"h": t["E"][t["tokens"]] + (t["A"].mT[t["tokens"]] @ t["B"].mT) * scale(c)}


def lora_start(t: Inputs, c: Scalars) -> Outputs:
    h = lora_linear(t, c)["h"]
    return {"h": h, "difference": Tracked(np.zeros(h.shape))}


def stored(x: Tracked, dtype: str) -> Tracked:
    """x rounded once to a dtype; the error is how far x's own can move the rounding."""
    value, low, high = (rounded(v, dtype) for v in (x.value, x.value - x.error, x.value + x.error))
    return Tracked(value, np.maximum(high - value, value - low))


def merge(t: Inputs, c: Scalars) -> Outputs:
    """L5: the sum is wide inside, whatever the precision."""
    W = stored(t["W0"].inside + (t["B"].inside @ t["A"].inside) * scale(c), c["dtype"])
    return {"W": W, "h": affine(t["x"], W, t.get("b"))}


def unmerge(t: Inputs, c: Scalars) -> Outputs:
    return {"W0": Tracked(t["W0"].value)}


def per_row(t: Inputs, c: Scalars) -> Outputs:
    h = affine(t["x"], t["W0"], t.get("b"))
    for i, one in enumerate(c["adapters"]):
        mine = (t["rows"] == i)[:, None, None] * 1.0
        h = h + ((t["x"] @ t[f"A{i}"].mT) @ t[f"B{i}"].mT) * scale(one) * mine
    return {"h": h}


def segments(t: Inputs, c: Scalars) -> Outputs:
    """L7: the rows of one adapter after another; what has none, and the other columns, stay as they are."""
    y, x, order = t["y"], t["x"], np.argsort(t["index"], kind="stable")
    start, stop = c["start"], c["start"] + t["B"].shape[1]
    parts = [y[t["index"] < 0]]
    for i, one in enumerate(c["adapters"]):
        mine, r = t["index"] == i, one["r"]
        low = ((x[mine] @ t["A"][i, :r].mT) @ t["B"][i, :, :r].mT) * scale(one)
        parts.append(joined([y[mine, :start], y[mine, start:stop] + low, y[mine, stop:]], 1))
    return {"y": joined(parts, 0)[np.argsort(order)]}


def count(t: Inputs, c: Scalars) -> Outputs:
    return {"parameters": Tracked((t["matrices"] * t["r"] * (t["out"] + t["in"])).sum())}


def combine(t: Inputs, c: Scalars) -> Outputs:
    parts = [(t[f"B{i}"] * (one["w"] * scale(one))) @ t[f"A{i}"] for i, one in enumerate(c["adapters"])]
    dW = parts[0]
    for part in parts[1:]:
        dW = dW + part
    return {"dW": dW if c["rank"] is None else truncated(dW, c["rank"])}


def decomposed(X: Tracked) -> tuple[Array, Array, Array, float]:
    """P, S, Q^T of X = P diag(S) Q^T, the largest first, and norm(E): a decomposition in float32 is that of X + E.

    norm(E) <= norm(e) + 8 max(n, m) u sigma_1; its directions are orthonormal to within `skew`.
    """
    P, S, Qt = np.linalg.svd(X.value)
    return P, S, Qt, float(np.linalg.norm(X.error)) + skew(X) * float(S[0])


def skew(X: Tracked) -> float:
    """What is asked of a decomposition: LAPACK's in float32 come to 0.2 to 4 max(n, m) u."""
    return 8 * max(X.shape) * U


def truncated(dW: Tracked, k: int) -> Tracked:
    """The nearest matrix of rank k, and a bound on each element's error.

    With F = P^T E Q, the truncation of dW + E moves by D(F) in the same bases: where a <= k < b,
    D_ab = sigma_a (sigma_a F_ab + sigma_b F_ba) / (sigma_a^2 - sigma_b^2), and D_ba with a and b of F exchanged; F
    itself where both are at most k; 0 where neither is. D is symmetric, so no element (x, y) moves by more than
    norm(E) norm(D(P^T e_x e_y^T Q)). What is of second order is within 8 sigma_1 times the square of the turn.
    """
    P, S, Qt, E = decomposed(dW)
    n = max(dW.shape)
    sigma = np.zeros(n)
    sigma[: len(S)] = S
    a, b = sigma[:k, None], sigma[None, k:]
    moved = np.zeros(dW.shape)
    for x, y in np.ndindex(dW.shape):
        F = np.zeros((n, n))
        F[: len(P), : len(Qt)] = np.outer(P[x], Qt[:, y])
        D = F.copy()
        D[k:, k:] = 0
        D[:k, k:] = a * (a * F[:k, k:] + b * F[k:, :k].T) / (a**2 - b**2)
        D[k:, :k] = (a * (a * F[k:, :k].T + b * F[:k, k:]) / (a**2 - b**2)).T
        moved[x, y] = E * np.linalg.norm(D)
    return Tracked((P[:, :k] * S[:k]) @ Qt[:k], moved + S[0] * (skew(dW) + 8 * turn(S, E, k) ** 2))


# --- L10, L12 ----------------------------------------------------------------------------------------------------


def with_norm(t: Inputs, c: Scalars) -> tuple[Tracked, Tracked]:
    """L10: W0 + s B A, and the norm of each of its rows, which no gradient goes back through."""
    V = t["W0"] + (t["B"] @ t["A"]) * scale(c)
    return V, sqrt((V.inside * V.inside).sum(-1)).into(V.precision).detached()


def dora_linear(t: Inputs, c: Scalars) -> Outputs:
    """As PEFT sums it, which rounds worst: the base, then what the update adds to it."""
    return {"h": dora_of(t, c, with_norm(t, c)[1])}


def dora_of(t: Inputs, c: Scalars, norm: Tracked) -> Tracked:
    """L10: with the norm given."""
    g, x = t["m"] / norm, dropped(t["x"], t, c)
    low = ((x @ t["A"].mT) @ t["B"].mT) * scale(c)
    return affine(t["x"], t["W0"], t.get("b")) + (x @ t["W0"].mT) * (g - 1) + low * g


def dora_embedding(t: Inputs, c: Scalars) -> Outputs:
    E = {**t, "W0": t["E"].mT}
    return {"h": lora_embedding(t, c)["h"] * (t["m"] / with_norm(E, c)[1])}


def dora_merge(t: Inputs, c: Scalars) -> Outputs:
    V, norm = with_norm(t, c)
    return {"W": V * (t["m"] / norm).reshape(-1, 1)}


def pissa(t: Inputs, c: Scalars) -> Outputs:
    """L12: of factors rounded to float32, each of whose rows or columns is no longer than sqrt(sigma_1 / s)."""
    best = truncated(t["W0"], c["r"])
    largest = float(np.linalg.norm(t["W0"].value, 2))
    update = Tracked(best.value, best.error + gamma(c["r"] + 3) * largest)
    return {"update": update, "residual": t["W0"] - update}


# --- L11 ---------------------------------------------------------------------------------------------------------


def single(x: Tracked) -> Tracked:
    """What float32 makes of a number where one way of computing it is laid down: no gradient goes back from it."""
    return Tracked(rounded(x.value, "float32"), x.error)


def nearest(x: Array, numbers: Array) -> Array:
    """The index of the nearest."""
    return np.abs(x[..., None] - numbers).argmin(axis=-1)


def maxima(x: Array, size: int) -> Array:
    """The absolute maximum of each `size` numbers; the last may be fewer."""
    return np.array([np.abs(x[i : i + size]).max() for i in range(0, len(x), size)])


def quantise_nf4(t: Inputs, c: Scalars) -> Outputs:
    w = t["W"].value.ravel()
    a = maxima(w, c["block"])
    k = nearest(w / np.where(a, a, 1).repeat(c["block"])[: w.size], t["levels"].value)
    codes = {"codes": Tracked(16 * k[::2] + k[1::2])}
    if "map" not in t:
        return {**codes, "absmax": Tracked(a)}
    mean = single(Tracked(a).sum() / len(a))
    left = single(Tracked(a) - mean)
    outer = maxima(left.value, 256)
    indices = nearest(left.value / outer.repeat(256)[: len(a)], t["map"].value)
    most = np.array([left.error[i : i + 256].max() for i in range(0, len(a), 256)])
    return {**codes, "absmax": Tracked(indices), "outer": Tracked(outer, most), "offset": mean}


def dequantise_nf4(t: Inputs, c: Scalars) -> Outputs:
    a = t["absmax"]
    if "map" in t:
        a = single(single(t["map"][a] * t["outer"][np.arange(len(a)) // 256]) + t["offset"])
    k = np.stack([t["codes"] >> 4, t["codes"] & 15], axis=1).ravel()
    return {"W": single(t["levels"][k] * a[np.arange(len(k)) // c["block"]]).reshape(c["out"], c["in"])}


def nf4_linear(t: Inputs, c: Scalars) -> Outputs:
    return lora_linear({**t, "W0": dequantise_nf4(t, c)["W"].detached()}, c)


# --- T1 to T20 ---------------------------------------------------------------------------------------------------


def embedding(t: Inputs, c: Scalars) -> Outputs:
    x = t["tokens_table"][t["tokens"]]
    if "scale" in c:
        x = x * c["scale"]
    for what in ("positions", "types"):
        if what in t:
            x = x + t[f"{what}_table"][t[what]]
    return {"x": x}


def linear(t: Inputs, c: Scalars) -> Outputs:
    return {"y": affine(t["x"], t["W"], t.get("b"))}


def normalised(x: Tracked, eps: float) -> Tracked:
    """T4: x / sqrt(mean(x^2) + eps), wide inside."""
    z = x.inside
    return (z / sqrt((z * z).mean() + eps)).into(x.precision)


def layer_norm(t: Inputs, c: Scalars) -> Outputs:
    x = t["x"].inside
    return {"y": normalised(x - x.mean(), c["eps"]).into(t["x"].precision) * t["w"] + t["b"]}


def norm_weight(t: Inputs, c: Scalars) -> Tracked:
    """T4: w, or 1 + w."""
    return t["w"] + 1 if c.get("one_plus") else t["w"]


def rms_norm(t: Inputs, c: Scalars) -> Outputs:
    return {"y": normalised(t["x"], c["eps"]) * norm_weight(t, c)}


def gelu_of(x: Tracked) -> Tracked:
    return gated_by(x, erf, lambda z: z * math.sqrt(0.5))


def gelu_tanh_of(x: Tracked) -> Tracked:
    return gated_by(x, tanh, lambda z: (z + z * z * z * 0.044715) * math.sqrt(2 / math.pi))


def silu_of(x: Tracked) -> Tracked:
    return gated_by(x, tanh, lambda z: z * 0.5)


def gated_by(x: Tracked, f: Callable[[Tracked], Tracked], of: Callable[[Tracked], Tracked]) -> Tracked:
    """x (1 + f(of x)) / 2, what multiplies x wide inside."""
    return x * ((f(of(x.inside)) + 1) * 0.5).into(x.precision)


def relu_of(x: Tracked) -> Tracked:
    return x * (x.value > 0)


ACTIVATIONS = {"gelu": gelu_of, "gelu_tanh": gelu_tanh_of, "silu": silu_of, "relu": relu_of, "tanh": tanh}


def gelu(t: Inputs, c: Scalars) -> Outputs:
    return {"y": gelu_of(t["x"])}


def gelu_tanh(t: Inputs, c: Scalars) -> Outputs:
    return {"y": gelu_tanh_of(t["x"])}


def silu(t: Inputs, c: Scalars) -> Outputs:
    return {"y": silu_of(t["x"])}


def relu(t: Inputs, c: Scalars) -> Outputs:
    return {"y": relu_of(t["x"])}


def gated_mlp(t: Inputs, c: Scalars) -> Outputs:
    gate, up = t["x"] @ t["W_gate"].mT, t["x"] @ t["W_up"].mT
    return {"y": (ACTIVATIONS[c.get("activation", "silu")](gate) * up) @ t["W_down"].mT}


def less_largest(z: Tracked, seen: Array) -> Tracked:
    """z less the largest of its row that is seen: what is subtracted, the same of all, divides out in a softmax.

    The rounding is that, and that of z - lse, lse = log sum exp z, of which exp is the softmax too: lse is as far off
    as a number of its size is rounded, and as log is.
    """
    largest = np.where(seen, z.value, -np.inf).max(axis=-1, keepdims=True)
    largest = np.where(np.isfinite(largest), largest, 0.0)
    below = np.minimum(z.value - largest, 0)
    log_sum = np.log(np.maximum((np.exp(below) * seen).sum(-1, keepdims=True), 1))
    own = U * (np.abs(below) + z.error + np.abs(largest + log_sum)) + (FUNCTION + U) * log_sum
    return Tracked(below, z.error, [(z, lambda g: g)], local=own)


def weights_of(scores: Tracked, visible: Array) -> Tracked:
    """T8: softmax over the last axis, of what is visible, wide inside; zeros where nothing is.

    The gradient goes back through the weights as they are stored, which is what implementations keep.
    """
    z, seen = scores.inside, np.broadcast_to(visible, scores.shape)
    e = exp(less_largest(z, seen)) * (seen * 1.0)
    total = e.sum(-1, keepdims=True)
    p = (e / (total + (total.value == 0) * 1.0)).into(scores.precision)

    def backward(g: Tracked) -> Tracked:
        weights, dp = p.inside, g.inside
        return (weights * (dp - (weights * dp).sum(-1, keepdims=True))).into(scores.precision)

    return Tracked(p.value, p.error, [(scores, backward)])


def softmax(t: Inputs, c: Scalars) -> Outputs:
    return {"p": weights_of(t["x"], t["mask"])}


def attended(
    q: Tracked, k: Tracked, v: Tracked, causal: bool, mask: Array | None, *, window: int | None = None,
    scale: float | None = None,
) -> Tracked:  # fmt: skip
    """T9, T10: q (N,H,T,K), k and v (N,G,S,K), mask (N,S) -> (N,H,T,K)."""
    (N, H, T, K), (G, S) = q.shape, k.shape[1:3]
    visible = np.ones((N, 1, T, S), dtype=bool)
    if causal:
        visible &= np.arange(S) <= np.arange(S - T, S)[:, None]
    if window is not None:
        visible &= np.arange(S) > np.arange(S - T, S)[:, None] - window
    if mask is not None:
        visible &= mask[:, None, None, :]
    shared = np.arange(H) // (H // G)  # the key/value head of each query head
    p = weights_of((q @ k[:, shared].mT) * (1 / math.sqrt(K) if scale is None else scale), visible)
    return p @ v[:, shared]


def attention(t: Inputs, c: Scalars) -> Outputs:
    by_place = {name: c.get(name) for name in ("window", "scale")}
    return {"y": attended(t["q"], t["k"], t["v"], c["causal"], t.get("mask"), **by_place)}


def turned(
    x: Tracked, positions: Array, theta: float, *, width: int | None = None, factors: Sequence[float] = (1.0,)
) -> Tracked:
    """T11: x (N,H,T,K), positions (T,) or (N,T): the pair (x_i, x_{i + p/2}) by position / (factor_i theta^(2i/p))."""
    if width is not None and width < x.shape[-1]:
        return joined([turned(x[..., :width], positions, theta, factors=factors), x[..., width:]], 3)
    K = x.shape[-1]
    i = np.arange(K) % (K // 2)
    rate = theta ** (-2.0 * i / K) / np.resize(factors, K // 2)[i]
    angle = Tracked(positions[..., None]) * Tracked(rate, local=FUNCTION * rate, noise=x.noise)
    if positions.ndim == 2:
        angle = angle[:, None]
    first = np.arange(K) < K // 2
    other = x[..., (np.arange(K) + K // 2) % K] * np.where(first, -1.0, 1.0)
    return x * cos(angle).into(x.precision) + other * sin(angle).into(x.precision)


def rotary(t: Inputs, c: Scalars) -> Outputs:
    return {"y": turned(t["x"], t["positions"], c["theta"], width=c.get("width"), factors=c.get("factors", (1.0,)))}


def dropout(t: Inputs, c: Scalars) -> Outputs:
    return {"y": dropped(t["x"], t, c)}


def head_norm(t: Inputs, c: Scalars) -> Outputs:
    """T17: the norm, then the turn."""
    return {"y": turned(normalised(t["x"], c["eps"]) * t["w"], t["positions"], c["theta"])}


def distances(T: int) -> Array:
    """A key's place less its query's: (T,T), queries by row."""
    return np.arange(T) - np.arange(T)[:, None]


def score_bias(t: Inputs, c: Scalars) -> Outputs:
    """T18: the table's row of each distance. table (B,H) -> (H,T,T)."""
    bucket = np.vectorize(partial(t5_bucket, n=len(t["table"].value), last=c["last"], causal=c["causal"]))
    return {"b": t["table"][bucket(distances(c["T"]))].swapaxes(1, 2).swapaxes(0, 1)}  # (T,T,H) -> (H,T,T)


def far_scores(q: Tracked, k: Tracked, q_far: Tracked, k_far: Tracked, to_query: Array, to_key: Array) -> Tracked:
    """T19: q, k (N,H,T,K), q_far, k_far (H,2B,K), the rows that each query and each key asks (T,T) -> (N,H,T,T)."""
    t = np.arange(q.shape[2])
    return q @ k.mT + (q @ k_far.mT)[:, :, t[:, None], to_query] + (k @ q_far.mT)[:, :, t, to_key]


def rows_of(t: Inputs, c: Scalars, distance: Array) -> Array:
    """T19: the row of the table of each distance."""
    return np.vectorize(partial(deberta_bucket, n=t["k_far"].shape[1] // 2, last=c["last"]))(distance)


def disentangled(t: Inputs, c: Scalars) -> Outputs:
    rows = rows_of(t, c, distances(t["q"].shape[2]))
    total = far_scores(t["q"], t["k"], t["q_far"], t["k_far"], rows, rows)
    return {"z": total * (1 / math.sqrt(3 * t["q"].shape[-1]))}


def split_heads(x: Tracked, H: int) -> Tracked:
    """(N,T,D) -> (N,H,T,K)."""
    return x.reshape(*x.shape[:2], H, -1).swapaxes(1, 2)


def cross_attention(t: Inputs, c: Scalars) -> Outputs:
    """T20: x (N,T,D) asks X (N,S,D)."""
    return asked(t, c, t.get("source_mask"), causal=False)


def asked(t: Inputs, c: Scalars, mask: Array | None, *, causal: bool) -> Outputs:
    q, k, v = (
        split_heads(z @ t[f"W_{one}"].mT, c["n_head"]) for one, z in (("q", t["x"]), ("k", t["X"]), ("v", t["X"]))
    )
    y = attended(q, k, v, causal, mask).swapaxes(1, 2)
    return {"y": y.reshape(*t["x"].shape) @ t["W_o"].mT}


def row_losses(logits: Tracked, targets: Array) -> Tracked:
    """T15: -log softmax(logits)[target], a row at a time, wide inside. logits (M,V), targets (M,) -> (M,)."""
    z = less_largest(logits.inside, np.ones(logits.shape, dtype=bool))
    return log(exp(z).sum(-1)) - z[np.arange(len(targets)), targets]


def mean_loss(logits: Tracked, targets: Array) -> Tracked:
    """T15: over the targets that count. logits (..., V), targets (...)."""
    targets = targets.reshape(-1)
    counted = np.flatnonzero(targets != IGNORED)
    rows = logits.reshape(-1, logits.shape[-1])[counted]
    return (row_losses(rows, targets[counted]).sum() / len(counted)).into(logits.precision)


def cross_entropy(t: Inputs, c: Scalars) -> Outputs:
    return {"loss": mean_loss(t["logits"], t["targets"])}


# --- Whole models (T13, T14, and LoRA in them) -----------------------------------------------------------------------


def scale_of(c: Scalars, name: str) -> float:
    """L1: the scale of the matrix `name`, whose rank may be its own, or its target's."""
    ranks = c.get("rank_pattern", {})
    return scale({**c, "r": ranks.get(name, ranks.get(name.rpartition(".")[2], c["r"]))})


def projected(t: Inputs, c: Scalars, name: str, x: Tracked) -> Tracked:
    """T2, L2: the matrix `name` with its update, or its part of a fused one."""
    y = affine(x, weight_of(t, name), t.get(f"{name}.bias"))
    if (pair := pair_of(t, c, name)) is None:
        return y
    A, B, s = pair
    return y + ((x @ A.mT) @ B.mT) * s


def weight_of(t: Inputs, name: str) -> Tracked:
    """A matrix; a tied head's is the token table."""
    return t["embed.tokens"] if name == "head" and "head.weight" not in t else t[f"{name}.weight"]


def pair_of(t: Inputs, c: Scalars, name: str) -> tuple[Tracked, Tracked, float] | None:
    """A, B and s of a matrix, its part of a fused pair's B; None if it is not adapted."""
    if f"{name}.A" in t:
        return t[f"{name}.A"], t[f"{name}.B"], scale_of(c, name)
    stem, _, part = name.rpartition(".")
    if f"{stem}.qkv.A" not in t or part not in ("q", "k", "v"):
        return None
    before = {"q": (), "k": ("q",), "v": ("q", "k")}[part]
    at = sum(t[f"{stem}.{one}.weight"].shape[0] for one in before)
    B = t[f"{stem}.qkv.B"][at : at + t[f"{name}.weight"].shape[0]]  # (out of q, k and v, r) -> (out,r)
    return t[f"{stem}.qkv.A"], B, scale_of(c, f"{stem}.qkv")


def norm_of(t: Inputs, c: Scalars, name: str, x: Tracked) -> Tracked:
    """T3 or T4."""
    inputs = {"x": x, "w": t[f"{name}.weight"], "b": t.get(f"{name}.bias")}
    return (rms_norm if c["norm"] == "rms" else layer_norm)(inputs, c)["y"]


def self_attention(t: Inputs, c: Scalars, i: int, x: Tracked, positions: Array) -> Tracked:
    """T9 to T11, with their four projections. x (N,T,D) -> (N,T,D)."""
    N, T, D = x.shape
    name, K = f"layers.{i}.attn", D // c["n_head"]
    q, k, v = (
        projected(t, c, f"{name}.{part}", x).reshape(N, T, heads, K).swapaxes(1, 2)
        for part, heads in (("q", c["n_head"]), ("k", c["n_kv_head"]), ("v", c["n_kv_head"]))
    )
    if c["positions"] == "rotary":
        q, k = turned(q, positions, c["rope_theta"]), turned(k, positions, c["rope_theta"])
    mask, P = t.get("mask"), c.get("prefix", 0)
    if P:
        own = (t[f"{name}.prefix.{part}"].spread((N, c["n_kv_head"], P, K)) for part in "kv")
        k, v = (joined([prefix, x], 2) for prefix, x in zip(own, (k, v), strict=True))  # (N,G,T,K) -> (N,G,P+T,K)
        mask = None if mask is None else np.hstack([np.ones((N, P), dtype=bool), mask])
    y = attended(q, k, v, c["causal"], mask).swapaxes(1, 2).reshape(N, T, D)
    return projected(t, c, f"{name}.o", y)


def feed_forward(t: Inputs, c: Scalars, i: int, x: Tracked) -> Tracked:
    """T5 to T7. x (N,T,D) -> (N,T,D)."""
    name = f"layers.{i}.mlp"
    up = projected(t, c, f"{name}.up", x)
    if c["activation"] == "silu_gated":
        h = silu_of(projected(t, c, f"{name}.gate", x)) * up
    else:
        h = gelu_of(up) if c["activation"] == "gelu" else gelu_tanh_of(up)
    return projected(t, c, f"{name}.down", h)


def block(t: Inputs, c: Scalars, i: int, x: Tracked, positions: Array) -> Tracked:
    """T13: x + f(norm(x)), or norm(x + f(x)), for attention and then the feed-forward half; f may end in a norm."""
    for half, f in (("norm1", partial(self_attention, positions=positions)), ("norm2", feed_forward)):
        name = f"layers.{i}.{half}"
        y = f(t, c, i, norm_of(t, c, name, x) if c["norm_first"] else x)
        y = norm_of(t, c, f"{name}_out", y) if c.get("norm_outputs") else y
        x = x + y if c["norm_first"] else norm_of(t, c, name, x + y)
    return x


def logits_of(t: Inputs, c: Scalars) -> Tracked:
    """T14: (N,T,V), (N,T,labels), or (N,labels) from the one token that a classifier reads."""
    tokens, mask = t["tokens"], t.get("mask")
    N, T = tokens.shape
    positions = np.arange(T) if mask is None else np.maximum(mask.cumsum(axis=1) - 1, 0)
    x = t["embed.tokens"][tokens]
    if c["positions"] == "learned":
        x = x + t["embed.positions"][positions + c["position_offset"]]
    if "token_types" in t:
        x = x + t["embed.types"][t["token_types"]]
    if not c["norm_first"]:
        x = norm_of(t, c, "embed.norm", x)
    for i in range(c["n_layer"]):
        x = block(t, c, i, x, positions)
    if c["norm_first"]:
        x = norm_of(t, c, "norm", x)
    if c["head"] == "classify":
        seen = np.ones((N, T), dtype=bool) if mask is None else mask
        read = T - 1 - seen[:, ::-1].argmax(axis=1) if c["causal"] else seen.argmax(axis=1)
        x = x[np.arange(N), read]
        if not c["causal"]:
            return projected(t, c, "head", ACTIVATIONS[c.get("pooler", "tanh")](projected(t, c, "pooler", x)))
    return projected(t, c, "head", x * c["head_scale"] if "head_scale" in c else x)


def model(t: Inputs, c: Scalars) -> Outputs:
    logits = logits_of(t, c)
    outputs = {"loss": mean_loss(logits, t["targets"])}
    return outputs if "mask" in t and c["head"] != "classify" else {"logits": logits, **outputs}


def merge_model(t: Inputs, c: Scalars) -> Outputs:
    """L5 of each adapted matrix, wide inside; of a tied head that is adapted the token table is a copy, which stays."""
    W = {name: Tracked(x.value) for name, x in t.items() if not name.endswith((".A", ".B"))}
    for name in ("head", *(name.removesuffix(".weight") for name in t if name.endswith(".weight"))):
        if (pair := pair_of(t, c, name)) is not None:
            A, B, s = pair
            W[f"{name}.weight"] = stored(weight_of(t, name).inside + (B.inside @ A.inside) * s, c["dtype"])
    return W


def generate(t: Inputs, c: Scalars) -> Outputs:
    """T16, without a cache; a text at a time where each has its own adapter."""
    parts = [alone(t, c, n) for n in range(len(t["tokens"]))] if "rows" in t else [(t, c)]
    made = [continued(*part) for part in parts]
    outputs = {"tokens": Tracked(np.concatenate([tokens for tokens, _ in made]))}
    return {**outputs, "logits": joined([logits for _, logits in made], 0)} if c.get("logits") else outputs


def alone(t: Inputs, c: Scalars, n: int) -> tuple[Inputs, Scalars]:
    """L7: one text of a batch, and its own adapter."""
    own: dict[str, Any] = {**t, **{name: t[name][n : n + 1] for name in ("tokens", "mask") if name in t}}
    if t["rows"][n] < 0:
        return own, c
    stem = f"adapters.{t['rows'][n]}."
    own |= {name.removeprefix(stem): x for name, x in t.items() if name.startswith(stem)}
    return own, {**c, **c["adapters"][t["rows"][n]]}


def continued(t: Inputs, c: Scalars) -> tuple[Array, Tracked]:
    """The tokens, and the logits that chose each new one: (N,T) -> (N,T+n), (N,n,V)."""
    chosen = []
    for _ in range(c["n"]):
        chosen.append(logits_of(t, c)[:, -1:])
        new = chosen[-1].value.argmax(axis=-1)
        t = {**t, "tokens": np.concatenate([t["tokens"], new], axis=1)}
        if "mask" in t:
            t["mask"] = np.concatenate([t["mask"], np.ones(new.shape, dtype=bool)], axis=1)
    return t["tokens"], joined(chosen, 1)


def sample(t: Inputs, c: Scalars) -> Outputs:
    """T16: the likeliest first; what top_k and top_p leave, in proportion; the first whose running sum passes u."""
    chosen = []
    for logits, u in zip(t["logits"].value, t["u"].value, strict=True):
        order = np.argsort(-logits, kind="stable")
        p = np.exp((logits[order] - logits.max()) / c["temperature"])
        if c["top_k"] is not None:
            p[c["top_k"] :] = 0
        p /= p.sum()
        if c["top_p"] is not None:
            p = np.where(np.cumsum(p) - p < c["top_p"], p, 0)
            p /= p.sum()
        chosen.append(order[np.searchsorted(np.cumsum(p), u)])
    return {"tokens": Tracked(chosen)}


# --- O1 to O4 -----------------------------------------------------------------------------------------------------


def adamw(t: Inputs, c: Scalars) -> Outputs:
    p, g, lr, step = t["p"], t["g"], c["lr"], c["step"]
    m = t["m"] * c["beta1"] + g * (1 - c["beta1"])
    v = t["v"] * c["beta2"] + g * g * (1 - c["beta2"])
    m_hat, v_hat = m / (1 - c["beta1"] ** step), v / (1 - c["beta2"] ** step)
    return {"p": p * (1 - lr * c["weight_decay"]) - m_hat / (sqrt(v_hat) + c["eps"]) * lr, "m": m, "v": v}


def warmup_cosine(t: Inputs, c: Scalars) -> Outputs:
    steps, warmup, total = t["steps"], c["warmup"], c["total"]
    up = Tracked(steps + 1.0) / max(warmup, 1)
    done = Tracked(np.minimum(steps - warmup, total - warmup) * 1.0) / max(total - warmup, 1)
    down = (cos(done * math.pi) + 1) * 0.5
    first = (steps < warmup) * 1.0
    return {"factor": up * first + down * (1 - first)}


def clip(t: Inputs, c: Scalars) -> Outputs:
    names = sorted(name for name in t if name.startswith("g"))
    norms = [
        frobenius(t[name].inside).into(t[name].precision) for name in names
    ]  # the norm of norms: of all squares it rounds less
    total = norms[0] * norms[0]
    for one in norms[1:]:
        total = total + one * one
    norm = sqrt(total)
    factor = tracked(c["max_norm"]) / norm if norm.value > c["max_norm"] else tracked(1.0)
    return {"norm": norm, **{f"clipped_{name}": t[name] * factor for name in names}}


# --- A1, A2 --------------------------------------------------------------------------------------------------------


def turn(S: Array, E: float, k: int) -> float:
    """How far the k leading singular directions turn, on either side, as their matrix moves by E: the largest sine.

    At most norm(E) / (sigma_k - sigma_{k+1} - norm(E)) (Wedin 1972).
    """
    below = S[k] if k < len(S) else 0.0
    return float(E / (S[k - 1] - below - E))


def moved(X: Tracked, k: int, G: Array) -> float:
    """By how much tr(Q G) moves, Q the projection on X's k leading right-singular directions, G (n,n) symmetric.

    With X = P diag(S) V^T, F = P^T E V and M = V^T G V, the projection moves by
    Z_ba = (sigma_a F_ab + sigma_b F_ba) / (sigma_a^2 - sigma_b^2) between the directions a <= k < b, so that tr(Q G)
    does by 2 sum Z_ba M_ba, at most 2 norm(E) times the root of
    sum M_ba^2 (sigma_a^2 + sigma_b^2) / (sigma_a^2 - sigma_b^2)^2.
    """
    _, S, Vt, E = decomposed(X)
    sigma = np.zeros(len(Vt))
    sigma[: len(S)] = S
    a, b = sigma[:k, None], sigma[None, k:]
    M = Vt[:k] @ G @ Vt[k:].T
    return 2 * E * float(np.sqrt((M**2 * (a**2 + b**2) / (a**2 - b**2) ** 2).sum()))


def leading(X: Tracked, k: int) -> Array:
    """The projection on X's k leading right-singular directions. -> (n,n)."""
    Vt = decomposed(X)[2][:k]
    return Vt.T @ Vt


def subspace_similarity(t: Inputs, c: Scalars) -> Outputs:
    """What is of second order in the turns of both is within 8 times the square of their sum."""
    A, other = t["A"], t["other"]
    (r, q), (U, V) = (len(A.value), len(other.value)), (Tracked(decomposed(x)[2][: len(x.value)]) for x in (A, other))
    shared = U @ V.mT  # (r,in) (in,q) -> (r,q)
    square = Tracked(np.tri(r)) @ (shared * shared) @ Tracked(np.tri(q)).mT
    turns = np.add.outer(*([turn(*decomposed(x)[1::2], k + 1) for k in range(len(x.value))] for x in (A, other)))
    error = square.error + square.value * (skew(A) + skew(other)) + 8 * turns**2
    for i, j in np.ndindex(r, q):
        error[i, j] += moved(A, i + 1, leading(other, j + 1)) + moved(other, j + 1, leading(A, i + 1))
    return {"phi": Tracked(square.value, error) / lesser(r, q)}


def lesser(r: int, q: int) -> Array:
    """min(i, j), at [i-1, j-1]. -> (r,q)."""
    return np.minimum(np.arange(1, r + 1)[:, None], np.arange(1, q + 1))


def frobenius(x: Tracked) -> Tracked:
    """The root of the sum of the squares."""
    return sqrt((x * x).sum())


def amplification(t: Inputs, c: Scalars) -> Outputs:
    """norm_F(dW) is that of its elements, or of its singular values, which move by norm(E) in all (Mirsky 1960).

    U and V are found from dW, or from B and A, whichever moves norm_F(U^T W V)^2 more; what is of second order in their
    turns is within 8 times the square of their sum, times norm_F(W)^2.
    """
    W, dW, r = t["W0"], (t["B"] @ t["A"]) * scale(c), c["r"]
    P, _, Qt, E = decomposed(dW)
    update, in_update = frobenius(dW), frobenius(Tracked(P[:, :r].T) @ W @ Tracked(Qt[:r].T))
    update = Tracked(update.value, update.error + E)
    to_V, to_U = W.value.T @ leading(dW.mT, r) @ W.value, W.value @ leading(dW, r) @ W.value.T
    ways = [(dW, dW.mT), (t["A"], t["B"].mT)]
    square = max(moved(of_V, r, to_V) + moved(of_U, r, to_U) for of_V, of_U in ways)
    turns = max(sum(turn(*decomposed(x)[1::2], r) for x in way) for way in ways)
    second = 8 * turns**2 * np.linalg.norm(W.value) ** 2
    by = (square + second) / (2 * in_update.value) + in_update.value * skew(dW)
    in_update = Tracked(in_update.value, in_update.error + by)
    _, S_W, _, E_W = decomposed(W)
    in_weight = frobenius(Tracked(S_W[:r]))
    in_weight = Tracked(in_weight.value, in_weight.error + E_W)
    return {"update": update, "in_update": in_update, "in_weight": in_weight, "factor": update / in_update}
