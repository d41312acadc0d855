"""The transformer: forward, loss and backward, as a composition of `ops` and `lora`.

A forward gives its result and what its backward needs; each backward stands beneath its forward and takes the saved
values apart as it goes, so memory falls as it runs. Letters: N batch, T tokens, D width, H heads, K = D/H, F
feed-forward width, V vocabulary, r rank; P places that get logits: T, or 1 for a classifier. A state is (N,T,D), and
(M,D) where there is padding, M the true tokens, or (N,1,D) where one token a text is read (`places`): `..., D`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from .backend import Array, xp
from .batch import Batch, check_batch, check_inputs
from .lora import Adapter, lora_embedding, lora_embedding_backward, lora_linear, lora_linear_backward
from .model import DTYPE_OF, Config, Model
from .ops import (
    activation_backward,
    attention,
    attention_backward,
    bias_backward,
    cross_entropy,
    cross_entropy_backward,
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
    pick,
    pick_backward,
    rms_norm,
    rms_norm_backward,
    rotary,
    rotary_angles,
    rotary_backward,
    silu,
    tanh,
)
from .places import Places, Reading
from .run import AnyAdapter, Run, Trainable, bind, check_rows, fuse_grads

Grads: TypeAlias = dict[str, Array]
Saved: TypeAlias = dict[str, Any]  # by the name of the step that saved it

HEAD_ROWS = 256  # rows of logits that a loss holds at a time: (N*T, V) never is


# --- Matrices and norms by name ------------------------------------------------------------------------------------


def _add(grads: Grads, name: str, value: Array) -> None:
    """Adds to a gradient: the head's comes in chunks of rows, a tied table's from both ends."""
    if name in grads:
        grads[name] += value
    else:
        grads[name] = value


def project(run: Run, name: str, x: Array, mask: Array | None = None) -> tuple[Array, Any]:
    """T2, L2: the matrix `name`, with its update if it has one. x (..., in) -> (..., out). mask: the dropout mask."""
    W, b = run.weights[run.weight_name(name)], run.weights.get(f"{name}.bias")
    update = run.updates.get(name)
    if update is not None:
        return lora_linear(x, W, b, update.A, update.B, update.s, dropout_mask=mask)
    return linear(x, W, b), x if run.weight_name(name) in run.trained else None


def project_backward(run: Run, name: str, dy: Array, saved: Any, grads: Grads, *, need_dx: bool = True) -> Array | None:
    """T2, L4: the gradients of what is trained here, into grads, and dx where it is needed.

    dy (..., out) -> dx (..., in), or None.
    """
    if f"{name}.bias" in run.trained:
        _add(grads, f"{name}.bias", bias_backward(dy))
    if name in run.updates:
        dx, dA, dB = lora_linear_backward(dy, saved, need_dx=need_dx)
        _add(grads, f"{name}.A", dA)
        _add(grads, f"{name}.B", dB)
        return dx
    weight = run.weight_name(name)
    if weight in run.trained:
        _add(grads, weight, linear_weight_backward(dy, saved))
    return linear_backward(dy, run.weights[weight]) if need_dx else None


def norm(run: Run, name: str, x: Array) -> tuple[Array, Any]:
    """T3 or T4: as the configuration says. x (..., D) -> (..., D)."""
    w, eps = run.weights[f"{name}.weight"], run.config.eps
    if run.config.norm == "rms":
        return rms_norm(x, w, eps)
    return layer_norm(x, w, run.weights[f"{name}.bias"], eps)


def norm_backward(run: Run, name: str, dy: Array, saved: Any, grads: Grads) -> Array:
    """T3 or T4: the gradients of what is trained here, into grads, and dx. dy (..., D) -> (..., D)."""
    if f"{name}.weight" in run.trained:
        grads[f"{name}.weight"] = norm_weight_backward(dy, saved)
    if f"{name}.bias" in run.trained:
        grads[f"{name}.bias"] = bias_backward(dy)
    return rms_norm_backward(dy, saved) if run.config.norm == "rms" else layer_norm_backward(dy, saved)


# --- T1: the embedding ---------------------------------------------------------------------------------------------


def embed(run: Run, tokens: Array, token_types: Array | None) -> tuple[Array, Saved]:
    """T1: token + position + type, and the norm over their sum in post-norm models. tokens (...) -> (..., D)."""
    E, update = run.weights["embed.tokens"], run.updates.get("embed.tokens")
    saved: Saved = {"tokens": tokens, "types": token_types}
    if update is None:
        x = embedding(tokens, E)
    else:
        x, saved["update"] = lora_embedding(tokens, E, update.A, update.B, update.s)
    if run.config.positions == "learned":
        x += embedding(run.positions, run.weights["embed.positions"])  # type: ignore[arg-type]
    if token_types is not None:
        x += embedding(token_types, run.weights["embed.types"])
    if not run.config.norm_first:
        x, saved["norm"] = norm(run, "embed.norm", x)
    return x, saved


def embed_backward(run: Run, dx: Array, saved: Saved, grads: Grads) -> None:
    """T1: dx (..., D), into the gradients of the tables that are trained."""
    tokens = saved["tokens"]
    if not run.config.norm_first:
        dx = norm_backward(run, "embed.norm", dx, saved.pop("norm"), grads)
    if "update" in saved:
        grads["embed.tokens.A"], grads["embed.tokens.B"] = lora_embedding_backward(dx, saved.pop("update"))
    tables = {"embed.tokens": tokens, "embed.types": saved["types"]}
    if run.positions is not None:
        tables["embed.positions"] = xp.broadcast_to(run.positions, tokens.shape)
    for name, index in tables.items():
        if name in run.trained:
            _add(grads, name, embedding_backward(dx, index, len(run.weights[name])))


# --- T9 to T11: attention ------------------------------------------------------------------------------------------


def attend(run: Run, i: int, x: Array) -> tuple[Array, Saved]:
    """T9 to T11: attention of layer i with its four projections (paper 4.2: Wq, Wk, Wv, Wo). x (..., D) -> (..., D).

    Of the tokens that are read alone, where that is all that comes of the layer: they ask, and all are asked.
    """
    config, read, saved = run.config, run.reading_in(i), {"shape": x.shape}
    asking = run.beyond(i)
    x_q = x if read is None else read.take(x)
    q, saved["q"] = _heads(asking, f"layers.{i}.attn.q", x_q, config.n_head)  # (..., D) -> (N,H,T,K)
    k, saved["k"] = _heads(run, f"layers.{i}.attn.k", x, config.kv_heads)  # (..., D) -> (N,G,T,K)
    v, saved["v"] = _heads(run, f"layers.{i}.attn.v", x, config.kv_heads)
    if asking.angles is not None and run.angles is not None:
        q, saved["rotary_q"] = rotary(q, *asking.angles)
        k, saved["rotary_k"] = rotary(k, *run.angles)
    if run.cache is not None:
        k, v = run.cache.extend(i, k, v)  # (N,G,T,K) -> (N,G,S,K)
    k, v, mask = _with_prefix(run, i, k, v)
    y, saved["attention"] = attention(q, k, v, causal=config.causal, mask=mask)
    y = asking.places.merge_heads(y)  # (N,H,T,K) -> (..., D)
    name = f"layers.{i}.attn.o"
    y, saved["o"] = project(asking, name, y, asking.dropout_mask(name, y.shape))
    return y, saved


def _heads(run: Run, name: str, x: Array, H: int) -> tuple[Array, Any]:
    """A projection, cut into heads. (..., D) -> (N,H,T,K)."""
    y, saved = project(run, name, x, run.dropout_mask(name, x.shape))
    return run.places.split_heads(y, H), saved


def _with_prefix(run: Run, i: int, k: Array, v: Array) -> tuple[Array, Array, Array | None]:
    """T9: the model's own keys and values before the text's, in the sight of every query, and the mask over them all.

    They have no positions (Li and Liang 2021). k, v (N,G,S,K) -> (N,G,P+S,K); mask (N,S) -> (N,P+S).
    """
    N, mask = len(k), run.mask
    if not run.config.prefix:
        return k, v, mask
    joined = []
    for part, x in (("k", k), ("v", v)):
        w = run.weights[f"layers.{i}.attn.prefix.{part}"]  # (G,P,K), or (N,G,P,K)
        joined.append(xp.concatenate([xp.broadcast_to(w, (N, *w.shape[-3:])), x], axis=2))
    if mask is not None:
        mask = xp.concatenate([xp.ones((N, run.config.prefix), dtype=bool), mask], axis=1)
    return joined[0], joined[1], mask


def _prefix_backward(run: Run, name: str, d: Array, grads: Grads) -> Array:
    """T9: the gradient of a prefix, a sum over the texts, into grads; d (N,G,P+S,K) -> that of the text's own."""
    P = run.config.prefix
    if name in run.trained:
        grads[name] = d[:, :, :P].sum(axis=0)  # (N,G,P,K) -> (G,P,K)
    return d[:, :, P:]


def attend_backward(run: Run, i: int, dy: Array, saved: Saved, grads: Grads, *, need_dx: bool) -> Array | None:
    """T9 to T11: dy (..., D) -> dx (..., D), or None where it is not needed."""
    name = f"layers.{i}.attn"
    read, asking = run.reading_in(i), run.beyond(i)
    inputs_trained = any(
        n.startswith(tuple(f"{name}.{part}." for part in ("q", "k", "v", "prefix"))) for n in run.trained
    )
    go_on = need_dx or inputs_trained
    dy_heads = project_backward(run, f"{name}.o", dy, saved.pop("o"), grads, need_dx=go_on)
    if dy_heads is None:
        return None
    d_heads = asking.places.split_heads(dy_heads, run.config.n_head)  # (..., D) -> (N,H,T,K)
    dq, dk, dv = attention_backward(d_heads, saved.pop("attention"))
    if run.config.prefix:
        dk, dv = (_prefix_backward(run, f"{name}.prefix.{part}", d, grads) for part, d in (("k", dk), ("v", dv)))
    if "rotary_q" in saved:
        dq, dk = rotary_backward(dq, saved.pop("rotary_q")), rotary_backward(dk, saved.pop("rotary_k"))
    dx = None
    for part, of, d in (("q", asking, dq), ("k", run, dk), ("v", run, dv)):
        d = of.places.merge_heads(d)  # (N,H,T,K) -> (..., D)
        d_part = project_backward(run, f"{name}.{part}", d, saved.pop(part), grads, need_dx=need_dx)
        if d_part is not None and part == "q" and read is not None:
            d_part = read.take_backward(d_part, saved["shape"])
        if dx is None:
            dx = d_part
        else:
            dx += d_part
    return dx


# --- T5 to T7: the feed-forward half -------------------------------------------------------------------------------

ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "silu_gated": silu}


def feed_forward(run: Run, i: int, x: Array) -> tuple[Array, Saved]:
    """T5 to T7: down(act(up(x))), or down(silu(gate(x)) * up(x)). x (..., D) -> (..., F) -> (..., D)."""
    run, name, saved = run.beyond(i), f"layers.{i}.mlp", {}
    activation = ACTIVATIONS[run.config.activation]
    up, saved["up"] = project(run, f"{name}.up", x, run.dropout_mask(f"{name}.up", x.shape))
    if run.config.activation == "silu_gated":
        gate, saved["gate"] = project(run, f"{name}.gate", x, run.dropout_mask(f"{name}.gate", x.shape))
        act, saved["activation"] = activation(gate)
        saved["product"] = act, up
        h = act * up
    else:
        h, saved["activation"] = activation(up)
    y, saved["down"] = project(run, f"{name}.down", h, run.dropout_mask(f"{name}.down", h.shape))
    return y, saved


def feed_forward_backward(run: Run, i: int, dy: Array, saved: Saved, grads: Grads, *, need_dx: bool) -> Array | None:
    """T5 to T7: dy (..., D) -> dx (..., D), or None where it is not needed."""
    name = f"layers.{i}.mlp"
    go_on = need_dx or any(n.startswith((f"{name}.up.", f"{name}.gate.")) for n in run.trained)
    dh = project_backward(run, f"{name}.down", dy, saved.pop("down"), grads, need_dx=go_on)
    if dh is None:
        return None
    if run.config.activation != "silu_gated":
        d_up = activation_backward(dh, saved.pop("activation"))
        return project_backward(run, f"{name}.up", d_up, saved.pop("up"), grads, need_dx=need_dx)
    act, up = saved.pop("product")
    d_gate = activation_backward(dh * up, saved.pop("activation"))
    dx = project_backward(run, f"{name}.gate", d_gate, saved.pop("gate"), grads, need_dx=need_dx)
    dx_up = project_backward(run, f"{name}.up", dh * act, saved.pop("up"), grads, need_dx=need_dx)
    return None if dx is None or dx_up is None else dx + dx_up


# --- T13: the block, in two halves of one form ---------------------------------------------------------------------


def half_block(run: Run, depth: int, x: Array) -> tuple[Array, Saved]:
    """T13: x + f(norm(x)) in pre-norm models, norm(x + f(x)) in post-norm ones. x (..., D) -> (..., D).

    Depth 2i is layer i's attention with norm1, depth 2i + 1 its feed-forward half with norm2.
    """
    i, second = divmod(depth, 2)
    name, f = (f"layers.{i}.norm2", feed_forward) if second else (f"layers.{i}.norm1", attend)
    read = None if second else run.reading_in(i)
    past = x if read is None else read.take(x)  # what goes past f
    saved: Saved = {"shape": x.shape}
    if run.config.norm_first:
        h, saved["norm"] = norm(run, name, x)
        y, saved["f"] = f(run, i, h)
        y += past
    else:
        h, saved["f"] = f(run, i, x)
        h += past
        y, saved["norm"] = norm(run, name, h)
    return y, saved


def half_block_backward(run: Run, depth: int, dy: Array, saved: Saved, grads: Grads) -> Array | None:
    """T13: dy (..., D) -> dx (..., D), or None where nothing below is trained."""
    i, second = divmod(depth, 2)
    name, f_backward = (
        (f"layers.{i}.norm2", feed_forward_backward) if second else (f"layers.{i}.norm1", attend_backward)
    )
    read = None if second else run.reading_in(i)

    def past_backward(d: Array) -> Array:
        return d if read is None else read.take_backward(d, saved["shape"])

    need_dx = run.lowest < depth
    if run.config.norm_first:
        norm_trained = not run.trained.isdisjoint((f"{name}.weight", f"{name}.bias"))
        dh = f_backward(run, i, dy, saved.pop("f"), grads, need_dx=need_dx or norm_trained)
        if dh is None:
            return None
        return past_backward(dy) + norm_backward(run, name, dh, saved.pop("norm"), grads)
    dh = norm_backward(run, name, dy, saved.pop("norm"), grads)
    dx = f_backward(run, i, dh, saved.pop("f"), grads, need_dx=need_dx)
    return None if dx is None else past_backward(dh) + dx


# --- The whole model -----------------------------------------------------------------------------------------------


def place(run: Run, batch: Batch, *, past: int = 0, read: Array | None = None) -> Run:
    """The run with what depends on the batch: its mask, which tokens the states are, positions, rotary angles.

    past: how many tokens the cache holds; the mask is over them too. read (N,), on the host: the place of the one
    token of each text that the last layer is computed for; None: all. Positions count true tokens, so that padding on
    the left changes nothing.
    """
    config, (N, T) = run.config, batch.tokens.shape
    kept = None if run.by_row else batch.kept
    places = Places(N, T, None if kept is None else xp.asarray(kept))
    mask = None if batch.mask is None else xp.asarray(batch.mask)
    if mask is None:
        positions = xp.arange(past, past + T)  # (T,)
    else:
        positions = xp.maximum(xp.cumsum(mask, axis=1) - 1, 0)[:, past:]  # (N,T)
    run = replace(run, mask=mask, places=places)
    if config.positions == "learned":
        at_rows = positions if mask is None else places.gather(positions[..., None])[..., 0]  # (T,), (N,T) or (M,)
        run = replace(run, positions=at_rows + config.position_offset)
    else:
        run = replace(run, angles=_angles(run, positions if mask is None else positions[:, None]))  # of (T,) or (N,1,T)
    if read is None:
        return run
    index = np.arange(N) * T + read  # (N,)
    rows, t = xp.asarray(np.stack([index if kept is None else np.searchsorted(kept, index), read]))
    of_read = Places(N, 1, t=t)
    if config.positions == "learned":
        return replace(run, reading=Reading(rows, of_read, None))
    at_read = xp.broadcast_to(positions, (N, T))[xp.arange(N), t]  # (N,)
    return replace(run, reading=Reading(rows, of_read, _angles(run, at_read[:, None, None])))  # of (N,1,1)


def _angles(run: Run, positions: Array) -> tuple[Array, Array]:
    """T11: rotary's cos and sin. positions (...,T) -> two (...,T,K/2)."""
    config, dtype = run.config, run.weights[DTYPE_OF].real.dtype
    return rotary_angles(positions, config.head_width, config.rope_theta, dtype)


def states(run: Run, batch: Batch) -> tuple[Array, list[Saved]]:
    """T13: the states after the last layer, and its norm in pre-norm models. tokens (N,T) -> (N,T,D).

    Where there is padding they are (M,D), those of the true tokens; where one token of each text is read, (N,1,D).
    Only what backward will need is saved: nothing below the lowest trained parameter; of a half block that is
    recomputed, its input.
    """
    depths = 2 * run.config.n_layer
    stack: list[Saved] = []
    kept = None if run.by_row else batch.kept
    tokens, types = (
        None if ids is None else xp.asarray(ids if kept is None else ids.reshape(-1)[kept])  # (N,T) -> (M,)
        for ids in (batch.tokens, batch.token_types)
    )
    assert tokens is not None
    x, saved = embed(run, tokens, types)
    stack.append(saved if run.lowest < 0 else {})
    for depth in range(depths):
        below = x
        x, saved = half_block(run, depth, below)
        if run.lowest > depth:
            saved = {}
        elif run.recompute:
            saved = {"below": below}
        stack.append(saved)
    if run.config.norm_first:
        x, norm_saved = norm(run, "norm", x)
        stack.append({"norm": norm_saved} if run.lowest <= depths else {})
    return x, stack


def states_backward(run: Run, dx: Array, stack: list[Saved], grads: Grads) -> None:
    """T13: dx (..., D), down to the lowest trained parameter."""
    depths = 2 * run.config.n_layer
    if run.config.norm_first and run.lowest <= depths:
        dx = norm_backward(run, "norm", dx, stack.pop()["norm"], grads)
    d: Array | None = dx
    for depth in reversed(range(max(run.lowest, 0), depths)):
        assert d is not None
        saved = stack.pop()
        if run.recompute:
            _, saved = half_block(run, depth, saved["below"])
        d = half_block_backward(run, depth, d, saved, grads)
    if run.lowest < 0 and d is not None:
        embed_backward(run, d, stack.pop(), grads)


def features(run: Run, x: Array) -> tuple[Array, Saved]:
    """T14: what the head reads: a state; BERT's and RoBERTa's classifiers through the pooler. (..., D) -> (..., D)."""
    saved: Saved = {}
    if run.config.has_pooler:
        x, saved["pooler"] = project(run, "pooler", x)
        x, saved["tanh"] = tanh(x)
    return x, saved


def features_backward(run: Run, dh: Array, saved: Saved, grads: Grads) -> Array:
    """T14: dh (..., D) -> dx (..., D)."""
    if run.config.has_pooler:
        dh = activation_backward(dh, saved.pop("tanh"))
        dh = project_backward(run, "pooler", dh, saved.pop("pooler"), grads)  # type: ignore[assignment]
    return dh


def head_loss(run: Run, h: Array, index: Array, targets: Array, count: int, grads: Grads) -> tuple[Array, Array | None]:
    """T14, T15: the sum of the losses of the counted rows over `count`, and its gradient by h. h (..., D).

    index (M,): the counted rows of h; targets (M,). Logits are made for HEAD_ROWS rows at a time and turned into
    dh at once. -> loss (a 0-d array), dh (..., D) or None where nothing below is trained.
    """
    rows = pick(h, index)  # (..., D) -> (M,D)
    mask = run.dropout_mask("head", h.shape)
    if mask is not None:
        mask = pick(mask, index)
    need_dh = run.lowest < 2 * run.config.n_layer + 2
    d_rows = xp.empty_like(rows)
    total = xp.zeros((), dtype=rows.dtype)
    for start in range(0, max(len(rows), 1), HEAD_ROWS):  # one chunk at least, for a shard with no counted target
        m = slice(start, start + HEAD_ROWS)
        logits, saved = project(run, "head", rows[m], None if mask is None else mask[m])  # (m,D) -> (m,V)
        losses, ce_saved = cross_entropy(logits, targets[m])
        total = total + losses.sum() / count
        dlogits = cross_entropy_backward(xp.full_like(losses, 1 / count), ce_saved)
        d_part = project_backward(run, "head", dlogits, saved, grads, need_dx=need_dh)
        if d_part is not None:
            d_rows[m] = d_part
    return total, pick_backward(d_rows, index, h.shape) if need_dh else None


def head_score(run: Run, h: Array, index: Array, targets: Array) -> tuple[Array, Array]:
    """T14, T15: of the counted rows, the sum of the losses, and how many targets have the largest logit.

    Logits are made for HEAD_ROWS rows at a time. -> two 0-d arrays.
    """
    loss, hits = xp.zeros((), dtype=h.dtype), xp.zeros((), dtype="int64")
    rows = pick(h, index)  # (..., D) -> (M,D)
    for start in range(0, len(rows), HEAD_ROWS):
        m = slice(start, start + HEAD_ROWS)
        logits, _ = project(run, "head", rows[m])  # (m,D) -> (m,V)
        hits = hits + (logits.argmax(axis=-1) == targets[m]).sum()
        loss = loss + cross_entropy(logits, targets[m])[0].sum()
    return loss, hits


def _scored(run: Run, batch: Batch) -> tuple[Run, Array, Array]:
    """The run of a batch; the rows of its last states that have a target that counts (M,), and those targets (M,)."""
    assert batch.targets is not None
    run = place(run, batch, read=_read(run.config, batch))
    counted = batch.counted
    rows = counted
    if run.reading is None and batch.kept is not None:
        rows = np.searchsorted(batch.kept, counted)
    return run, xp.asarray(rows), xp.asarray(batch.targets.reshape(-1)[counted])


def batch_score(run: Run, batch: Batch) -> tuple[Array, Array]:
    """T15: over a batch's counted targets, the sum of the losses, and how many have the largest logit; no dropout."""
    run, rows, targets = _scored(run, batch)
    h, _ = features(run, states(run, batch)[0])
    return head_score(run.beyond(run.config.n_layer - 1), h, rows, targets)


def batch_loss_and_grads(run: Run, batch: Batch, *, count: int) -> tuple[Array, Grads]:
    """The loss of some rows of a batch, and the gradients by run.trained: sums over these rows, over `count` (O4)."""
    run, rows, targets = _scored(run, batch)
    x, stack = states(run, batch)
    h, head_saved = features(run, x)
    grads: Grads = {}
    loss, dh = head_loss(run.beyond(run.config.n_layer - 1), h, rows, targets, count, grads)
    if dh is not None:
        states_backward(run, features_backward(run, dh, head_saved, grads), stack, grads)
    return loss, grads


def _read(config: Config, batch: Batch) -> Array | None:
    """T14: the place of the one token of each text that is read: a classifier's. None: all are."""
    return batch.read_at(config.causal) if config.head == "classify" else None


# --- What others call ----------------------------------------------------------------------------------------------


def forward(
    model: Model, tokens: Any, adapter: AnyAdapter = None, *, mask: Any = None, token_types: Any = None
) -> Array:
    """T14, L2, L7: the logits of a batch, with an adapter, none, or a list of one or none for each row.

    tokens (N,T) integers; mask (N,T), true where a token counts; token_types (N,T).
    -> (N,T,V) for a language model, (N,labels) for a classifier, (N,T,labels) for a tagger, (N,T,D) without a head.
    What stands at padding has no meaning. A ValueError or TypeError says what was expected, what came, and where.
    """
    config = model.config
    batch = check_inputs(config, tokens, mask, token_types)
    run = place(bind(model, adapter, rows=len(batch.tokens)), batch, read=_read(config, batch))
    y, _ = states(run, batch)
    if config.head != "none":
        y, _ = project(run, "head", features(run, y)[0])  # (..., D) -> (..., V)
    return y[:, 0] if config.head == "classify" else run.places.spread(y)


def loss(
    model: Model,
    tokens: Any,
    targets: Any,
    adapter: AnyAdapter = None,
    *,
    mask: Any = None,
    token_types: Any = None,
) -> float:
    """T15: the mean cross-entropy, in nats, over all counted targets; no dropout.

    targets (N,T) for a language model or tagger, (N,) for a classifier: targets[n,t] is what logits[n,t] is scored
    against, -100 is left out. A ValueError or TypeError says what was expected, what came, and where.
    """
    batch = check_batch(model.config, tokens, targets, mask, token_types)
    count, parts = len(batch.counted), [(adapter, batch)]
    if isinstance(adapter, (list, tuple)):
        # Counted rows are picked from all texts together, which a head for each text could not read: a text at a time.
        check_rows(adapter, len(batch.tokens))
        parts = [(one, batch.rows(slice(n, n + 1))) for n, one in enumerate(adapter)]
    total = 0.0
    for one, part in parts:
        run = replace(bind(model, one, rows=len(part.tokens)), trained=frozenset())
        total += batch_score(run, part)[0].item()
    return total / count


def loss_and_grads(
    model: Model,
    adapter: Adapter | None,
    tokens: Any,
    targets: Any,
    *,
    mask: Any = None,
    token_types: Any = None,
    dropout_seed: int | None = None,
    trainable: Trainable = "adapter",
    recompute: bool = False,
) -> tuple[float, Grads]:
    """L4, T15: the loss and its gradients by what is trained: the adapter's parameters, or with "all" every weight.

    Arguments as for `loss`. dropout_seed: the seed of the dropout masks; None: no dropout. recompute: of each half
    block only the input is kept, and backward computes the rest again: less memory, more time, the same bits.
    -> (float, {name: array like the parameter}), with exactly the names of what is trained. No gradient of a frozen
    weight is formed.
    """
    batch = check_batch(model.config, tokens, targets, mask, token_types)
    run = training_run(
        model, adapter, trainable=trainable, rows=len(batch.tokens), dropout_seed=dropout_seed, recompute=recompute
    )
    total, grads = batch_loss_and_grads(run, batch, count=len(batch.counted))
    return total.item(), trained_grads(model, adapter, grads)


def training_run(
    model: Model,
    adapter: Adapter | None,
    *,
    trainable: Trainable,
    rows: int,
    dropout_seed: int | None,
    recompute: bool = False,
) -> Run:
    """The run of a training step; a ValueError unless it is either one adapter or all weights that are trained."""
    if trainable not in ("adapter", "all"):
        raise ValueError(f"trainable: expected adapter or all, got {trainable!r}")
    if (adapter is None) != (trainable == "all"):
        raise ValueError("expected an adapter to train, or None and trainable='all' to train every weight")
    if adapter is not None and not isinstance(adapter, Adapter):
        raise TypeError(f"adapter: one adapter is trained at a time, got {type(adapter).__name__}")
    run = bind(model, adapter, rows=rows, trainable=trainable)
    return replace(run, dropout_seed=dropout_seed, recompute=recompute)


def trained_grads(model: Model, adapter: Adapter | None, grads: Grads) -> Grads:
    """The gradients with the names, and in the order, of what is trained."""
    if adapter is not None:
        return fuse_grads(model.config, adapter, grads)
    return {name: grads[name] for name in model.weights}
