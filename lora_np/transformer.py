"""The transformer: forward and backward, as a composition of `ops` and `lora`.

Each backward stands beneath its forward and mirrors it. A forward puts what its backward needs into `saved`, under the
name of what it belongs to; backward takes it out where it uses it, so memory falls, and puts the gradients of what is
trained into `grads`. L1, T9, ... number the statements of the specification (spec/statements.md); "paper" is Hu et al.
2021.

Letters: N batch, T tokens, D width, H heads of width K, G key/value heads, S keys, P keys of a prefix, F feed-forward
width. A state is (N,T,D), or packed to its M rows that are no padding, (M,D): `..., D`. Its `Layout` says which tokens
the rows are.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from .backend import Array, xp
from .batch import Batch
from .binding import SOURCE, AdaptedModel
from .distance import ByDistance, deberta_buckets, t5_buckets
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
    widened,
)

Activations: TypeAlias = dict[str, Any]  # what forward saves for backward
Grads: TypeAlias = dict[str, Array]


# --- Matrices and norms by name ------------------------------------------------------------------------------------


def project(model: AdaptedModel, name: str, x: Array, at: Layout, saved: Activations) -> Array:
    """T2, L2: the matrix `name`, with its update if it has one. x (..., in) -> (..., out). at numbers its dropout."""
    weight = model.weight_name(name)
    W0, b, update = model.weights[weight], model.weights.get(f"{name}.bias"), model.updates.get(name)
    if update is None:
        saved[name] = x if weight in model.trained else None
        return linear(x, W0, b)
    mask = model.dropout_mask(name, x, at)
    h, saved[name] = lora_linear(x, W0, b, update.A, update.B, update.s, dropout_mask=mask)
    return h


def project_backward(model: AdaptedModel, name: str, dy: Array, saved: Activations, grads: Grads) -> Array | None:
    """T2, L4: dy (..., out) -> dx (..., in); None where nothing below is trained. Gradients go into grads."""
    kept, weight, need_dx = saved.pop(name), model.weight_name(name), model.trained_below(name)
    if f"{name}.bias" in model.trained:
        add(grads, f"{name}.bias", bias_backward(dy))
    if name in model.updates:
        dx, dA, dB = lora_linear_backward(dy, kept, need_dx=need_dx)
        add(grads, f"{name}.A", dA)
        add(grads, f"{name}.B", dB)
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
    """T3 or T4: as the configuration says. x (..., D) -> (..., D)."""
    w, eps = model.weights[f"{name}.weight"], model.config.eps
    if model.config.norm == "layer":
        y, saved[name] = layer_norm(x, w, model.weights[f"{name}.bias"], eps)
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
    return layer_norm_backward(dy, kept) if model.config.norm == "layer" else rms_norm_backward(dy, kept)


# --- T1: the embedding ---------------------------------------------------------------------------------------------


def embed(model: AdaptedModel, batch: Batch, at: Layout) -> tuple[Array, Activations]:
    """T1: token, times a constant, + position + type; and the norm over their sum in post-norm models. -> (..., D)."""
    E, update = model.weights["embed.tokens"], model.updates.get("embed.tokens")
    saved: Activations = {"embed.tokens": at.pack(xp.asarray(batch.tokens))}  # (N,T) -> (...)
    if update is None:
        x = embedding(saved["embed.tokens"], E)
    else:
        x, saved["update"] = lora_embedding(saved["embed.tokens"], E, update.A, update.B, update.s)
    if model.config.embed_scale != 1:
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
    if model.config.embed_scale != 1:
        dx = dx * model.config.embed_scale
    if "update" in saved:
        grads["embed.tokens.A"], grads["embed.tokens.B"] = lora_embedding_backward(dx, saved.pop("update"))
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
    q = at_q.heads(project(model, f"{name}.q", x_q, at_q, saved), config.n_head)  # (..., D) -> (..., H*K) -> (N,H,T,K)
    k, v = keys_values(model, name, x, at, saved)  # (..., D) -> 2 (N,G,T,K)
    if config.qk_norm:  # T17
        q, k = norm(model, f"{name}.q_norm", q, saved), norm(model, f"{name}.k_norm", k, saved)
    q, k = at_q.rotate(q, i), at.rotate(k, i)
    k, v, mask = context(model, i, k, v, at)  # (N,G,T,K) -> (N,G,S,K); (N,S)
    near = near_scores(model, name, q, k, saved)
    y, saved[name] = attention(
        q, k, v, causal=at.causal, mask=mask, window=config.window_of(i), scale=config.scale, near=near
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
    dy, kept = at_q.heads(dy, model.config.n_head), saved.pop(name)  # (..., H*K) -> (N,H,T,K)
    dnear = None if kept.near is None or not near_trained(model) else kept.near.zeros()
    dq, dk, dv = attention_backward(dy, kept, dnear=dnear)  # (N,H,T,K), 2 (N,G,S,K)
    if dnear is not None:
        near_scores_backward(model, name, dnear.ungrouped(), dq, dk, saved, grads)
    dk, dv = context_backward(model, i, dk, dv, grads)  # (N,G,S,K) -> (N,G,T,K)
    dq, dk = at_q.rotate_backward(dq, i), at.rotate_backward(dk, i)
    if model.config.qk_norm:
        dq = norm_backward(model, f"{name}.q_norm", dq, saved, grads)
        dk = norm_backward(model, f"{name}.k_norm", dk, saved, grads)
    dx_q = project_backward(model, f"{name}.q", at_q.rows(dq), saved, grads)  # (N,H,T,K) -> (..., H*K) -> (..., D)
    dx_k = project_backward(model, f"{name}.k", at.rows(dk), saved, grads)  # (N,G,T,K) -> (..., G*K) -> (..., D)
    dx_v = project_backward(model, f"{name}.v", at.rows(dv), saved, grads)
    return [dx_q, dx_k, dx_v]


def keys_values(model: AdaptedModel, name: str, x: Array, at: Layout, saved: Activations) -> tuple[Array, Array]:
    """T9: Wk and Wv. x (..., D) -> 2 (N,G,T,K); of an encoder's states, in decoding, those that were kept (T16)."""
    if name in model.kept:
        return model.kept[name]
    k = at.heads(project(model, f"{name}.k", x, at, saved), model.config.kv_heads)  # (..., G*K) -> (N,G,T,K)
    return k, at.heads(project(model, f"{name}.v", x, at, saved), model.config.kv_heads)


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


# --- T18, T19: what scores gain by distance ------------------------------------------------------------------------


def near_scores(model: AdaptedModel, name: str, q: Array, k: Array, saved: Activations) -> ByDistance | None:
    """T18, T19: q (N,H,T,K), k (N,H,S,K) -> what is added to their scores; None where nothing is.

    T18: a row of the table (B,H) for each bucket of distance. T19: each query with the key of a distance, and each key
    with its query.
    """
    config, (T, S) = model.config, (q.shape[2], k.shape[2])
    n, last, distance = config.score_buckets, config.score_distance, xp.arange(1 - S, T)
    if n == 0 or name.endswith(".cross"):
        return None
    if not config.disentangled:
        E = widened(model.weights["embed.score_bias"])
        return ByDistance(t5_buckets(distance, n, last, causal=config.causal), E.T[None, :, None])  # (1,H,1,B)
    q_far, k_far = far_heads(model, name, len(q), saved)  # 2 (1,H,2B,K)
    saved[f"{name}.near"] = q, k, q_far, k_far
    by_query = (config.scale * q) @ k_far.swapaxes(-1, -2)  # (N,H,T,K) (1,H,K,2B) -> (N,H,T,2B)
    by_key = (config.scale * k) @ q_far.swapaxes(-1, -2)  # (N,H,S,2B)
    return ByDistance(deberta_buckets(distance, n, last), by_query, by_key)


def near_trained(model: AdaptedModel) -> bool:
    """T18, T19: whether what is added to the scores needs a gradient: a trained table, or T19's, which q and k make."""
    return model.config.disentangled or "embed.score_bias" in model.trained


def near_scores_backward(
    model: AdaptedModel, name: str, dnear: ByDistance, dq: Array, dk: Array, saved: Activations, grads: Grads
) -> None:
    """T18, T19: from the gradient of what was added; T19's share is added to dq (N,H,T,K) and dk (N,H,S,K)."""
    if dnear.by_key is None:
        add(grads, "embed.score_bias", dnear.by_query[0, :, 0].T)  # (1,H,1,B) -> (B,H)
        return
    q, k, q_far, k_far = saved.pop(f"{name}.near")
    by_query, by_key = model.config.scale * dnear.by_query, model.config.scale * dnear.by_key
    dq += by_query @ k_far  # (N,H,T,2B) (1,H,2B,K) -> (N,H,T,K)
    dk += by_key @ q_far
    dk_far = (by_query.swapaxes(-1, -2) @ q).sum(axis=0, keepdims=True)  # (N,H,2B,T) (N,H,T,K) -> (1,H,2B,K)
    dq_far = (by_key.swapaxes(-1, -2) @ k).sum(axis=0, keepdims=True)
    far_heads_backward(model, name, dq_far, dk_far, saved, grads)


def far_heads(model: AdaptedModel, name: str, N: int, saved: Activations) -> tuple[Array, Array]:
    """T19: the query and the key of each bucket of distance: Wq and Wk, with their updates, of the normed table (2B,D).

    -> 2 (1,H,2B,K), or (N,H,2B,K) with an adapter for each row.
    """
    at, inner = far_layout(model, N), Activations()
    x = norm(model, "embed.distances_norm", widened(model.weights["embed.distances"]), inner)  # (2B,D)
    x = xp.broadcast_to(x, (at.N, *x.shape))  # (1,2B,D)
    q, k = (at.heads(project(model, f"{name}.{one}", x, at, inner), model.config.n_head) for one in "qk")
    saved[f"{name}.far"] = inner
    return q, k


def far_heads_backward(model: AdaptedModel, name: str, dq: Array, dk: Array, saved: Activations, grads: Grads) -> None:
    """T19: 2 (1,H,2B,K), into the gradients of Wq, Wk and the table."""
    at, inner = far_layout(model, 1), saved.pop(f"{name}.far")
    dx_q = project_backward(model, f"{name}.q", at.rows(dq), inner, grads)  # (1,H,2B,K) -> (1,2B,H*K) -> (1,2B,D)
    dx_k = project_backward(model, f"{name}.k", at.rows(dk), inner, grads)
    if dx_q is not None and dx_k is not None and any(one.startswith("embed.distances") for one in model.trained):
        dx = norm_backward(model, "embed.distances_norm", (dx_q + dx_k)[0], inner, grads)  # (2B,D)
        if "embed.distances" in model.trained:
            add(grads, "embed.distances", dx)


def far_layout(model: AdaptedModel, N: int) -> Layout:
    """T19: the rows of the table of distances, which dropout numbers as those of a sequence that no batch has."""
    return Layout(N if model.by_row else 1, 2 * model.config.score_buckets, first=2**31)


# --- T5 to T7: the feed-forward half -------------------------------------------------------------------------------

ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "silu": silu, "relu": relu, "tanh": tanh}


def feed_forward(model: AdaptedModel, i: int, x: Array, at: Layout, saved: Activations) -> Array:
    """T5 to T7: down(act(up(x))), or gated, down(act(gate(x)) * up(x)). x (..., D) -> (..., F) -> (..., D)."""
    name, activation = f"layers.{i}.mlp", ACTIVATIONS[model.config.activation.removesuffix("_gated")]
    up = project(model, f"{name}.up", x, at, saved)
    if model.config.gated:
        act, saved[f"{name}.act"] = activation(project(model, f"{name}.gate", x, at, saved))
        saved[name] = act, up
        return project(model, f"{name}.down", act * up, at, saved)
    act, saved[f"{name}.act"] = activation(up)
    return project(model, f"{name}.down", act, at, saved)


def feed_forward_backward(model: AdaptedModel, i: int, dh: Array, saved: Activations, grads: Grads) -> Array | None:
    """T5 to T7: dh (..., D) -> dx (..., D), a sum over gate and up where it is gated; None as in attention."""
    name = f"layers.{i}.mlp"
    d_down = project_backward(model, f"{name}.down", dh, saved, grads)  # (..., D) -> (..., F)
    if d_down is None:  # nothing below W_down is trained
        return None
    if not model.config.gated:
        d_up = activation_backward(d_down, saved.pop(f"{name}.act"))
        return project_backward(model, f"{name}.up", d_up, saved, grads)
    act, up = saved.pop(name)
    d_gate = activation_backward(d_down * up, saved.pop(f"{name}.act"))
    dx_gate = project_backward(model, f"{name}.gate", d_gate, saved, grads)
    dx_up = project_backward(model, f"{name}.up", d_down * act, saved, grads)
    return None if dx_gate is None or dx_up is None else dx_gate + dx_up


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
    elif part == "cross":
        assert model.source is not None
        y = attend(model, i, part, h_after, at_q=after, x=model.weights[SOURCE], at=model.source, saved=saved)
    else:
        y = attend(model, i, part, h_after, at_q=after, x=h, at=before, saved=saved)
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
    others: list[Array | None] = []  # laid out as x; dh is as the result
    if part == "mlp":
        dh = feed_forward_backward(model, i, df, saved, grads)
    elif part == "cross":
        assert model.source is not None
        dh, *d_source = attend_backward(model, i, part, df, at_q=after, at=model.source, saved=saved, grads=grads)
        for d in d_source:
            if d is not None:
                add(grads, SOURCE, d)
    else:
        dh, *others = attend_backward(model, i, part, df, at_q=after, at=before, saved=saved, grads=grads)
    if dh is None:
        return None
    dh = before.select_backward(dh, after)
    for d in others:
        dh += d
    dx = norm_backward(model, name, dh, saved, grads) if model.config.norm_first else dh
    return before.select_backward(dy, after) + dx  # the residual's, and f's


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
        x, saved = sublayer(model, depth, below, before, after)
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
                _, saved = sublayer(model, depth, saved["x"], before, after)
            dx = sublayer_backward(model, depth, dx, before, after, saved, grads)  # type: ignore[assignment]
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
