"""The whole model: against a plain one written a text at a time, and the properties that LoRA promises of it."""

import math
import tracemalloc
from dataclasses import replace
from functools import partial
from importlib import import_module

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import (
    FLOAT64,
    Unrounded,
    bits,
    case_of,
    cases,
    checked,
    configs,
    dense_updates,
    deviation,
    device,
    farthest,
    frozen_matrix,
    gamma,
    gradient_scale,
    in_bfloat16,
    in_fewer_bits,
    inputs,
    largest,
    lora_configs,
    random_model,
    real_logits,
    rescaled,
    same_bits,
    scale_by_hand,
    seeds,
    spy,
    spy_everywhere,
    trained_adapter,
    with_updates,
)

import lora_np as ln
from lora_np import decode, transformer
from lora_np.adapter import adapted_shapes, target_of
from lora_np.backend import asnumpy, backend_name
from lora_np.batch import check_batch
from lora_np.binding import bind, frozen
from lora_np.layout import Layout
from lora_np.storage import widened
from lora_np.vectors import derivatives
from lora_np.vectors.buckets import deberta_bucket, t5_bucket

proves = pytest.mark.proves
LOSS = import_module("lora_np.loss")  # ln.loss is the function in it
GPT2 = ln.Config(7, 8, 2, 2, 8, 6)
EVERY_HEAD = ("lm", "classify", "tag", "none")
ARCHITECTURES = derivatives.architectures()
WIDE = ln.Config(512, 8, 1, 2, 512, 512)  # matrices beside which a token is small


# --- T1 to T20: against a transformer that knows one text, no padding and no LoRA -----------------------------------


def rms_by_hand(config, w, x):
    w = 1 + w if config.norm == "rms_1p" else w
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.eps) * w


def norm_by_hand(config, w, name, x):
    if config.norm != "layer":
        return rms_by_hand(config, w[f"{name}.weight"], x)
    standard = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + config.eps)
    return standard * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear_by_hand(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def turned_by_hand(config, i, x):
    """Rotary: the pairs of the first p of x (T,K) as complex numbers, times exp(i t / (factor theta^(2i/p)))."""
    p, theta, factors = config.rope_width or x.shape[1], config.rope_theta, np.array(config.rope_factors)
    if config.window and config.window_theta and i not in config.full_layers:
        theta, factors = config.window_theta, 1.0
    angles = np.outer(np.arange(len(x)), theta ** (-2 * np.arange(p // 2) / p) / factors)
    z = (x[:, : p // 2] + 1j * x[:, p // 2 : p]) * np.exp(1j * angles)
    return np.hstack([z.real, z.imag, x[:, p:]])


def buckets_by_hand(config, places):
    """The bucket of each key's place less each query's: (T,T)."""
    n, last = config.score_buckets, config.score_distance
    distances = places - places[:, None]
    if config.disentangled:
        return np.vectorize(lambda d: deberta_bucket(int(d), n, last))(distances)
    return np.vectorize(lambda d: t5_bucket(int(d), n, last, causal=config.causal))(distances)


def seen_by_hand(config, i, places):
    """Which keys (columns) each query sees."""
    behind = places[:, None] - places  # how far a key is behind a query
    seen = behind >= 0 if config.causal else np.ones(behind.shape, dtype=bool)
    return seen & (behind < config.window) if config.window and i not in config.full_layers else seen


def attention_by_hand(config, w, i, part, x, places, source):
    """x (T,D), whose tokens stand at `places`; the second attention asks the source's states (S,D)."""
    name, asked = f"layers.{i}.{part}", source if part == "cross" else x
    K = config.d_head or config.d_model // config.n_head
    scale = config.score_scale or (3 * K if config.disentangled else K) ** -0.5
    q, k, v = (linear_by_hand(w, f"{name}.{one}", z) for one, z in (("q", x), ("k", asked), ("v", asked)))
    heads = []
    for h in range(config.n_head):
        g = h * (config.n_kv_head or config.n_head) // config.n_head
        of_h, of_g = slice(h * K, (h + 1) * K), slice(g * K, (g + 1) * K)
        q_h, k_h, v_h = q[:, of_h], k[:, of_g], v[:, of_g]
        if config.qk_norm:
            q_h, k_h = (rms_by_hand(config, w[f"{name}.{one}_norm.weight"], z) for one, z in (("q", q_h), ("k", k_h)))
        if config.positions == "rotary":
            q_h, k_h = turned_by_hand(config, i, q_h), turned_by_hand(config, i, k_h)
        if config.prefix:
            k_h, v_h = (np.vstack([w[f"{name}.prefix.{one}"][g], z]) for one, z in (("k", k_h), ("v", v_h)))
        scores = q_h @ k_h.T
        if config.disentangled:
            table = norm_by_hand(config, w, "embed.distances_norm", w["embed.distances"])
            q_far, k_far = (linear_by_hand(w, f"{name}.{one}", table)[:, of_h] for one in "qk")
            bucket, t = buckets_by_hand(config, places), np.arange(len(x))
            scores = scores + (q_h @ k_far.T)[t[:, None], bucket] + (k_h @ q_far.T)[t, bucket]
        scores = scores * scale
        if part == "attn":
            if config.score_buckets and not config.disentangled:
                scores = scores + w["embed.score_bias"][buckets_by_hand(config, places), h]
            scores[:, config.prefix :][~seen_by_hand(config, i, places)] = -math.inf
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        heads.append(p / p.sum(axis=-1, keepdims=True) @ v_h)
    return linear_by_hand(w, f"{name}.o", np.hstack(heads))


ACTIVATION = {
    "gelu": np.vectorize(lambda v: v * math.erfc(-v / math.sqrt(2)) / 2),
    "gelu_tanh": np.vectorize(lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))),
    "silu": np.vectorize(lambda v: v / (1 + math.exp(-v))),
    "relu": np.vectorize(lambda v: max(v, 0.0)),
    "tanh": np.vectorize(math.tanh),
}


def feed_forward_by_hand(config, w, i, x):
    name, (act, *gated) = f"layers.{i}.mlp", config.activation.split("_gated")
    up = linear_by_hand(w, f"{name}.up", x)
    h = ACTIVATION[act](linear_by_hand(w, f"{name}.gate", x)) * up if gated else ACTIVATION[act](up)
    return linear_by_hand(w, f"{name}.down", h)


def states_by_hand(config, w, tokens, places, types, source):
    """The states after the last layer and its norm, of one text: tokens (T,), source (S,D) or None -> (T,D)."""
    x = config.embed_scale * w["embed.tokens"][tokens]
    if config.positions == "learned":
        x = x + w["embed.positions"][config.position_offset + np.arange(len(tokens))]
    if config.n_types:
        x = x + w["embed.types"][types]
    if not config.norm_first:
        x = norm_by_hand(config, w, "embed.norm", x)
    for i in range(config.n_layer):
        parts = {"attn": "norm1", "cross": "norm_cross", "mlp": "norm2"}
        for part in parts if source is not None else ("attn", "mlp"):
            norm = f"layers.{i}.{parts[part]}"
            h = norm_by_hand(config, w, norm, x) if config.norm_first else x
            if part == "mlp":
                y = feed_forward_by_hand(config, w, i, h)
            else:
                y = attention_by_hand(config, w, i, part, h, places, source)
            if config.norm_outputs:
                y = norm_by_hand(config, w, f"{norm}_out", y)
            x = x + y if config.norm_first else norm_by_hand(config, w, norm, x + y)
    return norm_by_hand(config, w, "norm", x) if config.norm_first else x


def logits_by_hand(model, tokens, places, types, source):
    """The logits of one text: tokens (T,), and an encoder's tokens and their places, or None
    -> (T,V), (labels,), (T,labels) or (T,D)."""
    config, w = model.config, {name: asnumpy(value) for name, value in model.weights.items()}
    if source is not None:
        of_encoder = {name.removeprefix("encoder."): value for name, value in w.items() if name.startswith("encoder.")}
        of_encoder["embed.tokens"] = w["embed.tokens"]
        encoder = replace(config, n_layer=config.n_encoder, n_encoder=0, causal=False)
        source = states_by_hand(encoder, of_encoder, *source, None, None)
    x = states_by_hand(config, w, tokens, places, types, source)
    if config.head == "none":
        return x
    if config.head == "classify":
        x = x[-1] if config.causal else ACTIVATION[config.pooler](linear_by_hand(w, "pooler", x[0]))
    if config.head != "classify" or config.causal:
        x = config.head_scale * x
    if config.head == "lm" and config.tie_head:
        return x @ w["embed.tokens"].T
    return linear_by_hand(w, "head", x)


def texts(tokens, mask):
    """What the mask keeps of each row: its tokens, and where they stood."""
    places = [np.arange(len(row)) if mask is None else np.flatnonzero(mask[n]) for n, row in enumerate(tokens)]
    return [(row[kept], kept) for row, kept in zip(tokens, places, strict=True)]


def check_against_plain(model, adapter, batch):
    """The logits of a batch, beside those of the model with W0 + s B A, a text at a time."""
    tokens, mask = batch["tokens"], batch["mask"]
    types = texts(batch.get("token_types", np.zeros_like(tokens)), mask)
    sources = texts(batch["source"], batch["source_mask"]) if "source" in batch else [None] * len(tokens)
    plain = with_updates(model, dense_updates(model, adapter), adapter.whole)
    logits = ln.forward(model, adapter=adapter, **inputs(batch))
    for n, got in enumerate(real_logits(model.config, logits, mask)):
        kept, places = texts(tokens, mask)[n]
        assert deviation(got, logits_by_hand(plain, kept, places, types[n][0], sources[n])) <= 1e-12


@proves(
    "T1", "T2", "T3", "T4", "T5", "T6", "T7", "T9", "T10", "T11", "T13", "T14", "T17", "T18", "T19", "T20", "L2"
)  # fmt: skip
@given(cases(heads=EVERY_HEAD, **FLOAT64))
def test_forward_is_the_plain_transformer(case):
    """Each text alone, what the mask leaves out left out, every s B A added to its W0: within 1e-12."""
    check_against_plain(*case[:3])


@proves("T13", "T14", "L2")
@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_forward_of_each_architecture_is_the_plain_transformer(config):
    """None is left to what hypothesis happens to draw: five tokens, padding on both sides."""
    model, batch = random_model(config, seed=0), derivatives.example_batch(config)
    check_against_plain(model, trained_adapter(model, ln.LoRAConfig(r=2, bias="all"), seed=0), batch)


def qualified(config, run, name):
    """A name in the whole model: an encoder's own are those of any model."""
    return f"encoder.{name}" if config.n_encoder and not run.config.n_encoder else name


def rows_of_products(monkeypatch, config, call):
    """How many rows each matrix of a model is applied to, by the matrix's name, in calls of `project`."""
    rows, project = {}, transformer.project

    def counting(run, name, x, *args):
        own = qualified(config, run, name)
        rows[own] = rows.get(own, 0) + x.size // x.shape[-1]
        return project(run, name, x, *args)

    for module in (transformer, LOSS, decode):
        monkeypatch.setattr(module, "project", counting)
    call()
    return rows


@proves("T13", "T14")
@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_padding_is_not_computed_nor_what_is_not_read(config, monkeypatch):
    """Each matrix sees the true tokens alone; of a classifier's last layer, all but k and v the one that is read: where
    attention asks how far a key is, the feed-forward half does. q and k also see the table of distances (T19)."""
    model, batch = random_model(config, seed=0), derivatives.example_batch(config, N=3, T=5)
    rows = rows_of_products(monkeypatch, config, lambda: ln.loss(model, **batch))
    true = int(batch["mask"].sum())
    assert true < 15
    last = f"layers.{config.n_layer - 1}." + ("mlp." if config.score_buckets else "")
    for matrix in set(config.matrix_shapes()) - {"embed.tokens", "head"}:
        alone = config.head == "classify" and matrix.startswith(last) and not matrix.endswith((".k", ".v"))
        far = 2 * config.score_buckets if config.disentangled and matrix.endswith((".q", ".k")) else 0
        assert rows[matrix] == (3 if alone else true) + far, matrix
    assert rows["head"] == (3 if config.head == "classify" else int((batch["targets"] != -100).sum()))


@proves("T16")
def test_a_prompts_last_layer_is_computed_for_its_last_token(monkeypatch):
    model = random_model(ARCHITECTURES["Llama, tied"], seed=0)
    rows = rows_of_products(monkeypatch, model.config, lambda: ln.generate(model, [[1, 2, 3, 4]] * 2, n=1))
    assert [rows[f"layers.1.{matrix}"] for matrix in ("attn.q", "attn.k", "mlp.down")] == [2, 8, 2]


# --- L4: which gradients there are -----------------------------------------------------------------------------------


@proves("L4")
@given(cases(whole=False))
def test_no_gradient_of_a_frozen_weight_is_formed(case):
    """Not formed and thrown away: whatever forms a weight's gradient is called for A and B alone, in any module."""
    updates = bind(case.model, case.adapter, rows=1).updates
    names = ("linear_weight_backward", "embedding_backward", "bias_backward", "norm_weight_backward")
    with pytest.MonkeyPatch.context() as patch:
        calls = {name: spy_everywhere(patch, name) for name in names}
        _, grads = ln.loss_and_grads(case.model, case.adapter, **case.batch)
    config, embed = case.model.config, "embed.tokens" in updates
    # An encoder looks its tokens up in the same table (T20); q and k have the table of distances too (T19).
    looked_up = embed * (2 if config.n_encoder else 1)
    twice = sum(name.endswith((".q", ".k")) for name in updates) if config.disentangled else 0
    products = 2 * (len(updates) - embed + twice) + looked_up
    assert [len(calls[name]) for name in names] == [products, looked_up, 0, 0]
    assert grads.keys() == case.adapter.params.keys()


@proves("L4")
@pytest.mark.parametrize("config", [WIDE, replace(WIDE, activation="silu_gated", tie_head=False)])
def test_no_array_of_a_frozen_matrix_s_size_is_made_in_a_step(config):
    """Whatever product would form it: a step of two tokens takes less than half of the smallest of them."""
    model = random_model(config, seed=0)
    targets = ("q", "k", "v", "o", "up", "down", "embed", "head")
    adapter = trained_adapter(model, ln.LoRAConfig(r=1, targets=targets, dropout=0.5), seed=0)

    def step():
        ln.loss_and_grads(model, adapter, [[1, 2]], [[2, 3]], dropout_seed=0)

    step()  # what is imported or cached the first time is no part of it
    tracemalloc.start()
    step()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < min(w.nbytes for w in model.weights.values() if w.size >= 512 * 512) / 2


READERS = [(transformer, "project"), (LOSS, "project"), (transformer, "norm")]


def inputs_of(model, adapter, batch):
    """What each matrix and each norm is applied to, in the order of a forward."""
    with pytest.MonkeyPatch.context() as patch:
        calls = [spy(patch, module, name) for module, name in READERS]
        ln.loss(model, adapter=adapter, **batch)
    return [(qualified(model.config, args[0], args[1]), bits(args[2])) for part in calls for args in part]


def depending(model, adapter, batch, rng):
    """The matrices and norms whose input depends on the adapter's last parameter, as another value of it shows.

    A table by distance stands with the embedding: all that its stack has is above it.
    """
    *_, (trained, value) = adapter.params.items()
    before = inputs_of(model, adapter, batch)
    if "embed.score_bias" in trained or "embed.distances" in trained:
        in_encoder = trained.startswith("encoder.")
        stack = {name for name, _ in before if name.startswith("encoder.") == in_encoder}
        own = {name for name in stack if not name.endswith((".cross.k", ".cross.v"))}
    else:
        own = set()
    moved = replace(adapter, params={**adapter.params, trained: value + device(rng.standard_normal(value.shape))})
    after = inputs_of(model, moved, batch)
    return own | {name for (name, one), (_, other) in zip(before, after, strict=True) if one != other}


def normed_backward(config, norms, depends, trained):
    """The norms whose backward is to run; a query's and a key's (T17) where anything below Wo is trained."""
    of_heads = {name for name in norms if name.endswith(("q_norm", "k_norm"))}
    asked = {name for name in of_heads if f"{name.rpartition('.')[0]}.o" in depends}
    return (norms - of_heads) & (depends | {trained.rpartition(".")[0]}) | asked


@proves("L4", "T13", "T14", "T17", "T18", "T19", "T20")
@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_backward_goes_down_to_what_is_trained_and_no_further(config):
    """Each weight, and each pair A, B, trained alone: dx is formed of the matrices whose input depends on it (which a
    forward with another value shows), and of no other; and a weight's gradient is, to the bit, what it is among all."""
    model, batch = random_model(config, seed=0), derivatives.example_batch(config)
    _, every = ln.loss_and_grads(model, None, **batch, trainable="all")
    alone = [ln.Adapter(ln.LoRAConfig(), {name: w}) for name, w in model.weights.items()]
    for matrix in config.matrix_shapes():
        target = target_of(matrix)
        pairs = trained_adapter(model, ln.LoRAConfig(r=1, targets=(target,)), seed=0)
        pair = {name: p for name, p in pairs.params.items() if name.rpartition(".")[0] == matrix}
        alone.append(replace(pairs, params=pair))
    rng = np.random.default_rng(0)
    products = {*config.matrix_shapes(), "pooler"} - (
        {"embed.tokens"} if config.has_pooler else {"embed.tokens", "pooler"}
    )
    norms = {name.rpartition(".")[0] for name in model.weights if "norm" in name}
    for adapter in alone:
        *_, trained = adapter.params
        depends = depending(model, adapter, batch, rng)
        in_force = {**model.weights, **adapter.whole}
        weights = {id(in_force[bind(model, adapter, rows=2).weight_name(name)]): name for name in products}
        with pytest.MonkeyPatch.context() as patch:
            backward, normed = spy_everywhere(patch, "linear_backward"), spy(patch, transformer, "norm_backward")
            _, grads = ln.loss_and_grads(model, adapter, **batch)
        formed = [weights[id(W)] for _, W in backward if id(W) in weights]
        far = [name for name in depends & products if config.disentangled and name.endswith((".q", ".k"))]
        assert sorted(formed) == sorted([*(depends & products), *far]), trained
        ran = {qualified(config, args[0], args[1]) for args in normed}
        assert ran == normed_backward(config, norms, depends, trained), trained
        if trained in every:
            assert same_bits(grads, {trained: every[trained]}), trained


@proves("L4", "T13")
def test_what_is_kept_for_backward():
    """Nothing below the lowest trained parameter, nor of a frozen matrix; with checkpoints, a sublayer's input."""
    model = random_model(replace(GPT2, n_layer=3), seed=0)
    checked = check_batch(model.config, [[1, 2, 3]], [[2, 3, 4]], None, None)
    run = bind(model, trained_adapter(model, ln.LoRAConfig(r=2, targets=("up",), layers=(1,)), seed=0), rows=1)
    at, last = LOSS.layouts(run, checked)
    _, stack = transformer.states(run, checked, at, last)
    assert [bool(saved) for saved in stack] == [False, False, False, False, True, True, True, True]
    above = [name for name in model.config.matrix_shapes() if name.startswith("layers.2.")]
    assert {name for saved in stack for name, x in saved.items() if x is None} == {"layers.1.mlp.down", *above}
    _, stack = transformer.states(replace(run, recompute=True), checked, at, last)
    assert [saved.keys() for saved in stack[4:7]] == [{"x"}] * 3
    assert not any(stack[:4])


@proves("L4", "T13")
@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_backward_takes_out_what_forward_saved(config):
    """So that memory falls as it runs: nothing of a sublayer is left when backward has passed it."""
    model, batch = random_model(config, seed=0), checked(config, derivatives.example_batch(config))
    run = bind(model, trained_adapter(model, ln.LoRAConfig(r=2, targets=("embed", "q")), seed=0), rows=2)
    run, encoded = LOSS.encode(run, batch)
    at, last = LOSS.layouts(run, batch)
    x, stack = transformer.states(run, batch, at, last)
    _, *halves = stack  # the embedding's tokens are not taken out: they are few
    assert all(halves)
    grads = {}
    transformer.states_backward(run, x, at, last, stack, grads)
    assert halves == [{}] * len(halves)
    if encoded is not None:
        _, *halves = encoded.stack
        assert all(halves)
        LOSS.encode_backward(encoded, grads)
        assert halves == [{}] * len(halves)


@proves("L4", "T13", "T16")
def test_a_forward_keeps_nothing():
    """Without a backward, with an adapter or one for each row: forward, loss, generate."""
    model, adapter, batch, _ = case_of(GPT2, targets=("embed", "q", "up"))
    stacks = []

    def noting(*args):
        x, stack = transformer.states(*args)
        stacks.append(stack[:-1])  # the last norm's values are gone when the caller returns
        return x, stack

    with pytest.MonkeyPatch.context() as patch:
        for module in (LOSS, decode):
            patch.setattr(module, "states", noting)
        for one in (adapter, [adapter, None, adapter]):
            ln.forward(model, batch["tokens"], one)
            ln.loss(model, **batch, adapter=one)
            ln.generate(model, batch["tokens"][:, :2], one, n=2)
    assert len(stacks) == 1 + 1 + 2 + 1 + 3 + 2
    assert not any(saved for stack in stacks for saved in stack)


@proves("L4")
@given(cases(n_layer=2, whole=False, targets=("q", "o", "up"), dora=False))
def test_a_gradient_does_not_depend_on_what_else_is_trained(case):
    """The upper layer's adapter alone has the gradients, to the bit, that it has when what is below is trained too.

    Every lower B is zero here, so that the forward is the same without it.
    """
    model, adapter, batch, _ = case
    params = {
        name: p * 0 if not name.startswith("layers.1.") and name.endswith(".B") else p
        for name, p in adapter.params.items()
    }
    upper = {name: p for name, p in params.items() if name.startswith("layers.1.")}
    _, grads = ln.loss_and_grads(model, replace(adapter, params=params), **batch)
    _, upper_grads = ln.loss_and_grads(model, replace(adapter, params=upper), **batch)
    assert same_bits(upper_grads, {name: grads[name] for name in upper})


# --- T9, T16: the keys and values that queries may see ---------------------------------------------------------------


def prefixed(*, mask=None, cached=0):
    """GPT2 with a prefix of two, the layout of two sequences of three tokens, and such keys and values (N,G,T,K)."""
    config = replace(GPT2, prefix=2)
    model = random_model(config, seed=0)
    run = bind(model, None, rows=2, trainable="all")
    cache = None
    if cached:
        cache = decode.new_cache(config, N=2, longest=cached + 3, dtype="float64")
        for arrays in (cache.keys, cache.values):
            arrays[1][:, :, :cached] = device(np.random.default_rng(1).standard_normal((2, 2, cached, 4)))
        cache.length = cached
    k, v = (device(np.random.default_rng(seed).standard_normal((2, 2, 3, 4))) for seed in (2, 3))
    return run, Layout(2, 3, mask=mask, cache=cache), k, v


@proves("T9", "T16")
@pytest.mark.parametrize("cached", [0, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_what_queries_see_is_the_prefix_then_the_cache_then_the_tokens(masked, cached):
    """The prefix is the same for every sequence, and the mask keeps it."""
    mask = device(np.arange(2 * (cached + 3)).reshape(2, -1) % 3 > 0) if masked else None
    run, at, k, v = prefixed(mask=mask, cached=cached)
    before = (None, None) if at.cache is None else (at.cache.keys[1].copy(), at.cache.values[1].copy())
    seen_k, seen_v, seen = transformer.context(run, 1, k, v, at)
    for got, part, own, past in ((seen_k, "k", k, before[0]), (seen_v, "v", v, before[1])):
        prefix = asnumpy(run.weights[f"layers.1.attn.prefix.{part}"])
        stretch = [] if past is None else [asnumpy(past)[:, :, :cached]]
        assert same_bits(got, np.concatenate([np.stack([prefix, prefix]), *stretch, asnumpy(own)], axis=2))
    if masked:
        assert same_bits(seen, np.hstack([np.ones((2, 2), dtype=bool), asnumpy(mask)]))
    else:
        assert seen is None


@proves("T9", "L4")
def test_the_gradient_of_what_queries_see_is_the_transpose():
    """<context(prefix, k, v), d> = <prefix, dprefix> + <k, dk> + <v, dv>; of a frozen prefix nothing is formed."""
    run, at, k, v = prefixed()
    seen_k, seen_v, _ = transformer.context(run, 1, k, v, at)
    d_k, d_v = (device(np.random.default_rng(seed).standard_normal(seen_k.shape)) for seed in (4, 5))
    grads = {}
    dk, dv = transformer.context_backward(run, 1, d_k, d_v, grads)
    assert grads.keys() == {"layers.1.attn.prefix.k", "layers.1.attn.prefix.v"}
    for seen, d, own, d_own, part in ((seen_k, d_k, k, dk, "k"), (seen_v, d_v, v, dv, "v")):
        name = f"layers.1.attn.prefix.{part}"
        whole = float((own * d_own).sum()) + float((run.weights[name] * grads[name]).sum())
        assert abs(float((seen * d).sum()) - whole) <= 1e-13 * float(abs(seen * d).sum())
    nothing = {}
    transformer.context_backward(frozen(run), 1, d_k, d_v, nothing)
    assert nothing == {}


# --- L3: the start -------------------------------------------------------------------------------------------------


@proves("L3")
@given(cases(heads=EVERY_HEAD), seeds)
def test_the_adapted_model_starts_as_the_base(case, seed):
    """With no tolerance: every bit of every logit; but for a merge of DoRA's, whose m was rounded as it was stored."""
    model, adapter, batch, _ = case
    started = ln.init_adapter(model, adapter.config, seed=seed)
    base, merged = ln.forward(model, **inputs(batch)), ln.merge(model, started)
    assert same_bits(ln.forward(model, adapter=started, **inputs(batch)), base)
    if not adapter.config.dora:
        assert same_bits(ln.forward(merged, **inputs(batch)), base)
    for name in started.matrices if adapter.config.dora and "qkv" not in adapter.config.targets else ():
        W0, W = frozen_matrix(model, name), frozen_matrix(merged, name)
        assert np.abs(W - W0).max() <= gamma(2, str(model.dtype)) * np.abs(W0).max()


@proves("L3", "L4")
@given(st.data(), seeds)
def test_at_the_start_only_b_has_a_gradient(data, seed):
    """dA = 0 exactly, dB is not 0. Three tokens that differ, all counted: q and k need someone to attend to two, and a
    feed-forward half a unit that is not zero."""
    config = data.draw(configs(heads=("lm", "classify", "tag")))
    assume(config.window != 1 and "relu" not in config.activation + config.pooler)
    model = random_model(config, seed=seed)
    adapter = ln.init_adapter(model, data.draw(lora_configs(config, dropout=False)), seed=seed)
    rng = np.random.default_rng(seed)
    tokens = np.stack([rng.permutation(config.vocab_size)[:3] for _ in range(2)])
    targets = rng.integers(0, config.head_size, (2,) if config.head == "classify" else (2, 3))
    source = {"source": tokens[::-1]} if config.n_encoder else {}
    _, grads = ln.loss_and_grads(model, adapter, tokens, targets, **source)
    for name, g in grads.items():
        if name.endswith(".A"):
            assert not asnumpy(g).any()
        elif name.endswith(".B"):
            assert asnumpy(g).any()


@proves("L4")
@pytest.mark.parametrize("target", ["q", "k"])
def test_who_attends_to_one_token_alone_has_no_gradient_in_q_and_k(target):
    """The exception: with a single token, softmax is 1 whatever q and k say."""
    model, adapter, batch, _ = case_of(GPT2, T=1, targets=(target,))
    _, grads = ln.loss_and_grads(model, adapter, **batch)
    assert not any(asnumpy(g).any() for g in grads.values())


# --- L1: what an update can be ---------------------------------------------------------------------------------------


@proves("L1")
@given(cases(heads=EVERY_HEAD, dora=False), st.sampled_from([-2.0, 0.25, 8.0]))
def test_scaling_alpha_scales_the_update(case, c):
    """c a power of two: s B A scales to the bit, and so do all logits as if B had been scaled."""
    model, adapter, batch, _ = case
    updates, scaled = dense_updates(model, adapter), dense_updates(model, rescaled(adapter, c))
    assert all(np.array_equal(scaled[name], c * updates[name]) for name in updates)
    params = {name: p * c if name.endswith(".B") else p for name, p in adapter.params.items()}
    by_alpha = ln.forward(model, adapter=rescaled(adapter, c), **inputs(batch))
    assert same_bits(by_alpha, ln.forward(model, adapter=replace(adapter, params=params), **inputs(batch)))


def full_rank_factors(dW, s):
    """B and A with s B A = dW: by QR where dW is tall, else B the identity."""
    n_out, n_in = dW.shape
    if n_out > n_in:
        Q, R = np.linalg.qr(dW)
        return Q, R / s
    return np.eye(n_out), dW / s


def unfused(config, updates):
    """Updates of matrices, each fused qkv cut into its rows of q, k and v."""
    K, result = config.d_head or config.d_model // config.n_head, dict(updates)
    q, kv = config.n_head * K, (config.n_kv_head or config.n_head) * K
    for name in [name for name in updates if name.endswith(".qkv")]:
        parts = np.split(result.pop(name), [q, q + kv])
        result |= dict(zip((f"{name.removesuffix('qkv')}{part}" for part in "qkv"), parts, strict=True))
    return result


@proves("L1")
@given(cases(heads=EVERY_HEAD, whole=False, dora=False, **FLOAT64), seeds)
def test_full_rank_represents_any_update(case, seed):
    """As much as r = min(in, out) allows: the model of W0 + dW, with the dW that was wanted, has these logits."""
    model, adapter, batch, _ = case
    rng = np.random.default_rng(seed)
    shapes = {name: adapted_shapes(model.config)[name] for name in adapter.matrices}
    ranks = {name: min(shape) for name, shape in shapes.items()}
    config = replace(adapter.config, rank_pattern=ranks, alpha_pattern={name: 2 * r for name, r in ranks.items()})
    params, wanted = {}, {}
    for name, shape in shapes.items():
        wanted[name] = 0.3 * rng.standard_normal(shape)
        s = 2 * math.sqrt(ranks[name]) if config.rslora else 2.0
        B, A = full_rank_factors(wanted[name], s)
        params |= {f"{name}.A": device(A), f"{name}.B": device(B)}
    full = ln.Adapter(config, params)
    updates = unfused(model.config, wanted)
    for name, dW in dense_updates(model, full).items():
        assert np.abs(dW - updates.pop(name)).max() <= 1e-14
    assert updates == {}
    updates = unfused(model.config, wanted)
    expected = ln.forward(with_updates(model, updates), **inputs(batch))
    assert deviation(ln.forward(model, adapter=full, **inputs(batch)), expected) <= 1e-12


# --- L4: against full fine-tuning -----------------------------------------------------------------------------------


def full_gradients(merged, batch):
    """The gradient of each matrix's W at the merged point, as full fine-tuning has it, by the matrix's name."""
    _, grads = ln.loss_and_grads(merged, None, **batch, trainable="all")
    host = {name: asnumpy(g) for name, g in grads.items()}
    full = {name.removesuffix(".weight"): g for name, g in host.items()}
    full["embed.tokens"] = host["embed.tokens"].T
    full["head"] = host.get("head.weight", host["embed.tokens"])
    for stem in [name[:-1] for name in full if name.endswith(".attn.q")]:
        full[f"{stem}qkv"] = np.concatenate([full[f"{stem}{part}"] for part in "qkv"])
    return host, full


@proves("L4", "L5")
@given(cases(dora=False, **FLOAT64))
def test_gradients_are_the_chain_rule_of_full_fine_tuning(case):
    """dA = s B^T dW and dB = s dW A^T at the merged weights; what is trained whole has its weight's own gradient.

    test_gradcheck holds every gradient of a model to 1e-11 of its own largest element; one that should be 0, as a key's
    bias has, to a rounding of the largest of all. Both sides may err by that, and dW's error comes through s B^T or
    s A^T.
    """
    model, adapter, batch, _ = case
    _, grads = ln.loss_and_grads(model, adapter, **batch)
    host, full = full_gradients(ln.merge(model, adapter), batch)

    def slack(g, everything):
        return 1e-11 * np.abs(g).max() + 2.0**-50 * largest(everything)

    for name in adapter.matrices:
        A, B, dA, dB = (asnumpy(d[f"{name}.{f}"]) for d in (adapter.params, grads) for f in "AB")
        s, dW = scale_by_hand(adapter.config, name), full[name]
        e = slack(dW, host) * abs(s)
        assert np.abs(dA - s * B.T @ dW).max() <= slack(dA, grads) + e * np.abs(B).sum(axis=0).max()
        assert np.abs(dB - s * dW @ A.T).max() <= slack(dB, grads) + e * np.abs(A).sum(axis=1).max()
    for name in adapter.whole:
        g = asnumpy(grads[name])
        assert np.abs(g - host[name]).max() <= slack(g, grads) + slack(host[name], host)


# --- T9: what a token cannot see -------------------------------------------------------------------------------------


@proves("T9")
@given(cases(heads=("lm", "tag", "none"), causal=True), seeds)
def test_a_later_token_never_changes_an_earlier_logit(case, seed):
    """Not by a bit: a row of a product does not depend on the other rows."""
    model, adapter, batch, _ = case
    before = asnumpy(ln.forward(model, adapter=adapter, **inputs(batch)))
    rng = np.random.default_rng(seed)
    for t in range(1, batch["tokens"].shape[1]):
        changed = inputs(batch) | {"tokens": batch["tokens"].copy()}
        changed["tokens"][:, t:] = rng.integers(0, model.config.vocab_size, changed["tokens"][:, t:].shape)
        assert same_bits(asnumpy(ln.forward(model, adapter=adapter, **changed))[:, :t], before[:, :t])


@proves("T9")
@given(cases(heads=("lm", "tag", "none"), causal=True, padding=("none", "right"), **FLOAT64))
def test_a_text_begins_the_same_however_long_it_is(case):
    """Cut off after t tokens, its logits are the first t of the whole: within rounding, as products differ in size."""
    model, adapter, batch, _ = case
    whole = real_logits(model.config, ln.forward(model, adapter=adapter, **inputs(batch)), batch["mask"])
    for t in range(1, batch["tokens"].shape[1]):
        start = {name: a if a is None or name.startswith("source") else a[:, :t] for name, a in inputs(batch).items()}
        cut = real_logits(model.config, ln.forward(model, adapter=adapter, **start), start["mask"])
        for one, other in zip(whole, cut, strict=True):
            assert deviation(one[: len(other)], other) <= 1e-12


@proves("T9")
@given(cases(heads=EVERY_HEAD, padding=("left", "right", "holes")), seeds)
def test_what_stands_in_padding_never_changes_a_real_token(case, seed):
    """Other tokens and types where the mask is false: every bit of the real logits, and of every gradient, stays."""
    model, adapter, batch, _ = case
    rng = np.random.default_rng(seed)
    changed = dict(batch)
    for name, n in (("tokens", model.config.vocab_size), ("token_types", model.config.n_types)):
        if name in batch:
            changed[name] = np.where(batch["mask"], batch[name], rng.integers(0, n, batch[name].shape))
    one, other = (
        real_logits(model.config, ln.forward(model, adapter=adapter, **inputs(b)), batch["mask"])
        for b in (batch, changed)
    )
    assert all(same_bits(a, b) for a, b in zip(one, other, strict=True))
    if "embed" not in adapter.config.targets and model.config.head != "none":
        grads = [ln.loss_and_grads(model, adapter, **b)[1] for b in (batch, changed)]
        assert same_bits(*grads)


def padded(batch, left, right):
    """The batch with so many places of padding on either side, of what an encoder reads too."""
    masks = {"mask": "tokens", "source_mask": "source"}
    masks = {name: np.ones(batch[of].shape, dtype=bool) for name, of in masks.items() if of in batch}
    given = {name: a for name, a in batch.items() if a is not None}
    fill = {"targets": -100, "mask": False, "source_mask": False}
    return {
        name: np.pad(a, ((0, 0), (left, right)), constant_values=fill.get(name, 0)) if a.ndim == 2 else a
        for name, a in {**masks, **given}.items()
    }


@proves("T9", "T11", "T14")
@given(cases(**FLOAT64), st.integers(0, 2), st.integers(0, 2))
def test_padding_on_either_side_changes_nothing(case, left, right):
    """Real logits, loss and gradients of the wider batch are the narrow one's, within rounding."""
    model, adapter, batch, _ = case
    wide = padded(batch, left, right)
    one = real_logits(model.config, ln.forward(model, adapter=adapter, **inputs(batch)), batch["mask"])
    other = real_logits(model.config, ln.forward(model, adapter=adapter, **inputs(wide)), wide["mask"])
    assert all(deviation(b, a) <= 1e-12 for a, b in zip(one, other, strict=True))
    loss, grads = ln.loss_and_grads(model, adapter, **batch)
    wide_loss, wide_grads = ln.loss_and_grads(model, adapter, **wide)
    assert abs(loss - wide_loss) <= 1e-12 * (1 + abs(loss))
    assert farthest(grads, wide_grads) <= 1e-12 * max(gradient_scale(model, batch), largest(grads))


# --- T13: activation checkpointing ------------------------------------------------------------------------------------


@proves("T13", "T12")
@given(cases(dropout=True), seeds, st.booleans())
def test_recomputing_changes_no_bit(case, dropout_seed, every_weight):
    options = {"trainable": "all"} if every_weight else {"dropout_seed": dropout_seed}
    adapter = None if every_weight else case.adapter
    loss, grads = ln.loss_and_grads(case.model, adapter, **case.batch, **options)
    again, grads_again = ln.loss_and_grads(case.model, adapter, **case.batch, **options, recompute=True)
    assert loss == again
    assert same_bits(grads, grads_again)


@proves("T13")
@pytest.mark.skipif(backend_name == "cupy", reason="tracemalloc sees the host's memory alone")
def test_recomputing_keeps_the_inputs_of_half_blocks_alone(monkeypatch):
    """A layer more costs the inputs of its two halves, D floats a token each; kept whole it costs far more."""
    monkeypatch.setattr("lora_np.threads.os.cpu_count", lambda: 1)  # what parts need for a moment falls on one another
    tokens = np.random.default_rng(0).integers(0, 64, (8, 64))
    inputs_of_a_layer = 2 * 4 * tokens.size * 64

    def peak(n_layer, recompute):
        config = ln.Config(64, 64, n_layer, 2, 64, 256, activation="gelu")
        model = random_model(config, seed=0, dtype="float32")
        adapter = trained_adapter(model, ln.LoRAConfig(r=2), seed=0)
        tracemalloc.start()
        ln.loss_and_grads(model, adapter, tokens, tokens[:, ::-1], recompute=recompute)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    whole, less = ((peak(8, recompute) - peak(2, recompute)) / 6 for recompute in (False, True))
    assert less < 1.1 * inputs_of_a_layer
    assert whole > 4 * less


# --- A base held in fewer bits ---------------------------------------------------------------------------------------

in_nf4 = partial(ln.quantise_nf4, block=32)
kinds = pytest.mark.parametrize("hold", [in_bfloat16, in_nf4], ids=["bfloat16", "NF4"])


@kinds
@proves("L2", "L4", "L11", "T13")
@given(cases(dtype=st.just("float32"), dropout=True), seeds)
def test_a_base_held_in_fewer_bits_gives_the_same_bits(hold, case, dropout_seed):
    """These matrices are of one block each: their products are the same, and so are their roundings."""
    wide, narrow = in_fewer_bits(case.model, hold)
    adapter = ln.init_adapter(wide, case.adapter.config, seed=0)
    assert same_bits(ln.init_adapter(narrow, case.adapter.config, seed=0).params, adapter.params)
    loss, grads = ln.loss_and_grads(wide, adapter, **case.batch, dropout_seed=dropout_seed)
    held, held_grads = ln.loss_and_grads(narrow, adapter, **case.batch, dropout_seed=dropout_seed)
    assert loss == held
    assert same_bits(grads, held_grads)
    rows = [adapter if n % 2 == 0 else None for n in range(len(case.batch["tokens"]))]
    wide_rows, held_rows = (ln.forward(model, adapter=rows, **inputs(case.batch)) for model in (wide, narrow))
    assert same_bits(wide_rows, held_rows)


@kinds
@proves("L2", "L4", "L11")
@given(cases(dtype=st.just("float32")))
def test_in_many_blocks_it_gives_the_bits_of_its_numbers_in_the_same_blocks(hold, case):
    """A product by blocks sums in another order than one of the whole matrix: so both are by blocks of a few rows."""
    wide, narrow = in_fewer_bits(case.model, hold)
    _, unrounded = in_fewer_bits(wide, lambda W: Unrounded(W.shape, W))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_np.backend.CACHE_ELEMENTS", 8)
        (loss, grads), (held, held_grads) = (
            ln.loss_and_grads(model, case.adapter, **case.batch) for model in (unrounded, narrow)
        )
    assert loss == held
    assert same_bits(grads, held_grads)


@kinds
@proves("L5", "L6", "L11")
@given(cases(dtype=st.just("float32")))
def test_a_base_held_in_fewer_bits_merges_in_float32(hold, case):
    wide, narrow = in_fewer_bits(case.model, hold)
    merged = ln.merge(narrow, case.adapter)
    got = {name: widened(w) for name, w in merged.weights.items()}
    assert same_bits(got, dict(ln.merge(wide, case.adapter).weights))
    assert ln.unmerge(merged, case.adapter) is narrow
