"""Generation with a key/value cache (T16)."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from .backend import Array, asnumpy, xp
from .batch import Batch, check_inputs
from .binding import SOURCE, AdaptedModel, AnyAdapter, bind, data_first, frozen
from .checks import check_count, is_number
from .layout import Cache
from .loss import encode, features, layouts
from .model import Config, Model, check_model
from .storage import Held
from .threads import in_threads
from .transformer import keys_values, project, states


def new_cache(config: Config, *, N: int, longest: int, dtype: Any) -> Cache:
    """An empty cache for N sequences of up to `longest` tokens."""
    shape = (N, config.kv_heads, longest, config.head_width)
    layers = range(config.n_layer)
    return Cache([xp.empty(shape, dtype=dtype) for _ in layers], [xp.empty(shape, dtype=dtype) for _ in layers])


def keep_source(model: AdaptedModel, batch: Batch) -> AdaptedModel:
    """T16, T20: the decoder, with the keys and values that each layer takes from the encoder's states; made once."""
    model, encoded = encode(model, batch)
    if encoded is None:
        return model
    x, layers = model.weights[SOURCE], range(model.config.n_layer)
    made = {f"layers.{i}.cross": keys_values(model, i, "cross", x, encoded.at, {}) for i in layers}
    return replace(model, source_kv=made)


def next_logits(model: AdaptedModel, cache: Cache, tokens: Array, mask: Array | None = None) -> Array:
    """T16: the logits after the last of `tokens` (N,T), which follow what the cache holds; they are added to it.

    mask (N,S) is over all tokens, the cache's and these. -> (N,V).
    """
    N, T = tokens.shape
    types = np.zeros_like(tokens) if model.config.n_types else None  # as forward has them where none are given
    batch = Batch(tokens, mask, types)
    at, last = layouts(model, batch, read=np.full(N, T - 1), cache=cache)
    x, _ = states(model, batch, at, last)
    cache.length += T
    return project(model, "head", features(model, x, last, {}), last, {})[:, 0]  # (N,1,D) -> (N,1,V) -> (N,V)


def choose(
    logits: Array, rng: np.random.Generator | None, *, temperature: float, top_k: int | None, top_p: float | None
) -> Array:
    """T16: the next token of each sequence. logits (N,V), on the host -> (N,).

    Greedy at temperature 0. Else drawn from softmax(logits / temperature), cut to the top_k likeliest, then to the
    likeliest that together reach top_p.
    """
    if rng is None:
        return logits.argmax(axis=-1)
    logits = logits.astype(np.float64) / temperature
    order = np.argsort(-logits, axis=-1, kind="stable")
    sorted_logits = np.take_along_axis(logits, order, axis=-1)
    p = np.exp(sorted_logits - sorted_logits[:, :1])  # (N,V), falling
    if top_k is not None:
        p[:, top_k:] = 0
    p /= p.sum(axis=-1, keepdims=True)
    if top_p is not None:
        p[np.cumsum(p, axis=-1) - p >= top_p] = 0  # kept: those before which top_p is not reached
        p /= p.sum(axis=-1, keepdims=True)
    drawn = (rng.random((len(p), 1)) > np.cumsum(p, axis=-1)).sum(axis=-1)  # (N,): the place where the sum passes it
    last = (p > 0).sum(axis=-1) - 1
    return np.take_along_axis(order, np.minimum(drawn, last)[:, None], axis=-1)[:, 0]


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None, seed: int | None) -> None:
    if not (is_number(temperature) and temperature >= 0):
        raise ValueError(f"generate: temperature: expected 0 or more, got {temperature}")
    if top_k is not None:
        check_count("generate: top_k", top_k, at_least=1)
    if top_p is not None and not (is_number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"generate: top_p: expected 0 < top_p <= 1, got {top_p}")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("generate: top_k and top_p need a temperature above 0: at 0 the likeliest token is taken")
    if temperature > 0 and seed is None:
        raise ValueError("generate: a temperature above 0 needs a seed")
    if seed is not None:
        check_count("generate: seed", seed, at_least=0)


def generate(
    model: Model,
    tokens: Any,
    adapter: AnyAdapter = None,
    *,
    n: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    mask: Any = None,
    source: Any = None,
    source_mask: Any = None,
    stop: Collection[int] = (),
) -> Array:
    """T16: n tokens after each sequence: greedy at temperature 0, else drawn, from seed.

    tokens (N,T); shorter sequences are padded on the left, with mask (N,T) false there. An encoder-decoder reads source
    (N,S), with source_mask, once, and tokens are its decoder's first (T20). -> (N, T + n), on the host, with the given
    tokens first; it ends before where each sequence has got a token of `stop`. A ValueError if the model is no language
    model, T + n passes its longest sequence, or a logit is no finite number.
    """
    check_model(model)
    tokens, adapter = data_first(tokens, adapter)
    config = model.config
    if config.head != "lm" or not config.causal:
        raise ValueError("generate: expected a causal language model (head='lm', causal=True)")
    check_count("generate: n", n, at_least=0)
    _check_sampling(temperature, top_k, top_p, seed)
    batch = check_inputs(config, tokens, mask, None, source, source_mask)
    (N, T), mask = batch.tokens.shape, batch.mask
    if T + n > config.longest:
        raise ValueError(f"generate: {T} + {n} tokens pass the model's longest sequence, {config.longest}")
    if mask is not None and not mask[:, -1].all():
        raise ValueError("generate: mask: pad on the left: the last token of each sequence must count")
    rng = np.random.default_rng(seed) if temperature > 0 else None
    # One row's products are too small to go from thread to thread: BLAS's own are quicker, where nothing is widened.
    threads = in_threads if N > 1 or any(isinstance(W, Held) for W in model.weights.values()) else nullcontext
    with threads():
        adapted = keep_source(frozen(bind(model, adapter, rows=N)), batch)
    cache = new_cache(config, N=N, longest=T + n, dtype=model.dtype)
    result = batch.tokens
    new, stopped = result, np.zeros(N, dtype=bool)
    for _ in range(n):
        if stopped.all():
            break
        with threads():
            logits = asnumpy(next_logits(adapted, cache, new, mask))
        if not np.isfinite(logits).all():
            raise ValueError(
                f"generate: logits are NaN or infinite: the weights, or the adapter's, overflow in {model.dtype}"
            )
        new = choose(logits, rng, temperature=temperature, top_k=top_k, top_p=top_p)[:, None].astype(result.dtype)
        result = np.concatenate([result, new], axis=1)  # (N,S) -> (N,S+1)
        stopped |= np.isin(new[:, 0], [*stop])
        mask = None if mask is None else np.concatenate([mask, np.ones((N, 1), dtype=bool)], axis=1)
    return result


def generate_on(
    model: Model,
    tokens: Any,
    adapter: AnyAdapter = None,
    *,
    n: int,
    seed: int | None = None,
    stop: Collection[int] = (),
    **sampling: Any,
) -> Array:
    """T16, past the longest sequence: when that is full, its last half is the prompt for what follows.

    Arguments, result and errors as of `generate`, which this calls; each time with another seed, drawn from the first.
    Of several sequences, the part in which the last of them has got a token of `stop` may go on behind it.
    """
    tokens = asnumpy(tokens)
    room = model.config.longest
    seeds = np.random.SeedSequence(0 if seed is None else seed)
    stopped = np.zeros(len(tokens), dtype=bool)
    while True:
        prompt = tokens if tokens.shape[-1] < room else tokens[:, -max(1, room // 2) :]
        step = min(n, max(1, room - prompt.shape[-1]))
        part_seed = None if seed is None else int(seeds.spawn(1)[0].generate_state(1)[0])
        new = generate(model, prompt, adapter, n=step, seed=part_seed, stop=stop, **sampling)[:, prompt.shape[-1] :]
        tokens = np.concatenate([tokens, new], axis=1)  # (N,S) -> (N,S+step)
        n -= step
        stopped |= np.isin(new, [*stop]).any(axis=1)
        if n <= 0 or stopped.all():
            return tokens
