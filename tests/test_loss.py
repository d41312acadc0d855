"""What others call: logits, the loss and its gradients, of a batch, with one adapter or one for each row."""

import math
import tracemalloc
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    FLOAT64,
    bits,
    case_of,
    cases,
    checked,
    deviation,
    device,
    farthest,
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
    trained_adapter,
)

import lora_np as ln
from lora_np import ops
from lora_np.backend import asnumpy, backend_name
from lora_np.binding import bind, frozen
from lora_np.gradcheck import complex_step, relative_error
from lora_np.vectors.derivatives import FLOOR

proves = pytest.mark.proves
LOSS = import_module("lora_np.loss")  # ln.loss is the function in it
GPT2 = ln.Config(7, 8, 2, 2, 8, 6)
EVERY_HEAD = ("lm", "classify", "tag", "none")


def row_of(batch, n):
    return {name: None if a is None else a[n : n + 1] for name, a in batch.items()}


# --- T14, T15: logits and loss ----------------------------------------------------------------------------------------


@proves("T14")
@given(cases(heads=EVERY_HEAD))
def test_logits_have_the_shape_of_the_head_and_the_dtype_of_the_model(case):
    model, adapter, batch, _ = case
    (N, T), config = batch["tokens"].shape, model.config
    shapes = {
        "lm": (N, T, config.vocab_size),
        "classify": (N, config.n_labels),
        "tag": (N, T, config.n_labels),
        "none": (N, T, config.d_model),
    }
    logits = ln.forward(model, adapter=adapter, **inputs(batch))
    assert logits.shape == shapes[config.head]
    assert logits.dtype == model.dtype


@proves("T15")
@given(cases(**FLOAT64))
def test_loss_is_the_mean_over_counted_targets(case):
    model, adapter, batch, _ = case
    logits = asnumpy(ln.forward(model, adapter=adapter, **inputs(batch)))
    counted = batch["targets"] != -100
    rows, targets = logits[counted], batch["targets"][counted]
    losses = [math.log(math.fsum(np.exp(row))) - row[t] for row, t in zip(rows, targets, strict=True)]
    expected = math.fsum(losses) / len(losses)
    got = ln.loss(model, adapter=adapter, **batch)
    assert isinstance(got, float)
    assert abs(got - expected) <= 1e-13 * (1 + np.abs(rows).max())
    assert abs(ln.loss_and_grads(model, adapter, **batch)[0] - got) <= 1e-15 * (1 + np.abs(rows).max())


@proves("T14", "T15")
@given(cases(**FLOAT64))
def test_a_score_is_the_sum_of_the_losses_and_the_number_of_hits(case):
    """A hit: the target has the largest logit. Counted as a batch's own logits have it, in chunks of two."""
    model, adapter, batch, _ = case
    one = checked(model.config, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LOSS, "HEAD_ROWS", 2)
        run = frozen(bind(model, adapter, rows=len(one.tokens)))
        total, hits = LOSS.batch_score(run, one)
    counted = batch["targets"] != -100
    logits = asnumpy(ln.forward(model, adapter=adapter, **inputs(batch)))[counted]
    count = int(counted.sum())
    assert int(hits) == int((logits.argmax(axis=-1) == batch["targets"][counted]).sum())
    assert abs(float(total) / count - ln.loss(model, adapter=adapter, **batch)) <= 1e-13 * (1 + np.abs(logits).max())


@proves("L2", "T12", "T15")
@pytest.mark.parametrize("head_rows", [2, 256])
@pytest.mark.parametrize("padded", [False, True])
def test_a_heads_dropout_is_that_of_each_counted_token(padded, head_rows, monkeypatch):
    """By hand from the states: a token that is left out moves no other token's mask, nor does a chunk's edge."""
    monkeypatch.setattr(LOSS, "HEAD_ROWS", head_rows)
    config = replace(GPT2, tie_head=False)
    model, adapter, batch, _ = case_of(config, targets=("head",), dropout=0.5)
    batch["targets"][[0, 1, 2, 2], [3, 0, 1, 4]] = -100
    if padded:
        batch["mask"] = np.ones((3, 5), dtype=bool)
        batch["mask"][[0, 1, 2], [3, 0, 4]] = False
    headless = ln.Model(replace(config, head="none"), {n: w for n, w in model.weights.items() if n != "head.weight"})
    states = asnumpy(ln.forward(headless, batch["tokens"], mask=batch.get("mask")))
    n, t = np.nonzero(batch["targets"] != -100)
    h = states[n, t]
    m = asnumpy(ops.dropout_mask(device(n), device(t), 8, 0.5, seed=3, stream="head", dtype="float64"))
    W0, A, B = (asnumpy(a) for a in (model.weights["head.weight"], adapter.params["head.A"], adapter.params["head.B"]))
    s = scale_by_hand(adapter.config, "head")
    logits = h @ W0.T + s * (m * h) @ A.T @ B.T
    targets = batch["targets"][n, t]
    expected = np.mean(np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(len(t)), targets])
    loss, grads = ln.loss_and_grads(model, adapter, **batch, dropout_seed=3)
    assert abs(loss - expected) <= 1e-13 * (1 + np.abs(logits).max())
    d = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    d[np.arange(len(t)), targets] -= 1
    dB = s * (d / len(t)).T @ ((m * h) @ A.T)
    assert deviation(grads["head.B"], dB) <= 1e-12


@proves("T9", "T15", "L4")
@given(cases(**FLOAT64))
def test_what_a_step_is_cut_into_changes_nothing_beyond_rounding(case):
    """The head's chunks, attention's tiles, the blocks of elementwise steps, few rows of a product and many."""
    model, adapter, batch, _ = case
    loss, grads = ln.loss_and_grads(model, adapter, **batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LOSS, "HEAD_ROWS", 2)
        patch.setattr(ops, "QUERY_ROWS", 2)
        patch.setattr(ops, "FEW_ROWS", 0)
        patch.setattr("lora_np.backend.CACHE_ELEMENTS", 16)
        cut_loss, cut = ln.loss_and_grads(model, adapter, **batch)
    assert abs(loss - cut_loss) <= 1e-13 * (1 + abs(loss))
    assert farthest(grads, cut) <= 1e-12 * max(gradient_scale(model, batch), largest(grads))


@proves("T14", "T15")
@pytest.mark.skipif(backend_name == "cupy", reason="tracemalloc sees the host's memory alone")
@pytest.mark.parametrize("of", [ln.loss, ln.loss_and_grads])
def test_one_chunk_of_logits_is_held_at_a_time(of, monkeypatch):
    """Of four, where logits are all but the whole of the memory: a chunk's are gone when the next one's come."""
    monkeypatch.setattr(LOSS, "HEAD_ROWS", 64)
    config = ln.Config(2**14, 128, 1, 1, 4, 4)
    model, adapter, batch, _ = case_of(config, N=2, T=128, dtype="float32")
    tracemalloc.start()
    try:
        of(model, adapter=adapter, **batch)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    chunk = 64 * config.vocab_size * 4
    assert chunk <= peak < 1.5 * chunk


# --- L4: which gradients there are ------------------------------------------------------------------------------------


def described(arrays):
    return {name: (a.shape, a.dtype) for name, a in arrays.items()}


@proves("L4")
@given(cases(dropout=True), seeds, st.booleans())
def test_gradients_are_the_adapters_and_the_base_never_changes(case, dropout_seed, recompute):
    """Nor does the adapter, nor the batch."""
    model, adapter, batch, _ = case
    given_arrays = model.weights, adapter.params, {name: a for name, a in batch.items() if a is not None}
    before = [{name: bits(a) for name, a in arrays.items()} for arrays in given_arrays]
    _, grads = ln.loss_and_grads(model, adapter, **batch, dropout_seed=dropout_seed, recompute=recompute)
    assert list(grads) == list(adapter.params)
    assert described(grads) == described(adapter.params)
    assert before == [{name: bits(a) for name, a in arrays.items()} for arrays in given_arrays]


@proves("L4")
@given(cases())
def test_full_gradients_are_every_weights(case):
    model, _, batch, _ = case
    before = {name: bits(a) for name, a in model.weights.items()}
    _, grads = ln.loss_and_grads(model, None, **batch, trainable="all")
    assert list(grads) == list(model.weights)
    assert described(grads) == described(model.weights)
    assert before == {name: bits(a) for name, a in model.weights.items()}


# --- L7: an adapter for each row --------------------------------------------------------------------------------------


@st.composite
def rows_of_adapters(draw, whole=True, targets=None, **fields):
    """A Case whose adapter is a list: for each row an adapter of its own targets, ranks and scale, or none."""
    case = draw(cases(**fields))
    lora = lora_configs(case.model.config, dropout=False, whole=whole, targets=targets)
    chosen = [draw(st.one_of(st.none(), lora, lora)) for _ in case.batch["tokens"]]
    adapters = [
        None if lora_config is None else trained_adapter(case.model, lora_config, seed=(case.seed + n) % 2**32)
        for n, lora_config in enumerate(chosen)
    ]
    return case._replace(adapter=adapters)


@proves("L7")
@given(rows_of_adapters(heads=EVERY_HEAD, **FLOAT64))
def test_adapters_per_row_act_as_each_row_alone(case):
    model, adapters, batch, _ = case
    logits = real_logits(model.config, ln.forward(model, adapter=adapters, **inputs(batch)), batch["mask"])
    for n, adapter in enumerate(adapters):
        row = row_of(batch, n)
        alone = ln.forward(model, adapter=adapter, **inputs(row))
        assert deviation(logits[n], real_logits(model.config, alone, row["mask"])[0]) <= 1e-12


@proves("L7")
@given(cases(heads=EVERY_HEAD, min_rows=2))
def test_the_rows_of_one_adapter_are_that_adapter(case):
    """Where s is a power of two, or not: s goes into B, one rounding more; the same adapter for each row otherwise."""
    model, adapter, batch, _ = case
    N = len(batch["tokens"])
    together = ln.forward(model, adapter=adapter, **inputs(batch))
    by_row = ln.forward(model, adapter=[adapter] * N, **inputs(batch))
    nobody = ln.forward(model, adapter=[None] * N, **inputs(batch))
    real, real_by_row = (real_logits(model.config, logits, batch["mask"]) for logits in (together, by_row))
    for one, other in zip(real_by_row, real, strict=True):
        assert deviation(one, other) <= (1e-12 if model.dtype == "float64" else 1e-3)
    assert same_bits(nobody, ln.forward(model, **inputs(batch)))


def check_loss_per_row(model, adapters, batch):
    """The loss of a batch with a list of adapters is the mean of its rows', by their counted targets."""
    total, count = 0.0, 0
    for n, adapter in enumerate(adapters):
        row = row_of(batch, n)
        counted = int((row["targets"] != -100).sum())
        if counted:
            total += counted * ln.loss(model, adapter=adapter, **row)
            count += counted
    assert abs(ln.loss(model, adapter=adapters, **batch) - total / count) <= 1e-12 * (1 + total / count)


@proves("L7", "T15")
@given(rows_of_adapters(whole=False, targets=("q", "v", "embed"), **FLOAT64))
def test_the_loss_of_adapters_per_row_is_the_mean_over_rows(case):
    check_loss_per_row(*case[:3])


@proves("L7", "T15")
@pytest.mark.parametrize("fields", [{"targets": ("head",)}, {"train_head": True}, {"bias": "all"}], ids=str)
def test_the_loss_of_heads_per_row_is_the_mean_over_rows(fields):
    model, adapter, batch, _ = case_of(replace(GPT2, head="tag", n_labels=3), **fields)
    check_loss_per_row(model, [adapter, None, rescaled(adapter, 2.0)], batch)


@proves("L7", "T15")
@given(rows_of_adapters(whole=False, targets=("q", "o", "up"), padding=("left", "right", "holes"), **FLOAT64))
def test_counted_rows_are_found_where_each_row_has_an_adapter(case):
    """No padding is left out there, and the targets are still scored against the logits of their own places."""
    model, adapters, batch, _ = case
    one = checked(model.config, batch)
    total, _ = LOSS.batch_score(frozen(bind(model, adapters, rows=len(adapters))), one)
    expected = ln.loss(model, adapter=adapters, **batch) * len(one.counted)
    assert abs(float(total) - expected) <= 1e-12 * (1 + expected)


@proves("L7")
@given(cases(**FLOAT64))
def test_switching_adapters_leaves_the_model_alone(case):
    """Forward with one adapter, then another, then none: each as if it were the first."""
    model, adapter, batch, _ = case
    other = trained_adapter(model, adapter.config, seed=case.seed // 2 + 1)
    first = [bits(ln.forward(model, adapter=a, **inputs(batch))) for a in (adapter, other, None)]
    again = [bits(ln.forward(model, adapter=a, **inputs(batch))) for a in (None, other, adapter)]
    assert first == again[::-1]


# --- O4: order and splitting ------------------------------------------------------------------------------------------


@proves("O4")
@given(cases(min_rows=2, **FLOAT64), seeds)
def test_the_order_of_a_batch_changes_nothing_beyond_rounding(case, seed):
    model, adapter, batch, _ = case
    order = np.random.default_rng(seed).permutation(len(batch["tokens"]))
    shuffled = {name: None if a is None else a[order] for name, a in batch.items()}
    logits = asnumpy(ln.forward(model, adapter=adapter, **inputs(batch)))
    assert deviation(ln.forward(model, adapter=adapter, **inputs(shuffled)), logits[order]) <= 1e-12
    loss, grads = ln.loss_and_grads(model, adapter, **batch)
    other_loss, others = ln.loss_and_grads(model, adapter, **shuffled)
    assert abs(loss - other_loss) <= 1e-12 * (1 + abs(loss))
    assert farthest(grads, others) <= 1e-12 * max(gradient_scale(model, batch), largest(grads))


@proves("O4")
@given(cases(min_rows=2, **FLOAT64))
def test_splitting_a_batch_changes_nothing_beyond_rounding(case):
    """Each row alone gives its logits; loss and gradients are the means of the rows', by their counted targets."""
    model, adapter, batch, _ = case
    logits = asnumpy(ln.forward(model, adapter=adapter, **inputs(batch)))
    loss, grads = ln.loss_and_grads(model, adapter, **batch)
    total, sums, count = 0.0, dict.fromkeys(grads, 0.0), int((batch["targets"] != -100).sum())
    for n in range(len(logits)):
        row = row_of(batch, n)
        alone = asnumpy(ln.forward(model, adapter=adapter, **inputs(row)))
        assert np.abs(alone[0] - logits[n]).max() <= 1e-12 * np.abs(logits).max()
        counted = int((row["targets"] != -100).sum())
        if counted:
            row_loss, row_grads = ln.loss_and_grads(model, adapter, **row)
            total += row_loss * counted / count
            sums = {name: sums[name] + asnumpy(row_grads[name]) * counted / count for name in sums}
    assert abs(loss - total) <= 1e-12 * (1 + abs(loss))
    assert farthest(grads, {name: device(total) for name, total in sums.items()}) <= 1e-12 * max(
        gradient_scale(model, batch), largest(grads)
    )


# --- T12: dropout over a step -----------------------------------------------------------------------------------------

DROPOUT = {"dropout": 0.4, "targets": ("q", "v", "o", "up", "down", "head")}


@proves("T12", "L2")
def test_dropout_depends_on_its_seed_alone():
    model, adapter, batch, _ = case_of(replace(GPT2, tie_head=False), **DROPOUT)
    results = [ln.loss_and_grads(model, adapter, **batch, dropout_seed=seed) for seed in (1, 1, 2)]
    with pytest.warns(UserWarning, match="dropout_seed is None"):
        results.append(ln.loss_and_grads(model, adapter, **batch))
    assert results[0][0] == results[1][0]
    assert same_bits(results[0][1], results[1][1])
    assert len({loss for loss, _ in results}) == 3
    assert results[3][0] == ln.loss(model, adapter=adapter, **batch)


@proves("T12")
@pytest.mark.parametrize("step", [ln.loss_and_grads, ln.sharded_loss_and_grads])
def test_dropout_that_has_no_seed_is_left_out_and_warned_of_where_the_step_is_called(step):
    """And nowhere where none is due: with a seed, without dropout, in a loss."""
    model, adapter, batch, _ = case_of(GPT2, dropout=0.4, targets=("q",))
    with pytest.warns(UserWarning, match="dropout_seed is None: no dropout, though the adapter's") as warned:
        step(model, adapter, **batch)
    assert [one.filename for one in warned] == [__file__]
    step(model, adapter, **batch, dropout_seed=0)
    step(model, replace(adapter, config=replace(adapter.config, dropout=0.0)), **batch)
    step(model, None, **batch, trainable="all")
    ln.loss(model, adapter=adapter, **batch)


@proves("T12", "L3")
@given(cases(), seeds)
def test_no_dropout_without_a_probability(case, seed):
    model, adapter, batch, _ = case
    loss, grads = ln.loss_and_grads(model, adapter, **batch)
    with_seed = ln.loss_and_grads(model, adapter, **batch, dropout_seed=seed)
    assert with_seed[0] == loss
    assert same_bits(with_seed[1], grads)


@proves("T12", "L4")
@pytest.mark.parametrize(
    "config",
    [
        GPT2,
        replace(GPT2, head="classify", n_labels=3, causal=False),
        replace(GPT2, activation="silu_gated", n_kv_head=1, positions="rotary", tie_head=False),
    ],
    ids=["language model", "classifier", "gated, grouped, rotary"],
)
def test_gradients_under_dropout(config):
    """Of the loss with the same masks, by complex step, for every target that has dropout."""
    gate = ("gate",) if config.gated else ()
    model, adapter, batch, _ = case_of(config, N=2, T=3, **{**DROPOUT, "targets": (*DROPOUT["targets"], "k", *gate)})
    wide = ln.Model(config, {name: w.astype(complex) for name, w in model.weights.items()})
    params = {name: p.astype(complex) for name, p in adapter.params.items()}
    _, grads = ln.loss_and_grads(model, adapter, **batch, dropout_seed=5)
    floor = FLOOR * largest(grads)
    for name, value in adapter.params.items():

        def loss(x, name=name):
            there = replace(adapter, params={**params, name: x})
            return ln.loss_and_grads(wide, there, **batch, dropout_seed=5)[0]

        assert relative_error(grads[name], complex_step(loss, value), floor=floor) <= 1e-11


@proves("T12", "L4")
def test_a_fused_pair_shares_its_dropout_mask():
    """Three separate updates with the fused one's A have other masks; with the mask shared, one A sees one input."""
    model, adapter, batch, _ = case_of(GPT2, targets=("qkv",), dropout=0.4)
    D = GPT2.d_model
    params = {}
    for i in range(GPT2.n_layer):
        A, B = (adapter.params[f"layers.{i}.attn.qkv.{f}"] for f in "AB")
        for j, part in enumerate("qkv"):
            params |= {f"layers.{i}.attn.{part}.A": A, f"layers.{i}.attn.{part}.B": B[j * D : (j + 1) * D]}
    split = ln.Adapter(replace(adapter.config, targets=("q", "k", "v")), params)
    undropped = [ln.Adapter(replace(a.config, dropout=0.0), a.params) for a in (adapter, split)]
    without = [ln.loss_and_grads(model, a, **batch) for a in undropped]
    assert without[0][0] == without[1][0]
    for i in range(GPT2.n_layer):
        parts = [asnumpy(without[1][1][f"layers.{i}.attn.{part}.A"]) for part in "qkv"]
        assert deviation(without[0][1][f"layers.{i}.attn.qkv.A"], sum(parts)) <= 1e-14
        joined = np.concatenate([asnumpy(without[1][1][f"layers.{i}.attn.{part}.B"]) for part in "qkv"])
        assert same_bits(without[0][1][f"layers.{i}.attn.qkv.B"], joined)
    fused, separate = (ln.loss_and_grads(model, a, **batch, dropout_seed=1)[0] for a in (adapter, split))
    assert fused != separate


# --- What does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "trainable", "error", "message"),
    [
        (None, "adapter", ValueError, "expected an adapter to train"),
        ("one", "all", ValueError, "expected an adapter to train"),
        ("one", "some", ValueError, "trainable: expected adapter or all, got 'some'"),
        ("list", "adapter", TypeError, "one adapter is trained at a time, got list"),
    ],
)
def test_training_the_wrong_thing_is_refused(adapter, trainable, error, message):
    model, one, batch, _ = case_of(GPT2)
    adapter = {"one": one, "list": [one] * 3}.get(adapter)
    with pytest.raises(error, match=message):
        ln.loss_and_grads(model, adapter, **batch, trainable=trainable)


def test_a_list_of_adapters_of_the_wrong_length_is_refused():
    model, one, batch, _ = case_of(GPT2)
    with pytest.raises(ValueError, match="for each of 3 rows, got a list of 2"):
        ln.forward(model, batch["tokens"], [one, None])


@proves("T2")
def test_what_is_held_in_bfloat16_is_not_trained():
    _, narrow = in_fewer_bits(random_model(ln.Config(7, 8, 1, 1, 4, 4), seed=0, dtype="float32"), in_bfloat16)
    with pytest.raises(ValueError, match=r"trainable='all': embed.tokens is held in bfloat16, which is for frozen"):
        ln.loss_and_grads(narrow, None, [[1]], [[2]], trainable="all")
