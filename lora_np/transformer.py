"""The transformer: forward and backward, as a composition of `ops` and `lora`.

Each backward stands beneath its forward and mirrors it. A forward puts what its backward needs into `saved`, under the
name of what it belongs to; backward takes it out where it uses it, so memory falls, and puts the gradients of what is
trained into `grads`. L1, T9, ... number the statements of the specification (spec/statements.md); "paper" is Hu et al.
2021.

Letters: N batch, T tokens, D width, H heads of width K, G key/value heads, S keys, P keys of a prefix, F feed-forward
width, J buckets of distance. A state is (N,T,D), or packed to its M rows that are no padding, (M,D): `..., D`. Its
`Layout` says which tokens the rows are.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from .backend import Array, xp
from .batch import Batch
from .binding import SOURCE, AdaptedModel
from .distance import PositionBias, deberta_buckets, t5_buckets
from .dora import dora_embedding, dora_embedding_backward, dora_linear, dora_linear_backward
from .layout import Layout
from .lora import lora_embedding, lora_embedding_backward, lora_linear, lora_linear_backward
from .model import NORMS
from .ops import (
    activation_backward,
    attention,
    attention_backward,
    bias_backward,
    embedding,
    embedding_backward,
    gelu,
    gelu_tanh,
    layer_norm,
    layer_norm_backward,
    linear,
    linear_backward,
    linear_weight_backward,
    norm_weight_backward,
    relu,
    rms_norm,
    rms_norm_backward,
    silu,
    tanh,
)
from .storage import widened
from .threads import map_parts

Activations: TypeAlias = dict[str, Any]  # what forward saves for backward
Grads: TypeAlias = dict[str, Array]


# --- Matrices and norms by name ------------------------------------------------------------------------------------


def project(model: AdaptedModel, name: str, x: Array, at: Layout, saved: Activations) -> Array:
    """T2, L2, L10: the matrix `name`, with its update if it has one. x (..., in) -> (..., out). at numbers its
    dropout."""
    weight = model.weight_name(name)
    W0, b, update = model.weights[weight], model.weights.get(f"{name}.bias"), model.updates.get(name)
    if update is None:
        saved[name] = x if weight in model.trained else None
        return linear(x, W0, b)
    A, B, s, mask = update.A, update.B, update.s, model.dropout_mask(name, x, at)
    if update.m is None:
        h, saved[name] = lora_linear(x, W0, b, A, B, s, dropout_mask=mask)
    else:
        h, saved[name] = dora_linear(x, W0, b, A, B, s, update.m, norm=update.c, dropout_mask=mask)
    return h


def project_backward(model: AdaptedModel, name: str, dy: Array, saved: Activations, grads: Grads) -> Array | None:
    """T2, L4, L10: dy (..., out) -> dx (..., in); None where nothing below is trained. Gradients go into grads."""
    kept, weight, need_dx = saved.pop(name), model.weight_name(name), model.trained_below(name)
    if f"{name}.bias" in model.trained:
        add(grads, f"{name}.bias", bias_backward(dy))
    if name in model.updates:
        backward = lora_linear_backward if model.updates[name].m is None else dora_linear_backward
        dx, *factors = backward(dy, kept, need_dx=need_dx)
        for factor, d in zip("ABm", factors, strict=False):  # m with DoRA alone
            add(grads, f"{name}.{factor}", d)
        return dx
    if weight in model.trained:
        add(grads, weight, linear_weight_backward(dy, kept))
    return linear_backward(dy, model.weights[weight]) if need_dx else None


def add(grads: Grads, name: str, value: Array) -> None:
    """Adds to a gradient that comes in parts: the head's in chunks of rows, a tied table's from both ends."""
    if name in grads:
        grads[name] += value
    else:
        grads[name] = value


def norm(model: AdaptedModel, name: str, x: Array, saved: Activations) -> Array:
    """T3, or without a bias T4. x (..., D) -> (..., D)."""
    w, b, eps = model.weights[f"{name}.weight"], model.weights.get(f"{name}.bias"), model.config.eps
    if b is not None:
        y, saved[name] = layer_norm(x, w, b, eps)
    else:
        y, saved[name] = rms_norm(x, 1 + w if model.config.norm == "rms_1p" else w, eps)
    return y


def norm_backward(model: AdaptedModel, name: str, dy: Array, saved: Activations, grads: Grads) -> Array:
    """T3 or T4: dy (..., D) -> dx (..., D). Gradients go into grads."""
    kept = saved.pop(name)
    if f"{name}.weight" in model.trained:
        add(grads, f"{name}.weight", norm_weight_backward(dy, kept))
    if f"{name}.bias" in model.trained:
        add(grads, f"{name}.bias", bias_backward(dy))
    return layer_norm_backward(dy, kept) if f"{name}.bias" in model.weights else rms_norm_backward(dy, kept)


# --- T1: the embedding ---------------------------------------------------------------------------------------------


def embed(model: AdaptedModel, batch: Batch, at: Layout) -> tuple[Array, Activations]:
    """T1: token, times a constant, + position + type; and the norm over their sum in post-norm models. -> (..., D)."""
    E, update = model.weights["embed.tokens"], model.updates.get("embed.tokens")
    saved: Activations = {"embed.tokens": at.pack(xp.asarray(batch.tokens))}  # (N,T) -> (...)
    if update is None:
        x = embedding(saved["embed.tokens"], E)
    elif update.m is None:
        x, saved["update"] = lora_embedding(saved["embed.tokens"], E, update.A, update.B, update.s)
    else:
        assert update.c is not None  # `bind` gives it
        x, saved["update"] = dora_embedding(saved["embed.tokens"], E, update.A, update.B, update.s, update.m, update.c)
    x *= model.config.embed_scale
    if at.positions is not None:
        x += embedding(at.positions, model.weights["embed.positions"])
        saved["embed.positions"] = at.positions
    if batch.token_types is not None:
        saved["embed.types"] = at.pack(xp.asarray(batch.token_types))
        x += embedding(saved["embed.types"], model.weights["embed.types"])
    if not model.config.norm_first:
        x = norm(model, "embed.norm", x, saved)
    return x, saved


def embed_backward(model: AdaptedModel, dx: Array, saved: Activations, grads: Grads) -> None:
    """T1: dx (..., D), into the gradients of the tables that are trained."""
    if not model.config.norm_first:
        dx = norm_backward(model, "embed.norm", dx, saved, grads)
    for name in ("embed.positions", "embed.types"):
        if name in model.trained:
            ids = xp.broadcast_to(saved[name], dx.shape[:-1])
            grads[name] = embedding_backward(dx, ids, len(model.weights[name]))
    dx = dx * model.config.embed_scale
    if "update" in saved:
        dora = "embed.tokens.m" in model.trained
        factors = (dora_embedding_backward if dora else lora_embedding_backward)(dx, saved.pop("update"))
        grads |= {f"embed.tokens.{factor}": d for factor, d in zip("ABm", factors, strict=False)}
    if "embed.tokens" in model.trained:
        n = len(model.weights["embed.tokens"])
        add(grads, "embed.tokens", embedding_backward(dx, saved["embed.tokens"], n))


# --- T9 to T11: attention ------------------------------------------------------------------------------------------


def attend(
    model: AdaptedModel, i: int, part: str, x_q: Array, at_q: Layout, x: Array, at: Layout, saved: Activations
) -> Array:
    """T9 to T11, T17: layer i's attention, with Wq, Wk, Wv and Wo (paper 4.2). Queries come from x_q (..., D), laid out
    by at_q; keys and values from x (..., D), by at. The two are the same but for a last layer of which one token of
    each sequence is read, where T = 1 for the queries, and for an encoder's states (T20). -> h (..., D), laid out as
    x_q."""
    name, config = f"layers.{i}.{part}", model.config
    q = query_or_key(model, i, f"{name}.q", x_q, at_q, saved)  # (..., D) -> (N,H,T,K)
    k, v = keys_values(model, i, part, x, at, saved)  # (..., D) -> 2 (N,G,T,K)
    k, v, mask = context(model, i, k, v, at)  # (N,G,T,K) -> (N,G,S,K); (N,S)
    bias = position_bias(model, name, q, k, saved)  # T18, T19; None in most models
    y, saved[name] = attention(
        q, k, v, causal=at.causal, mask=mask, window=config.window_of(i), scale=config.scale, bias=bias
    )
    return project(model, f"{name}.o", at_q.rows(y), at_q, saved)  # (N,H,T,K) -> (..., H*K) -> (..., D)


def attend_backward(
    model: AdaptedModel, i: int, part: str, dh: Array, at_q: Layout, at: Layout, saved: Activations, grads: Grads
) -> list[Array | None]:
    """T9 to T11: dh (..., D), laid out as x_q -> dx_q (..., D), then dx by way of k, and by way of v (..., D), laid out
    as x; each None where nothing below Wq, Wk and Wv is trained. `heads` and `rows` are each other's backward."""
    name = f"layers.{i}.{part}"
    dy = project_backward(model, f"{name}.o", dh, saved, grads)  # (..., D) -> (..., H*K)
    if dy is None:  # nothing below Wo is trained
        return [None, None, None]
    dy = at_q.heads(dy, model.config.head_width)  # (..., H*K) -> (N,H,T,K)
    dq, dk, dv, dbias = attention_backward(dy, saved.pop(name))  # (N,H,T,K), 2 (N,G,S,K)
    position_bias_backward(model, name, dbias, dq, dk, saved, grads)  # may add to dq and dk
    dk, dv = context_backward(model, i, dk, dv, grads)  # (N,G,S,K) -> (N,G,T,K)
    dx_q = query_or_key_backward(model, i, f"{name}.q", dq, at_q, saved, grads)  # (N,H,T,K) -> (..., D)
    dx_k = query_or_key_backward(model, i, f"{name}.k", dk, at, saved, grads)  # (N,G,T,K) -> (..., D)
    dx_v = project_backward(model, f"{name}.v", at.rows(dv), saved, grads)  # (N,G,T,K) -> (..., G*K) -> (..., D)
    return [dx_q, dx_k, dx_v]


def query_or_key(model: AdaptedModel, i: int, name: str, x: Array, at: Layout, saved: Activations) -> Array:
    """T9, T11, T17: Wq or Wk, each head normed where the model does so, and turned. x (..., D) -> (N,H or G,T,K)."""
    y = at.heads(project(model, name, x, at, saved), model.config.head_width)  # (..., H*K) -> (N,H,T,K)
    if model.config.qk_norm:
        y = norm(model, f"{name}_norm", y, saved)
    return at.rotate(y, i)


def query_or_key_backward(
    model: AdaptedModel, i: int, name: str, dy: Array, at: Layout, saved: Activations, grads: Grads
) -> Array | None:
    """T9, T11, T17: dy (N,H or G,T,K) -> dx (..., D), or None where nothing below is trained."""
    dy = at.rotate_backward(dy, i)
    if model.config.qk_norm:
        dy = norm_backward(model, f"{name}_norm", dy, saved, grads)
    return project_backward(model, name, at.rows(dy), saved, grads)  # (N,H,T,K) -> (..., H*K) -> (..., D)


def keys_values(
    model: AdaptedModel, i: int, part: str, x: Array, at: Layout, saved: Activations
) -> tuple[Array, Array]:
    """T9: x (..., D) -> 2 (N,G,T,K); of an encoder's states, in decoding, those that were made once (T16, T20)."""
    name = f"layers.{i}.{part}"
    if name in model.source_kv:
        return model.source_kv[name]
    k = query_or_key(model, i, f"{name}.k", x, at, saved)
    return k, at.heads(project(model, f"{name}.v", x, at, saved), model.config.head_width)


def context(model: AdaptedModel, i: int, k: Array, v: Array, at: Layout) -> tuple[Array, Array, Array | None]:
    """T9, T16: the prefix, the cache, then k and v (N,G,T,K) -> (N,G,S,K); and the mask (N,S) over them all, if any.

    A prefix is weights of the model, keys and values that have no positions (prefix tuning, Li and Liang 2021). The
    cache is extended by k and v, in place.
    """
    mask, P = at.mask, model.config.prefix
    if at.cache is not None:
        k, v = at.cache.extend(i, k, v)
    if P:
        k, v = (_behind(model.weights[f"layers.{i}.attn.prefix.{part}"], x) for part, x in (("k", k), ("v", v)))
    if P and mask is not None:
        mask = xp.concatenate([xp.ones((at.N, P), dtype=bool), mask], axis=1)  # (N,S) -> (N,P+S)
    return k, v, mask


def _behind(prefix: Array, x: Array) -> Array:
    """The prefix (G,P,K), or (N,G,P,K), and x (N,G,S,K) behind it -> (N,G,P+S,K)."""
    return xp.concatenate([xp.broadcast_to(prefix, (len(x), *prefix.shape[-3:])), x], axis=2)


def context_backward(model: AdaptedModel, i: int, dk: Array, dv: Array, grads: Grads) -> tuple[Array, Array]:
    """T9: dk, dv (N,G,S,K) -> those of k and v (N,G,T,K); the prefix's, a sum over the sequences, into grads.

    Here S = P + T: with a cache there is no backward.
    """
    P = model.config.prefix
    for part, d in (("k", dk), ("v", dv)):
        if f"layers.{i}.attn.prefix.{part}" in model.trained:
            grads[f"layers.{i}.attn.prefix.{part}"] = d[:, :, :P].sum(axis=0)  # (N,G,P,K) -> (G,P,K)
    return dk[:, :, P:], dv[:, :, P:]


# --- T5 to T7: the feed-forward half -------------------------------------------------------------------------------

ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "silu": silu, "relu": relu, "tanh": tanh}


def feed_forward(model: AdaptedModel, i: int, x: Array, at: Layout, saved: Activations) -> Array:
    """T5 to T7: down(act(up(x))), or gated, down(act(gate(x)) * up(x)). x (..., D) -> (..., F) -> (..., D)."""
    name, activation = f"layers.{i}.mlp", ACTIVATIONS[model.config.activation.removesuffix("_gated")]
    up = project(model, f"{name}.up", x, at, saved)
    gate = project(model, f"{name}.gate", x, at, saved) if model.config.gated else up
    act, d_gate = activation(gate)  # d act / d gate
    if model.config.gated:
        saved[name], act, d_gate = act, act * up, xp.multiply(d_gate, up, out=d_gate)  # d(act * up) / d up, / d gate
    saved[f"{name}.act"] = d_gate
    return project(model, f"{name}.down", act, at, saved)


def feed_forward_backward(model: AdaptedModel, i: int, dh: Array, saved: Activations, grads: Grads) -> Array | None:
    """T5 to T7: dh (..., D) -> dx (..., D), a sum over gate and up where it is gated; None as in attention."""
    name = f"layers.{i}.mlp"
    d_down = project_backward(model, f"{name}.down", dh, saved, grads)  # (..., D) -> (..., F)
    if d_down is None:  # nothing below W_down is trained
        return None
    d_act = activation_backward(d_down, saved.pop(f"{name}.act"))
    if not model.config.gated:
        return project_backward(model, f"{name}.up", d_act, saved, grads)
    dx_gate = project_backward(model, f"{name}.gate", d_act, saved, grads)
    dx_up = project_backward(model, f"{name}.up", d_down * saved.pop(name), saved, grads)
    return None if dx_gate is None or dx_up is None else dx_gate + dx_up


# --- T18, T19: what scores gain by distance ------------------------------------------------------------------------


def position_bias(model: AdaptedModel, name: str, q: Array, k: Array, saved: Activations) -> PositionBias | None:
    """T18, T19: what is added to the scores of q (N,H,T,K) and k (N,G,S,K); None where nothing is.

    T18: a row of the table (J,H) for each bucket of distance. T19: each query with the keys of the buckets, and each
    key with their queries.
    """
    config, (N, H, T, _), S = model.config, q.shape, k.shape[2]
    n, distance = config.score_buckets, xp.arange(1 - S, T)
    if n == 0 or name.endswith(".cross"):
        return None
    if not config.disentangled:
        E = widened(model.weights["embed.score_bias"])  # (J,H)
        bucket, trained = t5_buckets(distance, n, config.score_distance, causal=config.causal), model.trained
        return PositionBias(bucket, xp.broadcast_to(E.T[:, None], (N, H, T, n)), trained="embed.score_bias" in trained)
    q_pos, k_pos = position_heads(model, name, N, saved)  # 2 (1,H,J,K)
    saved[f"{name}.bias"] = q, k, q_pos, k_pos
    c2p = (config.scale * q) @ k_pos.swapaxes(-1, -2)  # (N,H,T,K) (1,H,K,J) -> (N,H,T,J)
    p2c = (config.scale * k) @ q_pos.swapaxes(-1, -2)  # (N,H,S,J)
    return PositionBias(deberta_buckets(distance, n, config.score_distance), c2p, p2c)


def position_bias_backward(
    model: AdaptedModel, name: str, dbias: PositionBias | None, dq: Array, dk: Array, saved: Activations, grads: Grads
) -> None:
    """T18, T19: the gradients of the tables, and of Wq and Wk by way of T19's; its share is added to dq (N,H,T,K) and
    dk (N,H,S,K)."""
    if dbias is None:
        return
    if dbias.p2c is None:
        add(grads, "embed.score_bias", dbias.c2p.sum(axis=(0, 2)).T)  # (N,H,T,J) -> (J,H)
        return
    q, k, q_pos, k_pos = saved.pop(f"{name}.bias")
    c2p, p2c = model.config.scale * dbias.c2p, model.config.scale * dbias.p2c
    dq += c2p @ k_pos  # (N,H,T,J) (1,H,J,K) -> (N,H,T,K)
    dk += p2c @ q_pos
    dk_pos = (c2p.swapaxes(-1, -2) @ q).sum(axis=0, keepdims=True)  # (N,H,J,T) (N,H,T,K) -> (1,H,J,K)
    dq_pos = (p2c.swapaxes(-1, -2) @ k).sum(axis=0, keepdims=True)
    position_heads_backward(model, name, dq_pos, dk_pos, saved, grads)


def position_heads(model: AdaptedModel, name: str, N: int, saved: Activations) -> tuple[Array, Array]:
    """T19: the query and the key of each bucket: Wq and Wk, updates and all, of the normed table of distances (J,D).

    -> 2 (1,H,J,K), or (N,H,J,K) with an adapter for each row.
    """
    at, inner, E = position_layout(model, N), Activations(), widened(model.weights["embed.distances"])
    x = norm(model, "embed.distances_norm", xp.broadcast_to(E, (at.N, *E.shape)), inner)  # (J,D) -> (1,J,D)
    q, k = (at.heads(project(model, f"{name}.{one}", x, at, inner), model.config.head_width) for one in "qk")
    saved[f"{name}.positions"] = inner
    return q, k


def position_heads_backward(
    model: AdaptedModel, name: str, dq: Array, dk: Array, saved: Activations, grads: Grads
) -> None:
    """T19: 2 (1,H,J,K), into the gradients of Wq, Wk and the table."""
    at, inner = position_layout(model, 1), saved.pop(f"{name}.positions")
    dx_q = project_backward(model, f"{name}.q", at.rows(dq), inner, grads)  # (1,H,J,K) -> (1,J,H*K) -> (1,J,D)
    dx_k = project_backward(model, f"{name}.k", at.rows(dk), inner, grads)
    if dx_q is not None and dx_k is not None and any(one.startswith("embed.distances") for one in model.trained):
        dx = norm_backward(model, "embed.distances_norm", dx_q + dx_k, inner, grads)[0]  # (1,J,D) -> (J,D)
        if "embed.distances" in model.trained:
            add(grads, "embed.distances", dx)


def position_layout(model: AdaptedModel, N: int) -> Layout:
    """T19: the rows of the table of distances, which dropout numbers as those of a sequence that no batch has."""
    return Layout(N if model.by_row else 1, 2 * model.config.score_buckets, first=2**31)


# --- T13: the block, in sublayers of one form ----------------------------------------------------------------------


def sublayer(model: AdaptedModel, depth: int, x: Array, before: Layout, after: Layout) -> tuple[Array, Activations]:
    """T13: x + f(norm(x)) in pre-norm models, norm(x + f(x)) in post-norm ones; f may end in a norm of its own.
    x (..., D) -> (..., D).

    f is a layer's attention, its second attention where there is an encoder (T20), or its feed-forward half: by depth,
    from the bottom. before, after: the layouts of x and of the result, which has fewer rows where only these are read.
    """
    i, part, name = place_of(model, depth)
    saved = Activations()
    h = norm(model, name, x, saved) if model.config.norm_first else x
    h_after = before.select(h, after)
    if part == "mlp":
        y = feed_forward(model, i, h_after, after, saved)
    else:
        y = attend(model, i, part, h_after, after, *model.attended(part, h, before), saved)
    if model.config.norm_outputs:
        y = norm(model, f"{name}_out", y, saved)
    y += before.select(x, after)
    return (y if model.config.norm_first else norm(model, name, y, saved)), saved


def sublayer_backward(
    model: AdaptedModel, depth: int, dy: Array, before: Layout, after: Layout, saved: Activations, grads: Grads
) -> Array | None:
    """T13: dy (..., D) -> dx (..., D), or None where nothing below is trained."""
    i, part, name = place_of(model, depth)
    dy = dy if model.config.norm_first else norm_backward(model, name, dy, saved, grads)
    df = norm_backward(model, f"{name}_out", dy, saved, grads) if model.config.norm_outputs else dy
    others: list[Array | None] = []
    if part == "mlp":
        dh = feed_forward_backward(model, i, df, saved, grads)
    else:
        _, at = model.attended(part, df, before)
        dh, *others = attend_backward(
            model, i, part, df, after, at, saved, grads
        )  # dh is laid out by after, others by at
    if part == "cross":  # they are the encoder's
        for d in others:
            if d is not None:
                add(grads, SOURCE, d)
        others = []
    if dh is None:
        return None
    dh = before.select_backward(dh, after)
    for d in others:
        dh += d
    dx = norm_backward(model, name, dh, saved, grads) if model.config.norm_first else dh
    return before.select_backward(dy, after) + dx  # the residual's, and f's


def in_parts(model: AdaptedModel, depth: int, x: Array, before: Layout, after: Layout) -> tuple[Array, Activations]:
    """T13: a sublayer; the feed-forward half, which works row by row, in parts of the rows that need not wait for each
    other. x (..., D) -> (..., D)."""
    parts = before.row_parts() if before is after and not model.by_row else []
    if len(parts) <= 1 or place_of(model, depth)[1] != "mlp":
        return sublayer(model, depth, x, before, after)
    all_rows = x.reshape(-1, x.shape[-1])  # (..., D) -> (M,D)

    def part(rows: slice) -> tuple[Array, Activations]:
        at = before.part(rows)
        return sublayer(model, depth, all_rows[rows], at, at)

    ys, saved = zip(*map_parts(part, parts), strict=True)
    return xp.concatenate(ys).reshape(x.shape), {"parts": saved}


def in_parts_backward(
    model: AdaptedModel, depth: int, dy: Array, before: Layout, after: Layout, saved: Activations, grads: Grads
) -> Array | None:
    """T13: dy (..., D) -> dx (..., D), or None where nothing below is trained; the parts' gradients meet in order."""
    if "parts" not in saved:
        return sublayer_backward(model, depth, dy, before, after, saved, grads)
    all_rows = dy.reshape(-1, dy.shape[-1])  # (..., D) -> (M,D)

    def part(rows: slice, kept: Activations) -> tuple[Array | None, Grads]:
        at, inner = before.part(rows), Grads()
        return sublayer_backward(model, depth, all_rows[rows], at, at, kept, inner), inner

    dxs = []
    for dx, inner in map_parts(lambda one: part(*one), zip(before.row_parts(), saved.pop("parts"), strict=True)):
        if dx is not None:
            dxs.append(dx)
        for name, value in inner.items():
            add(grads, name, value)
    return xp.concatenate(dxs).reshape(dy.shape) if dxs else None


def place_of(model: AdaptedModel, depth: int) -> tuple[int, str, str]:
    """The layer, the part and the norm of the sublayer at a depth."""
    i, which = divmod(depth, len(model.config.sublayers))
    part = model.config.sublayers[which]
    return i, part, f"layers.{i}.{NORMS[part]}"


# --- The whole model -----------------------------------------------------------------------------------------------


def states(model: AdaptedModel, batch: Batch, at: Layout, last: Layout) -> tuple[Array, list[Activations]]:
    """T13: the states after the last layer, and its norm in pre-norm models. tokens (N,T) -> (..., D).

    at, last: the layouts of the states, and of what the last layer gives. Kept is what backward will need: nothing
    below the lowest trained parameter; with activation checkpointing, the input of each sublayer alone.
    """
    x, saved = embed(model, batch, at)
    stack = [saved if model.lowest < (0, 0) else {}]
    for depth, before, after in sublayers(model, at, last):
        below = x
        x, saved = in_parts(model, depth, below, before, after)
        kept = {"x": below} if model.recompute else saved
        stack.append(kept if model.lowest < (depth + 1, 0) else {})
    if model.config.norm_first:
        stack.append({})
        x = norm(model, "norm", x, stack[-1])
    return x, stack


def states_backward(
    model: AdaptedModel, dx: Array, at: Layout, last: Layout, stack: list[Activations], grads: Grads
) -> None:
    """T13: dx (..., D), down to the lowest trained parameter."""
    if model.config.norm_first:
        dx = norm_backward(model, "norm", dx, stack.pop(), grads)
    for depth, before, after in reversed(sublayers(model, at, last)):
        saved = stack.pop()
        if model.lowest < (depth + 1, 0):  # something in this sublayer, or below it, is trained
            if model.recompute:
                _, saved = in_parts(model, depth, saved["x"], before, after)
            dx = in_parts_backward(model, depth, dx, before, after, saved, grads)  # type: ignore[assignment]
    if model.lowest < (0, 0):
        embed_backward(model, dx, stack.pop(), grads)


def sublayers(model: AdaptedModel, at: Layout, last: Layout) -> list[tuple[int, Layout, Layout]]:
    """The depth of each sublayer, and the layouts before and after it.

    Only the last layer leaves rows out: its attention does, or where that asks how far keys are from the queries'
    places, its feed-forward half.
    """
    end = model.config.depth - 1
    first = end if model.config.by_distance else end + 1 - len(model.config.sublayers)  # the one that leaves rows out
    return [(d, at if d <= first else last, at if d < first else last) for d in range(end + 1)]
