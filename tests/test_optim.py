"""AdamW against the paper's algorithm a number at a time; schedules at their ends; clipping."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import bits, deviation, device, dtypes, gamma, same_bits, seeds

import lora_np as ln
from lora_np.backend import asnumpy
from lora_np.optim import clip, learning_rates, warmup_cosine

proves = pytest.mark.proves


def drawn(seed, n, dtype="float64"):
    """n dicts of arrays of two shapes."""
    rng = np.random.default_rng(seed)
    return [
        {"a.A": device(rng.standard_normal((2, 3)), dtype), "a.B": device(rng.standard_normal(4), dtype)}
        for _ in range(n)
    ]


# --- O1: AdamW -------------------------------------------------------------------------------------------------------


def adamw_by_hand(p, gradients, *, lr, b1, b2, eps, decay):
    """Loshchilov and Hutter's algorithm 2 for one number, in Python; and the sum of the sizes of what is added."""
    m = v = 0.0
    size = abs(p)
    for t, g in enumerate(gradients, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        m_hat = m / (1 - b1**t)
        v_hat = v / (1 - b2**t)
        step = lr * (m_hat / (math.sqrt(v_hat) + eps) + decay * p)
        # m is a sum of terms of both signs: what it may err by is relative to their sizes, at most the largest |g|.
        size += lr * (max(map(abs, gradients)) / (1 - b1**t) / (math.sqrt(v_hat) + eps) + decay * abs(p)) + abs(p)
        p -= step
    return p, size


@proves("O1")
@given(
    seeds,
    st.integers(1, 6),
    st.sampled_from([1e-4, 0.1]),
    st.sampled_from([(0.9, 0.999), (0.0, 0.0), (0.5, 0.9)]),
    st.sampled_from([1e-8, 1.0]),
    st.sampled_from([0.0, 0.1]),
    dtypes,
)
def test_adamw_is_the_papers(seed, steps, lr, betas, eps, decay, dtype):
    params, *gradients = drawn(seed, steps + 1, dtype)
    start, state = params, None
    for grads in gradients:
        params, state = ln.adamw(params, grads, state, lr=lr, betas=betas, eps=eps, weight_decay=decay)
    assert state.step == steps
    for name, p in params.items():
        assert p.dtype == dtype
        for place in np.ndindex(p.shape):
            history = [float(asnumpy(g[name])[place]) for g in gradients]
            expected, size = adamw_by_hand(
                float(asnumpy(start[name])[place]), history, lr=lr, b1=betas[0], b2=betas[1], eps=eps, decay=decay
            )
            # 1 - b errs by u / (1 - b) of itself in a narrow dtype; a step has some ten roundings more.
            assert abs(float(asnumpy(p)[place]) - expected) <= gamma(16 * steps, dtype) * size


@proves("O1")
@given(seeds, st.sampled_from([1e-3, 0.1]))
def test_the_first_step_is_the_sign_of_the_gradient(seed, lr):
    """Bias correction: m-hat = g and v-hat = g^2, so the step is lr whatever the gradient's size."""
    params, grads = drawn(seed, 2)
    tiny = {name: g * 1e-3 for name, g in grads.items()}
    for gradients in (grads, tiny):
        new, _ = ln.adamw(params, gradients, None, lr=lr, eps=1e-30)
        for name, p in params.items():
            moved = asnumpy(new[name] - p)
            expected = -lr * np.sign(asnumpy(gradients[name]))
            assert np.abs(moved - expected).max() <= gamma(8) * (lr + np.abs(asnumpy(p)).max())


@proves("O1")
@given(seeds, st.sampled_from([0.01, 0.5]))
def test_decay_is_decoupled(seed, decay):
    """Without a gradient p shrinks by 1 - lr * decay a step, and no mean of the gradient ever sees the decay."""
    params, grads = drawn(seed, 2)
    zero = {name: g * 0 for name, g in grads.items()}
    new, state = ln.adamw(params, zero, None, lr=0.1, weight_decay=decay)
    for name, p in params.items():
        assert same_bits(new[name], asnumpy(p) * (1 - 0.1 * decay))
        assert not asnumpy(state.m[name]).any()
        assert not asnumpy(state.v[name]).any()
    _, with_decay = ln.adamw(params, grads, None, lr=0.1, weight_decay=decay)
    _, without = ln.adamw(params, grads, None, lr=0.1)
    assert same_bits(with_decay.m, without.m)
    assert same_bits(with_decay.v, without.v)


@proves("O1")
def test_adamw_changes_nothing_in_place():
    params, grads = drawn(0, 2)
    _, state = ln.adamw(params, grads, None, lr=0.1)
    before = [{n: bits(a) for n, a in arrays.items()} for arrays in (params, grads, state.m, state.v)]
    ln.adamw(params, grads, state, lr=0.1, weight_decay=0.1)
    assert before == [{n: bits(a) for n, a in arrays.items()} for arrays in (params, grads, state.m, state.v)]


@proves("O1")
def test_each_parameter_may_have_a_rate_of_its_own():
    params, grads = drawn(0, 2)
    rates = {"a.A": 0.1, "a.B": 0.0}
    new, _ = ln.adamw(params, grads, None, lr=rates, weight_decay=0.5)
    assert same_bits(new["a.A"], ln.adamw(params, grads, None, lr=0.1, weight_decay=0.5)[0]["a.A"])
    assert same_bits(new["a.B"], params["a.B"])


@proves("O1")
def test_learning_rates_of_lora_plus():
    names = [
        "layers.0.attn.q.A",
        "layers.0.attn.q.B",
        "head.weight",
        "pooler.bias",
        "layers.0.attn.q.bias",
        "head.A",
        "head.B",
    ]
    rates = learning_rates(dict.fromkeys(names), 0.1, b_ratio=16)
    assert rates == {name: 0.1 * ratio for name, ratio in zip(names, (1, 16, 1, 1, 1, 1, 16), strict=True)}
    assert set(learning_rates(dict.fromkeys(names), 0.1).values()) == {0.1}


@pytest.mark.parametrize(
    "fields",
    [{"betas": (1.0, 0.9)}, {"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}, {"eps": 0.0}, {"weight_decay": -0.1}],
)
def test_a_wrong_setting_is_refused(fields):
    params, grads = drawn(0, 2)
    with pytest.raises(ValueError, match="adamw: expected 0 <= betas < 1"):
        ln.adamw(params, grads, None, lr=0.1, **fields)


def test_gradients_that_do_not_fit_are_refused():
    params, grads = drawn(0, 2)
    with pytest.raises(ValueError, match=r"adamw: params and grads differ in a\.B"):
        ln.adamw(params, {"a.A": grads["a.A"]}, None, lr=0.1)
    with pytest.raises(ValueError, match=r"a.B: expected a gradient of shape \(4,\), got \(3,\)"):
        ln.adamw(params, {**grads, "a.B": grads["a.B"][:3]}, None, lr=0.1)


# --- O2: warm-up and cosine ------------------------------------------------------------------------------------------


@proves("O2")
@given(st.integers(0, 50), st.integers(2, 200))
def test_warm_up_is_a_line_and_the_rest_half_a_cosine(warmup, more):
    total = warmup + more
    factors = [warmup_cosine(step, warmup=warmup, total=total) for step in range(total + 1)]
    assert factors[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    assert factors[warmup] == 1
    assert factors[total] == 0
    assert warmup_cosine(total + 5, warmup=warmup, total=total) == 0
    assert sorted(factors[warmup:], reverse=True) == factors[warmup:]
    for k in range(more + 1):  # a cosine is symmetric about its middle, where it is 1/2
        assert abs(factors[warmup + k] + factors[total - k] - 1) <= 1e-15
    third = [warmup_cosine(step, warmup=0, total=6) for step in (2, 4)]
    assert third == pytest.approx([0.75, 0.25], abs=1e-15)


@pytest.mark.parametrize(("warmup", "total"), [(-1, 5), (6, 5)])
def test_a_wrong_schedule_is_refused(warmup, total):
    with pytest.raises(ValueError, match="expected 0 <= warmup <= total"):
        warmup_cosine(0, warmup=warmup, total=total)


# --- O3: clipping ----------------------------------------------------------------------------------------------------


def joint_norm(grads):
    return math.sqrt(math.fsum(float(v) ** 2 for g in grads.values() for v in asnumpy(g).ravel()))


@proves("O3")
@given(seeds, st.sampled_from([1e-3, 0.5, 3.0, 100.0]), dtypes)
def test_clipping_bounds_the_joint_norm(seed, max_norm, dtype):
    """All gradients shrink together by max_norm / norm, or stay as they are, to the bit."""
    (grads,) = drawn(seed, 1, dtype)
    clipped, norm = clip(grads, max_norm)
    expected = joint_norm(grads)
    assert abs(float(norm) - expected) <= gamma(12) * expected
    assert {name: g.dtype for name, g in clipped.items()} == {name: g.dtype for name, g in grads.items()}
    if expected <= max_norm:
        assert same_bits(clipped, grads)
    else:
        assert joint_norm(clipped) <= max_norm * (1 + gamma(8, dtype))
        for name, g in grads.items():
            assert deviation(clipped[name], asnumpy(g).astype("float64") * (max_norm / expected)) <= gamma(8, dtype)


@proves("O3")
def test_clipping_of_zero_and_of_large_float32():
    """The norm is summed in float64: squares of 1e30 do not overflow."""
    zero, norm = clip({"a": device([0.0, 0.0])}, 1.0)
    assert float(norm) == 0
    assert not asnumpy(zero["a"]).any()
    clipped, norm = clip({"a": device([3e30, 4e30], "float32")}, 1.0)
    assert float(norm) == pytest.approx(5e30, rel=1e-6)
    np.testing.assert_allclose(asnumpy(clipped["a"]), [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_a_wrong_norm_is_refused(max_norm):
    with pytest.raises(ValueError, match="expected max_norm above 0"):
        clip({"a": device([1.0])}, max_norm)
