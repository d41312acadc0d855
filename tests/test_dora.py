"""L10: DoRA of one matrix, and in a model. Whole models: the strategies of all other tests draw it too."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    case_of,
    cases,
    device,
    frozen_matrix,
    gamma,
    host_weights,
    inputs,
    random_model,
    same_bits,
    seeds,
)

import lora_np as ln
from lora_np import dora, gradcheck
from lora_np.backend import asnumpy, xp
from lora_np.lora import Update
from lora_np.vectors.derivatives import architectures

proves = pytest.mark.proves
GPT2 = architectures()["GPT-2, language model"]
sizes = st.integers(1, 6)


def matrices(seed, n_in=6, n_out=5, r=2):
    """x, W0, b, A, B, m of random numbers, float64."""
    normal = np.random.default_rng(seed).standard_normal
    x, W0, b = normal((2, 3, n_in)), normal((n_out, n_in)), normal(n_out)
    return {"x": x, "W0": W0, "b": b, "A": normal((r, n_in)), "B": normal((n_out, r)), "m": normal(n_out)}


def on_device(arrays):
    return {name: device(a) for name, a in arrays.items()}


def dropout_mask(seed, shape, p=0.3):
    return (np.random.default_rng(seed).random(shape) >= p) / (1 - p)


# --- One matrix ----------------------------------------------------------------------------------------------------


@proves("L10")
@given(seeds, sizes, sizes, sizes, st.booleans())
def test_forward_is_each_row_scaled_to_its_magnitude(seed, n_in, n_out, r, dropped):
    """m / c times each row of W0 + s B A; with dropout as PEFT writes it: W0's part is dropped too."""
    case = matrices(seed, n_in, n_out, r)
    x, W0, b, A, B, m = case.values()
    mask = dropout_mask(seed, x.shape) if dropped else None
    h, _ = ln.dora_linear(**on_device(case), s=0.7, dropout_mask=None if mask is None else device(mask))
    V = W0 + 0.7 * B @ A
    c = np.sqrt((V * V).sum(axis=1))
    # by how much the sizes of V's sums exceed V, relative: where they cancel, c is as uncertain
    cancelled = np.sqrt(((np.abs(W0) + 0.7 * np.abs(B) @ np.abs(A)) ** 2).sum(axis=1)) / c
    g = m / c
    d = x if mask is None else mask * x
    expected = x @ W0.T + b + (g - 1) * (d @ W0.T) + g * (0.7 * (d @ A.T) @ B.T)
    size = (np.abs(x) + np.abs(d)) @ np.abs(W0).T * (1 + np.abs(g)) + np.abs(b)
    size = size + np.abs(g) * 0.7 * (np.abs(d) @ np.abs(A).T @ np.abs(B).T)
    assert np.all(np.abs(asnumpy(h) - expected) <= 2 * gamma(2 * n_in + 2 * r + 16) * size * cancelled)


@proves("L10")
@given(seeds, sizes, sizes, sizes, st.booleans())
def test_gradients_of_a_linear_with_its_norm_given(seed, n_in, n_out, r, dropped):
    case = matrices(seed, n_in, n_out, r)
    c = dora.weight_norm(*(device(case[name]) for name in ("W0", "A", "B")), 0.7)
    mask = device(dropout_mask(seed, case["x"].shape)) if dropped else None

    def forward(**arrays):
        return ln.dora_linear(**arrays, s=0.7, norm=c, dropout_mask=mask)

    def backward(dh, **arrays):
        return dict(zip(("x", "A", "B", "m"), ln.dora_linear_backward(dh, forward(**arrays)[1]), strict=True))

    errors = gradcheck.check(lambda **arrays: forward(**arrays)[0], backward, case)
    assert max(errors.values()) <= 1e-12


@proves("L10")
@given(seeds)
def test_gradients_of_an_embedding_with_its_norm_given(seed):
    normal = np.random.default_rng(seed).standard_normal
    tokens = device(np.array([[0, 3, 3], [1, 0, 4]]))
    case = {"E": normal((5, 4)), "A": normal((2, 5)), "B": normal((4, 2)), "m": normal(4)}
    E, A, B = (device(case[name]) for name in "EAB")
    c = dora.weight_norm(E, B.T, A.T, 0.7, axis=0)
    norms = np.sqrt(((case["E"] + 0.7 * (case["B"] @ case["A"]).T) ** 2).sum(axis=0))
    assert np.abs(asnumpy(c) - norms).max() <= 1e-14 * norms.max()

    def forward(**arrays):
        return dora.dora_embedding(tokens, **arrays, s=0.7, norm=c)

    def backward(dh, **arrays):
        return dict(zip("ABm", dora.dora_embedding_backward(dh, forward(**arrays)[1]), strict=True))

    assert max(gradcheck.check(lambda **arrays: forward(**arrays)[0], backward, case).values()) <= 1e-12


@proves("L10")
@given(seeds)
def test_the_exact_derivative_lacks_what_runs_along_the_row(seed):
    """With c a function of B and A, dV = (m / c) (G - v (v . G) / c^2), row by row, where G = g^T x: by complex steps.

    With c a constant the second term is missing: all of the gradient that would only lengthen the row."""
    x, W0, _, A, B, m = matrices(seed).values()
    dh, s = np.random.default_rng(seed).standard_normal((*x.shape[:-1], len(m))), 0.7

    def whole(B, A):
        V = W0 + s * B @ A
        return (dh * (x @ (m / np.sqrt((V * V).sum(axis=1)) * V.T).astype(complex))).sum()

    V = W0 + s * B @ A
    c = np.sqrt((V * V).sum(axis=1, keepdims=True))
    G = dh.reshape(-1, len(m)).T @ x.reshape(-1, x.shape[-1])
    along = V * (V * G).sum(axis=1, keepdims=True) / c**2
    exact = gradcheck.complex_step(lambda A: whole(asnumpy(B), asnumpy(A)), device(A))
    wanted = s * B.T @ ((m[:, None] / c) * (G - along))
    assert np.abs(asnumpy(exact) - wanted).max() <= 1e-12 * np.abs(wanted).max() + 1e-13
    arrays = on_device({"x": x, "W0": W0, "A": A, "B": B, "m": m})
    _, dA, _, _ = ln.dora_linear_backward(device(dh), ln.dora_linear(**arrays, b=None, s=s)[1])
    constant = s * B.T @ ((m[:, None] / c) * G)
    assert np.abs(asnumpy(dA) - constant).max() <= 1e-12 * np.abs(constant).max()


@proves("L10", "L5")
@given(seeds, sizes, sizes, sizes, st.sampled_from(["float32", "float64"]))
def test_merged_and_unmerged_agree(seed, n_in, n_out, r, dtype):
    """Unmerged, a product passes L5's roundings, in + r + 3, and three more: c's, m / c's, and the product with that.
    Merged, W' is rounded once; float64's own are in the rounding up. Each is within |m / c| times L5's sizes."""
    case = {name: a.astype(dtype) for name, a in matrices(seed, n_in, n_out, r).items()}
    x, W0, b, A, B, m = case.values()
    h, _ = ln.dora_linear(**on_device(case), s=0.5)
    W = dora.dora_merge_matrix(device(W0), Update(device(A), device(B), 0.5, m=device(m)))
    assert W.dtype == dtype
    merged = asnumpy(x).astype(dtype) @ asnumpy(W).T + b
    wide = {name: a.astype("float64") for name, a in case.items()}
    g = np.abs(wide["m"]) / np.sqrt(((wide["W0"] + 0.5 * wide["B"] @ wide["A"]) ** 2).sum(axis=1))
    size = np.abs(x) @ np.abs(W0).T + 0.5 * np.abs(x) @ np.abs(A).T @ np.abs(B).T
    bound = 2 * gamma(n_in + r + 8, dtype) * (g * size + np.abs(b))
    assert np.all(np.abs(asnumpy(h).astype("float64") - merged) <= bound)


@proves("L10")
def test_a_row_of_zeros_stays_zero():
    """It has no direction: 0 / 0 would be NaN, as it is in PEFT. It learns nothing, and no other row notices."""
    case = matrices(0)
    case["W0"][2] = case["B"][2] = case["m"][2] = case["b"][2] = 0
    arrays = on_device(case)
    h, saved = ln.dora_linear(**arrays, s=0.7)
    dx, dA, dB, dm = (asnumpy(d) for d in ln.dora_linear_backward(xp.ones_like(h), saved))
    assert np.isfinite(asnumpy(h)).all()
    assert not asnumpy(h)[..., 2].any()
    assert not dB[2].any()
    assert dm[2] == 0
    assert all(np.isfinite(d).all() for d in (dx, dA, dB, dm))
    W = dora.dora_merge_matrix(arrays["W0"], Update(arrays["A"], arrays["B"], 0.7, m=arrays["m"]))
    assert not asnumpy(W)[2].any()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"m": np.ones(4)}, ValueError, r"dora_linear: m: expected shape \(5,\), got \(4,\)"),
        ({"m": np.ones(5, dtype=int)}, TypeError, "dora_linear: m: expected floats, got int64"),
        ({"norm": np.ones((5, 1))}, ValueError, r"dora_linear: norm: expected shape \(5,\), got \(5, 1\)"),
        ({"A": np.ones((2, 7))}, ValueError, r"A: expected \(r, 6\)"),
        ({"b": np.ones(1)}, ValueError, r"dora_linear: b: expected shape \(5,\), got \(1,\)"),
        (
            {"dropout_mask": np.ones(6)},
            ValueError,
            r"dora_linear: dropout_mask: expected shape \(2, 3, 6\), got \(6,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changed, error, message):
    with pytest.raises(error, match=message):
        ln.dora_linear(**on_device(matrices(0) | changed), s=1.0)


def test_what_forward_did_not_save_is_refused():
    arrays = on_device(matrices(0))
    low = ln.lora_linear(**{name: a for name, a in arrays.items() if name != "m"}, s=1.0)[1]
    with pytest.raises(TypeError, match="dora_linear_backward: saved: expected what dora_linear gave with h"):
        ln.dora_linear_backward(xp.ones((2, 3, 5)), low)


# --- In a model ----------------------------------------------------------------------------------------------------


@proves("L10", "L3")
@given(cases(heads=("lm", "classify", "tag", "none")))
def test_the_adapted_model_starts_as_the_base(case):
    """To the bit: m is c, rounded alike, and m / c is 1."""
    model, adapter, batch, seed = case
    start = ln.init_adapter(model, replace(adapter.config, dora=True), seed=seed)
    assert same_bits(ln.forward(model, adapter=start, **inputs(batch)), ln.forward(model, **inputs(batch)))


@proves("L10", "L8")
def test_there_is_a_magnitude_for_each_row_of_each_adapted_matrix():
    model = random_model(GPT2, seed=0)
    lora_config = ln.LoRAConfig(r=2, targets=("qkv", "embed"), dora=True)
    adapter = ln.init_adapter(model, lora_config, seed=0)
    D, V = GPT2.d_model, GPT2.vocab_size
    shapes = {name: p.shape for name, p in adapter.params.items() if name.endswith(".m")}
    assert shapes == {"embed.tokens.m": (D,), "layers.0.attn.qkv.m": (3 * D,), "layers.1.attn.qkv.m": (3 * D,)}
    assert ln.count_parameters(GPT2, lora_config) == 2 * (2 * (D + 3 * D) + 3 * D) + 2 * (V + D) + D
    q, k, v = (frozen_matrix(model, f"layers.1.attn.{part}") for part in "qkv")
    norms = np.sqrt((np.concatenate([q, k, v]) ** 2).sum(axis=1))
    assert np.abs(asnumpy(adapter.params["layers.1.attn.qkv.m"]) - norms).max() <= 1e-14 * norms.max()


@proves("L10", "L4")
@given(cases(heads=("lm", "tag"), whole=False, dtype="float64"))
def test_gradients_are_the_chain_rule_of_full_fine_tuning(case):
    """With dW at the merged weights W' = (m / c) V, c a constant: dA = s B^T (m / c) dW, dB = s (m / c) dW A^T, and
    dm = (dW . V) / c."""
    model, adapter, batch, seed = case
    adapter = ln.init_adapter(model, ln.LoRAConfig(r=1, targets=("q", "up"), dora=True), seed=seed)
    moved = {name: p + device(0.3 * np.random.default_rng(seed).random(p.shape)) for name, p in adapter.params.items()}
    adapter = replace(adapter, params=moved)
    _, grads = ln.loss_and_grads(model, adapter, **batch)
    _, full = ln.loss_and_grads(ln.merge(model, adapter), None, **batch, trainable="all")
    assert grads.keys() == adapter.params.keys()
    largest = max(np.abs(asnumpy(g)).max() for g in full.values())
    for name in adapter.matrices:
        A, B, m = (asnumpy(adapter.params[f"{name}.{factor}"]) for factor in "ABm")
        dA, dB, dm = (asnumpy(grads[f"{name}.{factor}"]) for factor in "ABm")
        s, dW = adapter.config.scale(name), asnumpy(full[f"{name}.weight"])
        V = frozen_matrix(model, name) + s * B @ A
        c = np.sqrt((V * V).sum(axis=1, keepdims=True))
        scaled = m[:, None] / c * dW
        slack = 1e-11 * largest * max(1, np.abs(V).max(), np.abs(m[:, None] / c).max()) * 10
        assert np.abs(dA - s * B.T @ scaled).max() <= slack
        assert np.abs(dB - s * scaled @ A.T).max() <= slack
        assert np.abs(dm - (dW * V).sum(axis=1) / c[:, 0]).max() <= slack


@proves("L10", "L6")
def test_unmerging_gives_the_base():
    model, adapter, _, _ = case_of(GPT2, targets=("q", "embed", "head"), dora=True)
    before = host_weights(model)
    merged = ln.merge(model, adapter)
    assert ln.unmerge(merged, adapter) is model
    assert all(same_bits(model.weights[name], w) for name, w in before.items())
    norms = np.sqrt((asnumpy(merged.weights["layers.0.attn.q.weight"]) ** 2).sum(axis=1))
    m = asnumpy(adapter.params["layers.0.attn.q.m"])
    assert np.abs(norms - np.abs(m)).max() <= 1e-14 * norms.max()


@proves("L10", "L7")
def test_rows_may_have_dora_or_not():
    """Each row as if it were alone."""
    model, dora_adapter, batch, _ = case_of(GPT2, N=3, targets=("q", "embed", "head"), dora=True)
    plain = case_of(GPT2, targets=("q", "v"), r=1).adapter
    rows = [plain, None, dora_adapter]
    got = asnumpy(ln.forward(model, batch["tokens"], rows))
    for n, adapter in enumerate(rows):
        alone = asnumpy(ln.forward(model, batch["tokens"][n : n + 1], adapter))
        assert np.abs(got[n] - alone[0]).max() <= 1e-12 * np.abs(alone).max()


@proves("L10")
def test_sums_with_others_are_refused():
    model, adapter, _, _ = case_of(GPT2, dora=True)
    with pytest.raises(ValueError, match="combine: DoRA scales the rows"):
        ln.combine([adapter], [1.0])
    from lora_np.adapter import merge_plan

    for adapters, weights in (([adapter, adapter], [1, 1]), ([adapter], [0.5])):
        with pytest.raises(ValueError, match=r"merge: DoRA scales the rows .* expected one adapter of weight 1"):
            merge_plan(model.config, adapters, weights)


@pytest.mark.parametrize("dora_", [True, False])
def test_magnitudes_without_dora_or_the_reverse_are_refused(dora_):
    factors = {"layers.0.attn.q.A": xp.ones((2, 8)), "layers.0.attn.q.B": xp.ones((8, 2))}
    params = factors if dora_ else factors | {"layers.0.attn.q.m": xp.ones(8)}
    wanted = r"expected shape \(8,\), got none" if dora_ else r"expected none, got \(8,\)"
    with pytest.raises(ValueError, match=rf"Adapter: layers.0.attn.q.m: with dora={dora_} {wanted}"):
        ln.Adapter(ln.LoRAConfig(r=2, dora=dora_), params)


@proves("L10")
def test_a_fused_qkv_is_its_three_parts():
    """q, k and v with the one A, and each its own rows of B and of m."""
    model, fused, batch, _ = case_of(GPT2, targets=("qkv",), dora=True)
    D, params = GPT2.d_model, {}
    for name in fused.matrices:
        for i, part in enumerate("qkv"):
            own, rows = f"{name.removesuffix('qkv')}{part}", slice(i * D, (i + 1) * D)
            params[f"{own}.A"] = fused.params[f"{name}.A"]
            params |= {f"{own}.{factor}": fused.params[f"{name}.{factor}"][rows] for factor in "Bm"}
    parts = ln.Adapter(replace(fused.config, targets=("q", "k", "v")), params)
    expected = asnumpy(ln.forward(model, batch["tokens"], parts))
    assert np.abs(asnumpy(ln.forward(model, batch["tokens"], fused)) - expected).max() <= 1e-12 * np.abs(expected).max()
