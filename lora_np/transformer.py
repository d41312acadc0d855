"""The transformer: forward and backward, as a composition of `ops` and `lora`.

Each backward stands beneath its forward and mirrors it. A forward puts what its backward needs into `saved`, under the
name of what it belongs to; backward takes it out where it uses it, so memory falls, and puts the gradients of what is
trained into `grads`. L1, T9, ... number the statements of the specification (spec/statements.md); "paper" is Hu et al.
2021.

Letters: N batch, T tokens, D width, H heads, G key/value heads, K = D/H, S keys, P keys of a prefix, F feed-forward
width. A state is (N,T,D), or packed to its M rows that are no padding, (M,D): `..., D`. Its `Layout` says which tokens
the rows are.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from .backend import Array, xp
from .batch import Batch
from .binding import AdaptedModel
from .layout import Layout
from .lora import lora_embedding, lora_embedding_backward, lora_linear, lora_linear_backward
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
    rms_norm,
    rms_norm_backward,
    silu,
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
    """Adds to a gradient: the head's comes in chunks of rows, a tied table's from both ends."""
    if name in grads:
        grads[name] += value
    else:
        grads[name] = value


def norm(model: AdaptedModel, name: str, x: Array, saved: Activations) -> Array:
    """T3 or T4: as the configuration says. x (..., D) -> (..., D)."""
    w, eps = model.weights[f"{name}.weight"], model.config.eps
    if model.config.norm == "rms":
        y, saved[name] = rms_norm(x, w, eps)
    else:
        y, saved[name] = layer_norm(x, w, model.weights[f"{name}.bias"], eps)
    return y


def norm_backward(model: AdaptedModel, name: str, dy: Array, saved: Activations, grads: Grads) -> Array:
    """T3 or T4: dy (..., D) -> dx (..., D). Gradients go into grads."""
    kept = saved.pop(name)
    if f"{name}.weight" in model.trained:
        grads[f"{name}.weight"] = norm_weight_backward(dy, kept)
    if f"{name}.bias" in model.trained:
        grads[f"{name}.bias"] = bias_backward(dy)
    return rms_norm_backward(dy, kept) if model.config.norm == "rms" else layer_norm_backward(dy, kept)


# --- T1: the embedding ---------------------------------------------------------------------------------------------


def embed(model: AdaptedModel, batch: Batch, at: Layout) -> tuple[Array, Activations]:
    """T1: token + position + type, and the norm over their sum in post-norm models. -> (..., D)."""
    E, update = model.weights["embed.tokens"], model.updates.get("embed.tokens")
    saved: Activations = {"embed.tokens": at.pack(xp.asarray(batch.tokens))}  # (N,T) -> (...)
    if update is None:
        x = embedding(saved["embed.tokens"], E)
    else:
        x, saved["update"] = lora_embedding(saved["embed.tokens"], E, update.A, update.B, update.s)
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
    if "update" in saved:
        grads["embed.tokens.A"], grads["embed.tokens.B"] = lora_embedding_backward(dx, saved.pop("update"))
    for name, ids in saved.items():
        if name in model.trained:
            add(grads, name, embedding_backward(dx, xp.broadcast_to(ids, dx.shape[:-1]), len(model.weights[name])))


# --- T9 to T11: attention ------------------------------------------------------------------------------------------


def attend(model: AdaptedModel, i: int, x_q: Array, at_q: Layout, x: Array, at: Layout, saved: Activations) -> Array:
    """T9 to T11: layer i's attention, with Wq, Wk, Wv and Wo (paper 4.2). Queries come from x_q (..., D), laid out by
    at_q; keys and values from x (..., D), by at. The two differ only in a last layer of which one token of each
    sequence is read: the queries are then T = 1 there. -> h (..., D), laid out as x_q."""
    name, config = f"layers.{i}.attn", model.config
    q = at_q.heads(project(model, f"{name}.q", x_q, at_q, saved), config.n_head)  # (..., D) -> (..., H*K) -> (N,H,T,K)
    k = at.heads(project(model, f"{name}.k", x, at, saved), config.kv_heads)  # (..., D) -> (..., G*K) -> (N,G,T,K)
    v = at.heads(project(model, f"{name}.v", x, at, saved), config.kv_heads)
    q, k = at_q.rotate(q), at.rotate(k)
    k, v, mask = context(model, i, k, v, at)  # (N,G,T,K) -> (N,G,S,K); (N,S)
    y, saved[name] = attention(q, k, v, causal=config.causal, mask=mask)
    return project(model, f"{name}.o", at_q.rows(y), at_q, saved)  # (N,H,T,K) -> (..., H*K) -> (..., D)


def attend_backward(
    model: AdaptedModel, i: int, dh: Array, at_q: Layout, at: Layout, saved: Activations, grads: Grads
) -> list[Array | None]:
    """T9 to T11: dh (..., D), laid out as x_q -> dx_q (..., D), then dx by way of k, and by way of v (..., D), laid out
    as x; each None where nothing below Wq, Wk and Wv is trained. `heads` and `rows` are each other's backward."""
    name = f"layers.{i}.attn"
    dy = project_backward(model, f"{name}.o", dh, saved, grads)  # (..., D) -> (..., H*K)
    if dy is None:  # nothing below Wo is trained
        return [None, None, None]
    dq, dk, dv = attention_backward(at_q.heads(dy, model.config.n_head), saved.pop(name))  # (N,H,T,K), 2 (N,G,S,K)
    dk, dv = context_backward(model, i, dk, dv, grads)  # (N,G,S,K) -> (N,G,T,K)
    dq, dk = at_q.rotate_backward(dq), at.rotate_backward(dk)
    dx_q = project_backward(model, f"{name}.q", at_q.rows(dq), saved, grads)  # (N,H,T,K) -> (..., H*K) -> (..., D)
    dx_k = project_backward(model, f"{name}.k", at.rows(dk), saved, grads)  # (N,G,T,K) -> (..., G*K) -> (..., D)
    dx_v = project_backward(model, f"{name}.v", at.rows(dv), saved, grads)
    return [dx_q, dx_k, dx_v]


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

ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "silu_gated": silu}


def feed_forward(model: AdaptedModel, i: int, x: Array, at: Layout, saved: Activations) -> Array:
    """T5 to T7: down(act(up(x))), or down(silu(gate(x)) * up(x)). x (..., D) -> (..., F) -> (..., D)."""
    name, activation = f"layers.{i}.mlp", ACTIVATIONS[model.config.activation]
    up = project(model, f"{name}.up", x, at, saved)
    if model.config.activation == "silu_gated":
        act, saved[f"{name}.act"] = activation(project(model, f"{name}.gate", x, at, saved))
        saved[name] = act, up
        return project(model, f"{name}.down", act * up, at, saved)
    act, saved[f"{name}.act"] = activation(up)
    return project(model, f"{name}.down", act, at, saved)


def feed_forward_backward(
    model: AdaptedModel, i: int, dh: Array, saved: Activations, grads: Grads
) -> list[Array | None]:
    """T5 to T7: dh (..., D) -> dx (..., D) by way of gate, if there is one, and by way of up; None as in attention."""
    name = f"layers.{i}.mlp"
    d_down = project_backward(model, f"{name}.down", dh, saved, grads)  # (..., D) -> (..., F)
    if d_down is None:  # nothing below W_down is trained
        return [None]
    if model.config.activation == "silu_gated":
        act, up = saved.pop(name)
        d_gate = activation_backward(d_down * up, saved.pop(f"{name}.act"))
        dx_gate = project_backward(model, f"{name}.gate", d_gate, saved, grads)
        return [dx_gate, project_backward(model, f"{name}.up", d_down * act, saved, grads)]
    d_up = activation_backward(d_down, saved.pop(f"{name}.act"))
    return [project_backward(model, f"{name}.up", d_up, saved, grads)]


# --- T13: the block, in two halves of one form ---------------------------------------------------------------------


def half_block(model: AdaptedModel, depth: int, x: Array, before: Layout, after: Layout) -> tuple[Array, Activations]:
    """T13: x + f(norm(x)) in pre-norm models, norm(x + f(x)) in post-norm ones. x (..., D) -> (..., D).

    Depth 2i: f is layer i's attention, with norm1; depth 2i + 1: its feed-forward half, with norm2. before, after: the
    layouts of x and of the result, which has fewer rows where only these are read.
    """
    i, feeds = divmod(depth, 2)
    name, norm_first, saved = f"layers.{i}.norm{feeds + 1}", model.config.norm_first, Activations()
    h = norm(model, name, x, saved) if norm_first else x
    if feeds:
        y = feed_forward(model, i, h, after, saved)
    else:
        y = attend(model, i, before.select(h, after), at_q=after, x=h, at=before, saved=saved)
    y += before.select(x, after)
    y = y if norm_first else norm(model, name, y, saved)
    return y, saved


def half_block_backward(
    model: AdaptedModel, depth: int, dy: Array, before: Layout, after: Layout, saved: Activations, grads: Grads
) -> Array | None:
    """T13: dy (..., D) -> dx (..., D), or None where nothing below is trained."""
    i, feeds = divmod(depth, 2)
    name, norm_first = f"layers.{i}.norm{feeds + 1}", model.config.norm_first
    dy = dy if norm_first else norm_backward(model, name, dy, saved, grads)
    if feeds:
        dh, *others = feed_forward_backward(model, i, dy, saved, grads)
    else:
        dh, *others = attend_backward(model, i, dy, at_q=after, at=before, saved=saved, grads=grads)
    if dh is None:
        return None
    dh = before.select_backward(dh, after)  # the first part is laid out by after, the others by before
    for part in others:
        dh += part
    dx = norm_backward(model, name, dh, saved, grads) if norm_first else dh
    return before.select_backward(dy, after) + dx  # the residual's, and f's


# --- The whole model -----------------------------------------------------------------------------------------------


def states(model: AdaptedModel, batch: Batch, at: Layout, last: Layout) -> tuple[Array, list[Activations]]:
    """T13: the states after the last layer, and its norm in pre-norm models. tokens (N,T) -> (..., D).

    at, last: the layouts of the states, and of what the last layer gives. Kept is what backward will need: nothing
    below the lowest trained parameter; with activation checkpointing, the input of each half block alone.
    """
    x, saved = embed(model, batch, at)
    stack = [saved if model.lowest < (0, 0) else {}]
    for depth, before, after in half_blocks(model, at, last):
        below = x
        x, saved = half_block(model, depth, below, before, after)
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
    for depth, before, after in reversed(half_blocks(model, at, last)):
        saved = stack.pop()
        if model.lowest < (depth + 1, 0):  # something in this half block, or below it, is trained
            if model.recompute:
                _, saved = half_block(model, depth, saved["x"], before, after)
            dx = half_block_backward(model, depth, dx, before, after, saved, grads)  # type: ignore[assignment]
    if model.lowest < (0, 0):
        embed_backward(model, dx, stack.pop(), grads)


def half_blocks(model: AdaptedModel, at: Layout, last: Layout) -> list[tuple[int, Layout, Layout]]:
    """The depth of each half block, and the layouts before and after it: only the last attention leaves rows out."""
    end = 2 * model.config.n_layer - 2
    return [(depth, at, at) for depth in range(end)] + [(end, at, last), (end + 1, last, last)]
