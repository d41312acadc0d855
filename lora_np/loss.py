"""What others call: logits, the loss, and its gradients; the head and the cross-entropy in chunks of rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from .adapter import Adapter, fuse_grads
from .backend import Array, xp
from .batch import Batch, check_batch, check_inputs
from .binding import (
    SOURCE,
    AdaptedModel,
    AnyAdapter,
    Trainable,
    adapter_first,
    bind,
    check_rows,
    data_first,
    encoder_of,
    frozen,
    with_source,
)
from .checks import check_count
from .layout import Cache, Layout, lay_out
from .model import DTYPE_OF, ENCODER, Model, check_model
from .ops import activation_backward, cross_entropy, cross_entropy_backward, pick
from .threads import in_threads
from .transformer import ACTIVATIONS, Activations, Grads, add, project, project_backward, states, states_backward

HEAD_ROWS = 128  # rows of logits that a loss holds at a time: (N*T, V) never is


def layouts(
    model: AdaptedModel, batch: Batch, *, read: Array | None = None, cache: Cache | None = None
) -> tuple[Layout, Layout]:
    """The layouts of a batch's states and of what the last layer gives: a classifier's one token, or those of read."""
    config, dtype = model.config, model.weights[DTYPE_OF].real.dtype
    if config.head == "classify":
        read = batch.read_at(config.causal)
    return lay_out(config, batch, dtype, packed=not model.by_row, read=read, cache=cache)


# --- T14: the head -------------------------------------------------------------------------------------------------


def features(model: AdaptedModel, x: Array, at: Layout, saved: Activations) -> Array:
    """T14: what the head reads: a state, times a constant; an encoder's classifier has a pooler. (..., D) -> same."""
    config = model.config
    if not config.has_pooler:
        return config.head_scale * x
    h, saved["pooler.act"] = ACTIVATIONS[config.pooler](project(model, "pooler", x, at, saved))
    return h


def features_backward(model: AdaptedModel, dh: Array, saved: Activations, grads: Grads) -> Array | None:
    """T14: dh (..., D) -> dx (..., D), or None where nothing below is trained."""
    config = model.config
    if not config.has_pooler:
        return config.head_scale * dh
    return project_backward(model, "pooler", activation_backward(dh, saved.pop("pooler.act")), saved, grads)


def head_loss(
    model: AdaptedModel, h: Array, at: Layout, rows: Array, targets: Array, count: int, grads: Grads
) -> tuple[Array, Array | None]:
    """T14, T15: the sum of the losses of the counted rows over `count`, and its gradient by h.

    h (..., D), of which the rows (M,) have targets (M,). Logits are turned into dh a chunk at a time.
    -> loss (a 0-d array), dh (..., D) or None where nothing below is trained.
    """
    total, dh = xp.zeros((), dtype=h.dtype), xp.zeros_like(h) if model.trained_below("head") else None
    for m in chunks(rows):
        loss, dh_m = chunk_loss(model, pick(h, rows[m]), at.part(rows[m]), targets[m], count, grads)
        total = total + loss
        if dh is not None:
            dh.reshape(-1, dh.shape[-1])[rows[m]] = dh_m  # (m,D); each row is picked once
    return total, dh


def chunks(rows: Array) -> Iterator[slice]:
    """The rows (M,), HEAD_ROWS at a time: which of the M. One chunk at least, for a shard with no counted target.

    What takes one in is a function of its own, so that its logits are gone before the next one's come.
    """
    for start in range(0, max(len(rows), 1), HEAD_ROWS):
        yield slice(start, start + HEAD_ROWS)


def chunk_loss(
    model: AdaptedModel, h: Array, at: Layout, targets: Array, count: int, grads: Grads
) -> tuple[Array, Array | None]:
    """T14, T15: of rows h (m,D), the sum of the losses over `count`, and dh (m,D). Logits are (m,V)."""
    saved = Activations()
    losses, softmax = cross_entropy(project(model, "head", h, at, saved), targets)
    dlogits = cross_entropy_backward(xp.full_like(losses, 1 / count), softmax)
    return losses.sum() / count, project_backward(model, "head", dlogits, saved, grads)


def head_score(model: AdaptedModel, h: Array, at: Layout, rows: Array, targets: Array) -> tuple[Array, Array]:
    """T14, T15: of the counted rows, the sum of the losses, and how many targets have the largest logit. -> two 0-d."""
    loss, hits = xp.zeros((), dtype=h.dtype), xp.zeros((), dtype="int64")
    for m in chunks(rows):
        loss_m, hits_m = chunk_score(model, pick(h, rows[m]), at.part(rows[m]), targets[m])
        loss, hits = loss + loss_m, hits + hits_m
    return loss, hits


def chunk_score(model: AdaptedModel, h: Array, at: Layout, targets: Array) -> tuple[Array, Array]:
    """T14, T15: the same of rows h (m,D)."""
    logits = project(model, "head", h, at, {})
    hits = (logits.argmax(axis=-1) == targets).sum()
    return cross_entropy(logits, targets)[0].sum(), hits


# --- T20: an encoder -----------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """What an encoder's backward needs."""

    model: AdaptedModel
    at: Layout
    stack: list[Activations]


def encode(model: AdaptedModel, batch: Batch) -> tuple[AdaptedModel, Encoded | None]:
    """T20: the decoder, with the states of what the encoder reads in place; any other model as it is."""
    if batch.source is None:
        return model, None
    encoder = encoder_of(model)
    at, last = layouts(encoder, batch.source)
    x, stack = states(encoder, batch.source, at, last)
    return with_source(model, x, at, trained=bool(encoder.trained)), Encoded(encoder, at, stack)


def encode_backward(encoded: Encoded | None, grads: Grads) -> None:
    """T20: the decoder's gradient of the encoder's states, from grads, into those of the encoder's weights."""
    if encoded is None or SOURCE not in grads:
        return
    inner = Grads()
    states_backward(encoded.model, grads.pop(SOURCE), encoded.at, encoded.at, encoded.stack, inner)
    for name, value in inner.items():
        add(grads, name if name.startswith("embed.tokens") else ENCODER + name, value)


# --- T15: some rows of a batch -------------------------------------------------------------------------------------


def _counted(batch: Batch, last: Layout) -> tuple[Array, Array]:
    """The rows of the last states that have a target that counts, and those targets. -> two (M,)."""
    places = xp.asarray(batch.counted)
    return last.row_of(places), xp.asarray(batch.targets).reshape(-1)[places]


def batch_score(model: AdaptedModel, batch: Batch) -> tuple[Array, Array]:
    """T15: over a batch's counted targets, the sum of the losses, and how many have the largest logit; no dropout."""
    model, _ = encode(model, batch)
    at, last = layouts(model, batch)
    x, _ = states(model, batch, at, last)
    return head_score(model, features(model, x, last, {}), last, *_counted(batch, last))


def batch_loss_and_grads(model: AdaptedModel, batch: Batch, *, count: int) -> tuple[Array, Grads]:
    """T15: the loss of some rows of a batch, and its gradients by what is trained: sums over these rows, over `count`.

    -> a 0-d array; {name: array} with the names, and in the order, of the adapter's parameters, or of the weights.
    """
    model, encoded = encode(model, batch)
    at, last = layouts(model, batch)
    x, stack = states(model, batch, at, last)
    saved, grads = Activations(), Grads()
    h = features(model, x, last, saved)
    loss, dh = head_loss(model, h, last, *_counted(batch, last), count, grads)
    dx = None if dh is None else features_backward(model, dh, saved, grads)
    if dx is not None:
        states_backward(model, dx, at, last, stack, grads)
        encode_backward(encoded, grads)
    if model.adapter is None:
        return loss, {name: grads[name] for name in model.weights if name != SOURCE}
    return loss, fuse_grads(model.config, model.adapter, grads)


# --- What others call ----------------------------------------------------------------------------------------------


def forward(
    model: Model,
    tokens: Any,
    adapter: AnyAdapter = None,
    *,
    mask: Any = None,
    token_types: Any = None,
    source: Any = None,
    source_mask: Any = None,
) -> Array:
    """T14, L2, L7: the logits of a batch, with an adapter, none, or a list of one or none for each row.

    tokens (N,T) integers; mask (N,T), true where a token counts; token_types (N,T). An encoder-decoder reads source
    (N,S), with source_mask, and tokens are its decoder's (T20).
    -> (N,T,V) for a language model, (N,labels) for a classifier, (N,T,labels) for a tagger, (N,T,D) without a head.
    What stands at padding has no meaning. A ValueError or TypeError says what was expected, what came, and where.
    """
    check_model(model)
    tokens, adapter = data_first(tokens, adapter)
    batch = check_inputs(model.config, tokens, mask, token_types, source, source_mask)
    with in_threads():
        adapted, _ = encode(frozen(bind(model, adapter, rows=len(batch.tokens))), batch)
        at, last = layouts(adapted, batch)
        y, _ = states(adapted, batch, at, last)
        if model.config.head != "none":
            y = project(adapted, "head", features(adapted, y, last, {}), last, {})  # (..., D) -> (..., V)
    return y[:, 0] if model.config.head == "classify" else last.unpack(y)


def loss(
    model: Model,
    tokens: Any,
    targets: Any,
    adapter: AnyAdapter = None,
    *,
    mask: Any = None,
    token_types: Any = None,
    source: Any = None,
    source_mask: Any = None,
) -> float:
    """T15: the mean cross-entropy, in nats, over all counted targets; no dropout.

    targets (N,T) for a language model or tagger, (N,) for a classifier: targets[n,t] is what logits[n,t] is scored
    against, -100 is left out. A ValueError or TypeError says what was expected, what came, and where.
    """
    check_model(model)
    tokens, targets, adapter = data_first(tokens, targets, adapter)
    batch = check_batch(model.config, tokens, targets, mask, token_types, source, source_mask)
    parts = [(adapter, batch)]
    if isinstance(adapter, (list, tuple)):
        # Counted rows are picked from all sequences together, which no head of each one's own could read.
        check_rows(adapter, len(batch.tokens))
        parts = [(one, batch.rows(slice(n, n + 1))) for n, one in enumerate(adapter)]
    with in_threads():
        scores = [batch_score(frozen(bind(model, one, rows=len(part.tokens))), part) for one, part in parts]
    return sum(score.item() for score, _ in scores) / len(batch.counted)


def loss_and_grads(
    model: Model,
    adapter: Adapter | None,
    tokens: Any,
    targets: Any,
    *,
    mask: Any = None,
    token_types: Any = None,
    source: Any = None,
    source_mask: Any = None,
    dropout_seed: int | None = None,
    trainable: Trainable = "adapter",
    recompute: bool = False,
) -> tuple[float, Grads]:
    """L4, T15: the loss and its gradients by what is trained: the adapter's parameters, or with "all" every weight.

    Arguments as for `loss`. dropout_seed: the seed of the dropout masks; None: no dropout, with a UserWarning where the
    adapter's configuration has some. recompute: activation checkpointing: of each sublayer only the input is kept,
    and backward computes the rest again: less memory, more time, the same bits. -> (float, {name: array like the
    parameter}), with exactly the names of what is trained. No gradient of a frozen weight is formed.
    """
    adapted, batch = step_of(
        model, adapter, tokens, targets, mask=mask, token_types=token_types, source=source, source_mask=source_mask,
        dropout_seed=dropout_seed, trainable=trainable, recompute=recompute,
    )  # fmt: skip
    with in_threads():
        total, grads = batch_loss_and_grads(adapted, batch, count=len(batch.counted))
    return total.item(), grads


def step_of(
    model: Model,
    adapter: Adapter | None,
    tokens: Any,
    targets: Any,
    *,
    dropout_seed: int | None,
    trainable: Trainable,
    recompute: bool,
    **inputs: Any,
) -> tuple[AdaptedModel, Batch]:
    """The model and batch of a training step, checked: it is either one adapter or all weights that are trained.

    inputs: mask, token_types, source and source_mask.
    """
    check_model(model)
    adapter, tokens, targets = adapter_first(adapter, tokens, targets)
    batch = check_batch(model.config, tokens, targets, **inputs)
    if dropout_seed is not None:
        check_count("dropout_seed", dropout_seed, at_least=0)
    if trainable not in ("adapter", "all"):
        raise ValueError(f"trainable: expected adapter or all, got {trainable!r}")
    if (adapter is None) != (trainable == "all"):
        raise ValueError("expected an adapter to train, or None and trainable='all' to train every weight")
    if isinstance(adapter, (list, tuple)):
        raise TypeError(f"adapter: one adapter is trained at a time, got {type(adapter).__name__}")
    adapted = bind(model, adapter, rows=len(batch.tokens), trainable=trainable)
    if adapter is not None and adapter.config.dropout and dropout_seed is None:
        warnings.warn("dropout_seed is None: no dropout, though the adapter's configuration has it", stacklevel=3)
    return replace(adapted, dropout_seed=dropout_seed, recompute=recompute), batch
