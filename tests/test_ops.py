"""The primitives: each against its formula on the host, in exact arithmetic where the numbers allow it."""

import itertools
import math
import tracemalloc
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import bits, deviation, device, dtypes, gamma, same_bits, seeds, whole_numbers

from lora_np import ops
from lora_np.backend import asnumpy, xp
from lora_np.distance import PositionBias
from lora_np.lora import lora_embedding, lora_embedding_backward, lora_linear, lora_linear_backward
from lora_np.storage import narrowed

proves = pytest.mark.proves
small = st.integers(1, 5)
few_rows = st.sampled_from([0, 4, 32])  # up to how many rows a product has its factors the other way round


@pytest.fixture
def tiny_blocks(monkeypatch):
    """Blocks of a few rows, so that what is computed a block at a time needs many of them."""
    monkeypatch.setattr("lora_np.backend.CACHE_ELEMENTS", 16)


def ones(*shape):
    return device(np.ones(shape))


# --- T2: linear ----------------------------------------------------------------------------------------------------


@proves("T2")
@given(seeds, small, small, small, small, dtypes, st.booleans(), few_rows)
def test_linear_is_the_sum_of_products(seed, N, T, n_in, n_out, dtype, bias, few):
    rng = np.random.default_rng(seed)
    x, W = whole_numbers(rng, N, T, n_in, dtype=dtype), whole_numbers(rng, n_out, n_in, dtype=dtype)
    b = whole_numbers(rng, n_out, dtype=dtype) if bias else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_np.ops.FEW_ROWS", few)
        y = ops.linear(x, W, b)
    expected = np.einsum("nti,oi->nto", asnumpy(x), asnumpy(W)) + (asnumpy(b) if bias else 0)
    assert y.dtype == dtype
    np.testing.assert_array_equal(asnumpy(y), expected)


@proves("T2", "L7")
@given(seeds, small, small, small, small, st.booleans())
def test_linear_with_a_matrix_for_each_row(seed, N, T, n_in, n_out, bias):
    rng = np.random.default_rng(seed)
    x, W = whole_numbers(rng, N, T, n_in), whole_numbers(rng, N, n_out, n_in)
    b = whole_numbers(rng, N, 1, n_out) if bias else None
    y = ops.linear(x, W, b)
    for n in range(N):
        assert same_bits(y[n], ops.linear(x[n], W[n], None if b is None else b[n, 0]))


@proves("T2")
@given(seeds, small, small, small, small)
def test_linear_backward_is_the_transpose(seed, N, T, n_in, n_out):
    rng = np.random.default_rng(seed)
    x, W, dy = whole_numbers(rng, N, T, n_in), whole_numbers(rng, n_out, n_in), whole_numbers(rng, N, T, n_out)
    hx, hW, hdy = asnumpy(x), asnumpy(W), asnumpy(dy)
    np.testing.assert_array_equal(asnumpy(ops.linear_backward(dy, W)), np.einsum("nto,oi->nti", hdy, hW))
    np.testing.assert_array_equal(asnumpy(ops.linear_weight_backward(dy, x)), np.einsum("nto,nti->oi", hdy, hx))
    np.testing.assert_array_equal(asnumpy(ops.bias_backward(dy)), hdy.sum(axis=(0, 1)))


@proves("T2")
@given(seeds, small, st.integers(1, 40), small, dtypes)
def test_linear_errs_within_its_rounding_bound(seed, T, n_in, n_out, dtype):
    rng = np.random.default_rng(seed)
    x, W, b = (rng.standard_normal(shape).astype(dtype) for shape in ((T, n_in), (n_out, n_in), (n_out,)))
    got = asnumpy(ops.linear(device(x), device(W), device(b)))
    for t, o in itertools.product(range(T), range(n_out)):
        terms = [Fraction(float(p)) * Fraction(float(q)) for p, q in zip(x[t], W[o], strict=True)]
        terms.append(Fraction(float(b[o])))
        size = float(sum(map(abs, terms)))
        assert abs(float(Fraction(float(got[t, o])) - sum(terms))) <= gamma(n_in + 1, dtype) * size


@proves("T2", "T1")
@given(seeds, small, small, small, few_rows)
def test_a_matrix_held_in_bfloat16_is_the_same_matrix(seed, M, n_in, n_out, few):
    """Small whole numbers are numbers of bfloat16, and sums of their products exact."""
    rng = np.random.default_rng(seed)
    x, W, dy = (whole_numbers(rng, *shape, dtype="float32") for shape in [(M, n_in), (n_out, n_in), (M, n_out)])
    narrow = narrowed(W)
    tokens = device(rng.integers(0, n_out, M))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_np.backend.CACHE_ELEMENTS", 4)
        patch.setattr("lora_np.ops.FEW_ROWS", few)
        assert same_bits(ops.linear(x, narrow), ops.linear(x, W))
        assert same_bits(ops.linear_backward(dy, narrow), ops.linear_backward(dy, W))
        assert same_bits(ops.embedding(tokens, narrow), ops.embedding(tokens, W))


# --- T1, T14: rows picked ------------------------------------------------------------------------------------------


@proves("T1")
@given(seeds, small, small, small, dtypes)
def test_embedding_looks_rows_up(seed, N, T, D, dtype):
    rng = np.random.default_rng(seed)
    E, tokens = rng.standard_normal((7, D)).astype(dtype), rng.integers(0, 7, (N, T))
    assert same_bits(ops.embedding(device(tokens), device(E)), E[tokens])


@proves("T1", "L7")
@given(seeds, small, small, small)
def test_embedding_with_a_table_for_each_row(seed, N, T, D):
    rng = np.random.default_rng(seed)
    E, tokens = rng.standard_normal((N, 7, D)), rng.integers(0, 7, (N, T))
    expected = np.stack([E[n][tokens[n]] for n in range(N)])
    assert same_bits(ops.embedding(device(tokens), device(E)), expected)


@proves("T1")
@given(seeds, small, st.integers(1, 12), small, dtypes)
def test_embedding_backward_sums_where_a_token_stands(seed, N, T, D, dtype):
    """Few tokens, so that some stand in many places and some in none."""
    rng = np.random.default_rng(seed)
    tokens, dy = rng.integers(0, 4, (N, T)), whole_numbers(rng, N, T, D, dtype=dtype)
    dE = ops.embedding_backward(dy, device(tokens), 6)
    onehot = tokens[..., None] == np.arange(6)
    assert dE.dtype == dtype
    np.testing.assert_array_equal(asnumpy(dE), np.einsum("ntv,ntd->vd", onehot, asnumpy(dy)))


@proves("T14", "T15")
@given(seeds, small, small, small, st.data())
def test_pick_takes_rows_and_its_backward_puts_them_back(seed, N, T, D, data):
    rng = np.random.default_rng(seed)
    index = rng.permutation(N * T)[: data.draw(st.integers(0, N * T))]
    x, dy = rng.standard_normal((N, T, D)), rng.standard_normal((len(index), D))
    picked = ops.pick(device(x), device(index))
    dx = np.zeros((N * T, D))
    dx[index] = dy
    assert same_bits(picked, x.reshape(-1, D)[index])
    assert same_bits(ops.pick_backward(device(dy), device(index), (N, T, D)), dx.reshape(N, T, D))


# --- T3, T4: norms -------------------------------------------------------------------------------------------------


def norm_cases(f):
    return given(seeds, small, small, st.integers(1, 9), st.sampled_from([1e-12, 1e-5, 1.0]), dtypes)(f)


def drawn_norm(seed, N, T, D, dtype):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((N, T, D), (D,), (D,))]


@proves("T3")
@norm_cases
def test_layer_norm_has_mean_zero_and_variance_one(seed, N, T, D, eps, dtype):
    """xhat (saved first): its mean is 0, and its variance is var / (var + eps).

    A mean of D numbers errs by g(D) of the largest, the square root and quotient by three roundings more.
    """
    x, w, b = drawn_norm(seed, N, T, D, dtype)
    y, (xhat, rstd, _) = ops.layer_norm(device(x), device(w), device(b), eps)
    exact = x.astype("float64")
    var = exact.var(axis=-1, keepdims=True)
    slack = 4 * gamma(D + 6, dtype) * np.abs(exact).max() / np.sqrt(var + eps)
    assert np.all(np.abs(asnumpy(xhat).mean(axis=-1, keepdims=True, dtype="float64")) <= slack)
    got = (asnumpy(xhat).astype("float64") ** 2).mean(axis=-1, keepdims=True)
    assert np.all(np.abs(got - var / (var + eps)) <= 2 * slack * (1 + slack))
    assert np.all(np.abs(asnumpy(rstd) * np.sqrt(var + eps) - 1) <= 2 * slack * (1 + slack))
    assert same_bits(y, asnumpy(xhat) * w + b)
    assert y.dtype == dtype


@proves("T3")
@norm_cases
def test_layer_norm_forgets_shift_and_scale(seed, N, T, D, eps, dtype):
    """LN(a x + c; a^2 eps) = LN(x; eps), to the bit for whole x and c, a power of two as D and as a."""
    rng = np.random.default_rng(seed)
    D, a, c = 2 ** (D % 4), 2.0 ** (T - 3), float(N)
    x, w, b = (whole_numbers(rng, *shape, dtype=dtype) for shape in ((N, T, D), (D,), (D,)))
    y, _ = ops.layer_norm(x, w, b, eps)
    moved, _ = ops.layer_norm((x + c) * a, w, b, eps * a**2)
    assert same_bits(moved, y)


@proves("T4")
@norm_cases
def test_rms_norm_has_mean_square_one(seed, N, T, D, eps, dtype):
    x, w, _ = drawn_norm(seed, N, T, D, dtype)
    y, (xhat, _, _) = ops.rms_norm(device(x), device(w), eps)
    square = (x.astype("float64") ** 2).mean(axis=-1, keepdims=True)
    expected = x / np.sqrt(square + eps)
    assert np.all(np.abs(asnumpy(xhat) - expected) <= gamma(D + 6, dtype) * np.abs(expected))
    assert same_bits(y, asnumpy(xhat) * w)
    assert y.dtype == dtype


@proves("T4")
@norm_cases
def test_rms_norm_forgets_scale_but_not_shift(seed, N, T, D, eps, dtype):
    x, w, _ = map(device, drawn_norm(seed, N, T, D, dtype))
    a = 2.0 ** (T - 3)
    y, _ = ops.rms_norm(x, w, eps)
    assert same_bits(ops.rms_norm(x * -a, w, eps * a**2)[0], -y)
    constant, _ = ops.rms_norm(ones(1, D) * 3.0, w * 0 + 1, eps)
    assert deviation(constant, np.full((1, D), 3 / math.sqrt(9 + eps))) <= gamma(D + 6, dtype)


@proves("T3", "T4")
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("size", [0.0, 1e4])
def test_norms_of_constant_rows(norm, size):
    """A row of equal numbers has no variance; eps keeps its norm finite."""
    x, w, b = size * ones(2, 3, 4), ones(4), ones(4)
    y, saved = ops.layer_norm(x, w, b, 1e-5) if norm == "layer" else ops.rms_norm(x, w, 1e-5)
    backward = ops.layer_norm_backward if norm == "layer" else ops.rms_norm_backward
    expected = 1.0 if norm == "layer" else size / math.sqrt(size**2 + 1e-5)
    np.testing.assert_allclose(asnumpy(y), expected, rtol=1e-15)
    assert np.isfinite(asnumpy(backward(ones(2, 3, 4), saved))).all()


@proves("T3")
@norm_cases
def test_layer_norm_gradient_is_orthogonal_to_what_it_forgets(seed, N, T, D, eps, dtype):
    """A shift changes nothing: dx sums to 0. A scale changes nothing but for eps: dx . xhat = eps rstd^3 (g . xhat)."""
    x, w, b = drawn_norm(seed, N, T, D, "float64")
    dy = drawn_norm(seed + 1, N, T, D, "float64")[0]
    _, saved = ops.layer_norm(device(x), device(w), device(b), eps)
    dx, xhat, rstd = (asnumpy(a) for a in (ops.layer_norm_backward(device(dy), saved), *saved[:2]))
    size = rstd * np.abs(dy * w).max()
    assert np.all(np.abs(dx.sum(axis=-1, keepdims=True)) <= 1e-12 * D * size * (1 + np.abs(xhat).max()) ** 2)
    radial = eps * rstd**3 * (dy * w * xhat).sum(axis=-1, keepdims=True)
    error = np.abs((dx * xhat).sum(axis=-1, keepdims=True) - radial)
    # One row of one number has xhat = 0 but for rounding; elsewhere eps is small beside the variance, or not.
    assert np.all(error <= 1e-11 * D * size * (1 + np.abs(xhat).max()) ** 3)


@proves("T3", "T4")
@pytest.mark.parametrize("norm", ["layer", "rms"])
@given(seeds, small, st.integers(1, 9), st.sampled_from([1e-5, 1.0]))
def test_norm_backward_is_the_derivative(norm, seed, N, D, eps):
    """Of the sum of dy * y by each element of x, by complex steps of the forward; and by w and b, to rounding."""
    x, w, b = drawn_norm(seed, N, 2, D, "float64")
    dy = drawn_norm(seed + 1, N, 2, D, "float64")[0]

    def y(x):
        return ops.layer_norm(x, device(w), device(b), eps) if norm == "layer" else ops.rms_norm(x, device(w), eps)

    saved = y(device(x))[1]
    dx = asnumpy((ops.layer_norm_backward if norm == "layer" else ops.rms_norm_backward)(device(dy), saved))
    rstd = asnumpy(saved[1])
    for d in range(D):
        step = np.zeros(D)
        step[d] = 1e-30
        expected = (dy * asnumpy(y(device(x + 1j * step))[0]).imag).sum(axis=-1) / 1e-30
        size = (rstd * np.abs(dy * w).sum(axis=-1, keepdims=True) * (1 + np.abs(asnumpy(saved[0])).max()) ** 2)[..., 0]
        assert np.all(np.abs(dx[..., d] - expected) <= 1e-13 * (D + 6) * size)
    dw = asnumpy(ops.norm_weight_backward(device(dy), saved))
    terms = dy * asnumpy(saved[0])
    assert np.all(np.abs(dw - terms.sum(axis=(0, 1))) <= gamma(2 * N + 2) * np.abs(terms).sum(axis=(0, 1)))


# --- T5, T6, T7, T14: activations ----------------------------------------------------------------------------------

POINTS = np.concatenate([np.linspace(-40, 40, 1601), np.linspace(-3, 3, 1201), [0.0, 1e-300, -1e-300]])


def standard_normal_cdf(v):
    return math.erfc(-v / math.sqrt(2)) / 2


def tanh_slope(v):
    return 1 / math.cosh(v) ** 2


def gelu_tanh_parts(v):
    """y and dy/dx of T6, by 1 + tanh u = 2 / (1 + exp(-2u)), and 1 - tanh^2 u = 1 / cosh^2 u."""
    c = math.sqrt(2 / math.pi)
    u = c * (v + 0.044715 * v**3)
    half = 1 / (1 + math.exp(-2 * u)) if u > -300 else 0.0
    slope = 0.5 / math.cosh(u) ** 2 * c * (1 + 3 * 0.044715 * v**2) if abs(u) < 300 else 0.0
    return v * half, half + v * slope


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def phi(v):
    return math.exp(-v * v / 2) / math.sqrt(2 * math.pi)


ACTIVATIONS = {
    "gelu": (ops.gelu, lambda v: (v * standard_normal_cdf(v), standard_normal_cdf(v) + v * phi(v))),
    "gelu_tanh": (ops.gelu_tanh, gelu_tanh_parts),
    "silu": (ops.silu, lambda v: (v * sigmoid(v), sigmoid(v) * (1 + v * (1 - sigmoid(v))))),
    "relu": (ops.relu, lambda v: (max(v, 0.0), float(v > 0))),
    "tanh": (ops.tanh, lambda v: (math.tanh(v), tanh_slope(v))),
}


@proves("T5", "T6", "T7", "T14")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_its_derivative(name, dtype):
    """Against math's own functions: a few roundings of a number of the size of x."""
    op, reference = ACTIVATIONS[name]
    x = POINTS.astype(dtype)
    y, dydx = map(asnumpy, op(device(x)))
    expected = np.array([reference(float(v)) for v in x])
    slack = 16 * np.finfo(dtype).eps * np.maximum(1, np.abs(x.astype("float64")))
    assert y.dtype == dydx.dtype == dtype
    assert np.all(np.abs(y - expected[:, 0]) <= slack)
    # x P (1 - P) loses up to x^2 eps where P is near 1 and x^2 is in its derivative's inner factor.
    assert np.all(np.abs(dydx - expected[:, 1]) <= slack * np.maximum(1, np.abs(x)))


@proves("T5", "T6", "T7", "T14")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_far_out(name, dtype):
    """At 1e4 nothing overflows, and the limits are exact: x or 0, 1 or -1."""
    y, dydx = map(asnumpy, ACTIVATIONS[name][0](device([-1e4, 0.0, 1e4], dtype)))
    at_zero = {"tanh": 1, "relu": 0}.get(name, 0.5)  # of relu, as its statement says
    limits = ([-1, 0, 1], [0, at_zero, 0]) if name == "tanh" else ([0, 0, 1e4], [0, at_zero, 1])
    np.testing.assert_array_equal(y, np.array(limits[0], dtype))
    np.testing.assert_array_equal(dydx, np.array(limits[1], dtype))


@proves("T5", "T6", "T7", "T14")
@pytest.mark.parametrize("name", ACTIVATIONS)
@given(seeds, small, small)
def test_activation_backward_is_the_derivative_of_the_forward(name, seed, N, T):
    """Of the sum of dy * y, by a complex step of the forward at every element at once: it acts element by element."""
    x, dy = 3 * np.random.default_rng(seed).standard_normal((2, N, T, 3))
    op, h = ACTIVATIONS[name][0], 1e-30
    expected = dy * asnumpy(op(device(x + 1j * h))[0]).imag / h
    dx = ops.activation_backward(device(dy), op(device(x))[1])
    slack = 32 * np.finfo(float).eps * np.abs(dy) * np.maximum(1, np.abs(x))
    assert dx.dtype == "float64"
    assert np.all(np.abs(asnumpy(dx) - expected) <= slack)


def erf_points(dtype):
    """Where erf bends, every binade down to the subnormals, and both ends."""
    info = np.finfo(dtype)
    binades = np.exp2(np.arange(math.log2(float(info.smallest_subnormal)), math.log2(float(info.max)), dtype="float64"))
    dense = np.concatenate([np.linspace(0, 7, 20001), np.random.default_rng(0).uniform(0, 7, 20000)])
    x = np.concatenate([dense, binades, 1.37 * binades[:-1]])
    return np.concatenate([x, -x]).astype(dtype)


@proves("T5")
def test_erf_in_float64():
    x = erf_points("float64")
    expected = np.array([math.erf(v) for v in x])
    got = asnumpy(ops.erf(device(x)))
    assert got.dtype == "float64"
    assert np.abs(got - expected).max() <= 1e-15


@proves("T5")
def test_erf_in_float32():
    x = erf_points("float32")
    expected = np.array([math.erf(v) for v in x.astype("float64")])
    ulp = np.spacing(np.abs(expected).astype("float32")).astype("float64")
    got = asnumpy(ops.erf(device(x)))
    assert got.dtype == "float32"
    assert (np.abs(got.astype("float64") - expected) / ulp).max() <= 2


@proves("T5")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_erf_at_its_ends(dtype):
    got = asnumpy(ops.erf(device([math.nan, math.inf, -math.inf, 0.0, -0.0], dtype)))
    np.testing.assert_array_equal(got, np.array([math.nan, 1, -1, 0, 0], dtype))
    assert list(np.signbit(got[1:])) == [False, True, False, True]


@proves("T5")
def test_erf_is_odd():
    x = erf_points("float64")
    assert same_bits(ops.erf(device(-x)), -asnumpy(ops.erf(device(x))))


@proves("T5")
@given(st.floats(-6, 6), st.floats(-1e-20, 1e-20))
def test_erf_of_a_complex_number(a, b):
    """erf(a + i b) = erf(a) + i b erf'(a), to first order in b, with erf'(a) = 2 / sqrt(pi) exp(-a^2)."""
    z = device([complex(a, b)])
    got = asnumpy(ops.erf(z))[0]
    slope = 2 / math.sqrt(math.pi) * math.exp(-a * a)
    assert abs(got.real - math.erf(a)) <= 1e-15
    assert abs(got.imag - b * slope) <= 100 * 2.0**-53 * abs(b) * slope + 1e-320


# --- T8: softmax ---------------------------------------------------------------------------------------------------


def exact_softmax(row):
    """exp(x) / sum exp(x) of a row of finite or -inf numbers, not all -inf, by math's own sums."""
    top = max(row)
    powers = [math.exp(v - top) for v in row]
    return [p / math.fsum(powers) for p in powers]


@proves("T8")
@given(seeds, small, st.integers(1, 8), dtypes, st.sampled_from([1.0, 30.0, 1e4]))
def test_softmax_is_exp_over_its_sum(seed, T, S, dtype, size):
    """x - max errs by u times the larger of the two, exp by that and a rounding or two, the sum by g(S)."""
    x = (size * np.random.default_rng(seed).standard_normal((T, S))).astype(dtype)
    p, saved = ops.softmax(device(x))
    expected = np.array([exact_softmax(map_row) for map_row in x.astype("float64").tolist()])
    spread = x.max(axis=-1, keepdims=True).astype("float64") - x
    error = np.abs(asnumpy(p) - expected)
    slack = 4 * gamma(S + 4, dtype) + 2 * gamma(1, dtype) * spread + 4 * gamma(1) * spread
    assert np.all(error <= slack * expected + (S + 2) * float(np.finfo(dtype).tiny))
    assert p.dtype == dtype
    assert saved is p


@proves("T8")
@given(seeds, small, small, st.integers(-50, 50))
def test_softmax_forgets_a_shift(seed, T, S, c):
    x = whole_numbers(np.random.default_rng(seed), T, S)
    assert same_bits(ops.softmax(x + float(c))[0], ops.softmax(x)[0])


@proves("T8")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_softmax_of_extremes(dtype):
    """Logits of 1e4, -inf among others, and a row of -inf alone, which gives zeros and a zero gradient."""
    inf = math.inf
    x = device([[1e4, 1e4, -1e4], [-inf, 0.0, -inf], [-inf, -inf, -inf], [-1e4, -1e4, -inf]], dtype)
    p, saved = ops.softmax(x)
    expected = np.array([[0.5, 0.5, 0], [0, 1, 0], [0, 0, 0], [0.5, 0.5, 0]], dtype)
    np.testing.assert_array_equal(asnumpy(p), expected)
    dx = asnumpy(ops.softmax_backward(device(np.full((4, 3), 7.0), dtype), saved))
    np.testing.assert_array_equal(dx, np.zeros((4, 3)))


@proves("T8")
@given(seeds, small, st.integers(1, 6))
def test_softmax_backward_is_its_jacobian(seed, T, S):
    """dx = J dp, J = diag(p) - p p^T. A row of it errs by a few roundings of p (|dp| + p . |dp|)."""
    rng = np.random.default_rng(seed)
    p = asnumpy(ops.softmax(device(rng.standard_normal((T, S))))[0])
    dp = rng.standard_normal((T, S))
    dx = asnumpy(ops.softmax_backward(device(dp), device(p)))
    for t in range(T):
        jacobian = np.diag(p[t]) - np.outer(p[t], p[t])
        size = p[t] * (np.abs(dp[t]) + p[t] @ np.abs(dp[t]))
        assert np.all(np.abs(dx[t] - jacobian @ dp[t]) <= 2 * gamma(S + 4) * size)


# --- T9, T10: attention --------------------------------------------------------------------------------------------


@st.composite
def attentions(draw, causal=None, masked=None):
    """q (N,H,T,K), k, v (N,G,S,K), causal, mask (N,S) or None: T <= S, some queries may see no key."""
    N, T, K = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    S = T + draw(st.sampled_from([0, 0, 2]))
    G, R = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3]))
    rng = np.random.default_rng(draw(seeds))
    mask = rng.random((N, S)) < 0.6 if (draw(st.booleans()) if masked is None else masked) else None
    q, k, v = (2 * rng.standard_normal(shape) for shape in ((N, G * R, T, K), (N, G, S, K), (N, G, S, K)))
    return q, k, v, draw(st.booleans()) if causal is None else causal, mask


def visible(n, t, T, S, causal, mask, window=None):
    """The keys that query t of text n sees: with a window, that many of those up to its own place."""
    own = S - T + t
    first = 0 if window is None else own - window + 1
    return [s for s in range(first, S) if s >= 0 and (mask is None or mask[n, s]) and (not causal or s <= own)]


def attention_by_hand(q, k, v, causal, mask, window=None, scale=None, bias=None):
    """T9, T10, one query at a time, and a rounding bound of each output. bias: what is added, parts (N,H,T,S) of it.

    A score errs by g(K + 4) (|q| . |k| / sqrt(K) and the sizes of what is added), e; a probability by a factor
    exp(2 e) and S + 4 roundings; the output, a mean of values, by that and S + 1 more.
    """
    N, H, T, K = q.shape
    S = k.shape[2]
    scale, bias = 1 / math.sqrt(K) if scale is None else scale, np.zeros((1, N, H, T, S)) if bias is None else bias
    y, bound = np.zeros_like(q), np.zeros_like(q)
    for n, h, t in itertools.product(range(N), range(H), range(T)):
        g = h // (H // k.shape[1])
        seen = visible(n, t, T, S, causal, mask, window)
        if not seen:
            continue
        added = bias[:, n, h, t]
        scores = [math.fsum([*(scale * q[n, h, t] * k[n, g, s]), *added[:, s]]) for s in seen]
        y[n, h, t] = np.array(exact_softmax(scores)) @ v[n, g, seen]
        sizes = [scale * float(np.abs(q[n, h, t]) @ np.abs(k[n, g, s])) + np.abs(added[:, s]).sum() for s in seen]
        e = gamma(K + 4) * max(sizes)
        spread = max(scores) - min(scores)
        bound[n, h, t] = (4 * e + 2 * gamma(2 * S + 8) + 4 * gamma(1) * spread) * np.abs(v[n, g, seen]).max()
    return y, bound


@contextmanager
def tiles(rows=2, cache=16):
    """Attention in tiles of so many queries, and about so many scores: of five queries three, the last smaller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_np.ops.QUERY_ROWS", rows)
        patch.setattr("lora_np.backend.CACHE_ELEMENTS", cache)
        yield


def run_attention(q, k, v, causal, mask, **options):
    mask = None if mask is None else device(mask)
    return ops.attention(*map(device, (q, k, v)), causal=causal, mask=mask, **options)


@proves("T9", "T10")
@given(attentions())
@tiles()
def test_attention_is_a_mean_of_values(case):
    expected, bound = attention_by_hand(*case)
    y = asnumpy(run_attention(*case)[0])
    assert np.all(np.abs(y - expected) <= bound)


@proves("T9", "T10")
@given(attentions(masked=True))
@tiles()
def test_a_query_that_sees_no_key_gives_zeros_and_a_zero_gradient(case):
    q, k, v, causal, mask = case
    mask[0] = False  # the first text's queries see nothing
    y, saved = run_attention(q, k, v, causal, mask)
    gradients = [asnumpy(d) for d in ops.attention_backward(device(np.ones(q.shape)), saved)[:3]]
    assert not asnumpy(y)[0].any()
    assert not any(d[0].any() for d in gradients)
    (N, _, T, _), S = q.shape, k.shape[2]
    for n, t in itertools.product(range(N), range(T)):
        if not visible(n, t, T, S, causal, mask):
            assert not asnumpy(y)[n, :, t].any()
            assert not gradients[0][n, :, t].any()


@proves("T9", "T10")
@given(attentions(), seeds)
@tiles()
def test_attention_backward_is_the_derivative_along_any_direction(case, seed):
    """By complex step: sum(dy * attention(q + i h q', ...)).imag / h = dq . q' + dk . k' + dv . v'."""
    *inputs, causal, mask = case
    rng = np.random.default_rng(seed)
    dy, along = rng.standard_normal(inputs[0].shape), [rng.standard_normal(a.shape) for a in inputs]
    moved = asnumpy(run_attention(*(a + 1e-30j * d for a, d in zip(inputs, along, strict=True)), causal, mask)[0])
    gradients = ops.attention_backward(device(dy), run_attention(*case)[1])[:3]
    terms = np.concatenate([(asnumpy(g) * d).ravel() for g, d in zip(gradients, along, strict=True)])
    assert abs((dy * moved.imag).sum() / 1e-30 - terms.sum()) <= 1e-12 * np.abs(terms).sum()


@proves("T9")
@given(attentions())
@tiles()
def test_a_key_that_nobody_sees_has_no_gradient(case):
    q, k, _, causal, mask = case
    _, saved = run_attention(*case)
    _, dk, dv = (asnumpy(d) for d in ops.attention_backward(device(np.ones(q.shape)), saved)[:3])
    (N, _, T, _), S = q.shape, k.shape[2]
    for n in range(N):
        seen = {s for t in range(T) for s in visible(n, t, T, S, causal, mask)}
        for s in set(range(S)) - seen:
            assert not dk[n, :, s].any()
            assert not dv[n, :, s].any()


@proves("T9")
@given(attentions(causal=True))
@tiles()
def test_causal_attention_never_looks_ahead(case):
    """Other keys and values after a query's own place change nothing, to the bit."""
    q, k, v, causal, mask = case
    y = asnumpy(run_attention(*case)[0])
    T, S = q.shape[2], k.shape[2]
    for t in range(T):
        k2, v2 = k.copy(), v.copy()
        k2[:, :, S - T + t + 1 :] = 9.0
        v2[:, :, S - T + t + 1 :] = -9.0
        assert same_bits(asnumpy(run_attention(q, k2, v2, causal, mask)[0])[:, :, : t + 1], y[:, :, : t + 1])


@st.composite
def seen_by_place(draw):
    """Attention that asks where keys stand, causal with a window or not: what `attentions` gives; and by name a window,
    a scale, and a PositionBias, T18's or T19's, or None."""
    causal = draw(st.booleans())
    q, k, v, _, mask = draw(attentions(causal=causal))
    (N, H, T, _), S, B = q.shape, k.shape[2], draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(seeds))
    bucket, kind = rng.integers(0, B, S + T - 1), draw(st.sampled_from(["none", "T18", "T19"]))
    bias = {
        "none": None,
        "T18": PositionBias(device(bucket), device(rng.standard_normal((N, H, T, B)))),
        "T19": PositionBias(device(bucket), *(device(rng.standard_normal((N, H, n, B))) for n in (T, S))),
    }[kind]
    options = {"scale": draw(st.sampled_from([None, 1.0, 0.3])), "bias": bias}
    return (q, k, v, causal, mask), options | {"window": draw(st.sampled_from([None, 1, 2, 3])) if causal else None}


def bias_by_hand(bias, T, S):
    """What each score gains, in its two parts: by its query, and by its key. -> (2,N,H,T,S), or None."""
    if bias is None:
        return None
    bucket, t, s = asnumpy(bias.bucket), np.arange(T)[:, None], np.arange(S)
    places = bucket[s - t + T - 1]
    by_query = asnumpy(bias.c2p)[:, :, t, places]
    by_key = 0 * by_query if bias.p2c is None else asnumpy(bias.p2c)[:, :, s, places]
    return np.stack([by_query, by_key])


@proves("T9", "T10", "T18", "T19")
@given(seen_by_place())
@tiles()
def test_attention_by_place_is_a_mean_of_values(case):
    """With a window, another scale, and what scores gain by distance."""
    (q, k, v, causal, mask), options = case
    bias = bias_by_hand(options["bias"], q.shape[2], k.shape[2])
    expected, bound = attention_by_hand(q, k, v, causal, mask, **{**options, "bias": bias})
    y = asnumpy(run_attention(q, k, v, causal, mask, **options)[0])
    assert np.all(np.abs(y - expected) <= bound)


@proves("T9", "T10", "T18", "T19")
@given(seen_by_place(), seeds)
@tiles()
def test_attention_by_place_backward_is_the_derivative_along_any_direction(case, seed):
    """Of q, k, v, and of what each query and key adds, by complex step."""
    (*inputs, causal, mask), options = case
    bias, rng = options["bias"], np.random.default_rng(seed)
    added = [] if bias is None else [asnumpy(a) for a in bias[1:3] if a is not None]
    dy, along = rng.standard_normal(inputs[0].shape), [rng.standard_normal(a.shape) for a in (*inputs, *added)]
    moved = [a + 1e-30j * d for a, d in zip((*inputs, *added), along, strict=True)]
    moved_bias = None if bias is None else PositionBias(bias.bucket, *map(device, moved[3:]))
    y = asnumpy(run_attention(*moved[:3], causal, mask, **{**options, "bias": moved_bias})[0])
    *gradients, dbias = ops.attention_backward(device(dy), run_attention(*inputs, causal, mask, **options)[1])
    gradients += [] if bias is None else [a for a in dbias[1:3] if a is not None]
    terms = np.concatenate([(asnumpy(g) * d).ravel() for g, d in zip(gradients, along, strict=True)])
    assert abs((dy * y.imag).sum() / 1e-30 - terms.sum()) <= 1e-12 * np.abs(terms).sum()


@proves("T9")
@given(attentions(causal=True), st.integers(1, 3))
@tiles()
def test_a_window_never_looks_beyond_itself(case, window):
    """Other keys and values before it change no bit of a query's output, nor have they a gradient."""
    q, k, v, causal, mask = case
    y, saved = run_attention(q, k, v, causal, mask, window=window)
    (_, _, T, _), S = q.shape, k.shape[2]
    for t in range(T):
        own, first = S - T + t, max(0, S - T + t - window + 1)
        k2, v2 = k.copy(), v.copy()
        k2[:, :, :first], v2[:, :, :first] = 9.0, -9.0
        k2[:, :, own + 1 :], v2[:, :, own + 1 :] = 9.0, -9.0
        moved = run_attention(q, k2, v2, causal, mask, window=window)[0]
        assert same_bits(asnumpy(moved)[:, :, t], asnumpy(y)[:, :, t])
        dy = np.zeros(q.shape)
        dy[:, :, t] = 1.0
        _, dk, dv = (asnumpy(d) for d in ops.attention_backward(device(dy), saved)[:3])
        for d in (dk, dv):
            assert not d[:, :, :first].any()
            assert not d[:, :, own + 1 :].any()


@proves("T10")
@given(attentions())
@tiles()
def test_grouped_heads_share_their_keys_and_values(case):
    """As if k and v were repeated for each of the H / G heads; dk and dv sum over them."""
    q, k, v, causal, mask = case
    G = k.shape[1]
    R = q.shape[1] // G
    y, saved = run_attention(*case)
    repeated, repeated_saved = run_attention(q, k.repeat(R, axis=1), v.repeat(R, axis=1), causal, mask)
    assert deviation(y, repeated) <= 1e-14
    dy = np.random.default_rng(0).standard_normal(q.shape)
    dq, dk, dv = ops.attention_backward(device(dy), saved)[:3]
    dq2, dk2, dv2 = (asnumpy(d) for d in ops.attention_backward(device(dy), repeated_saved)[:3])
    scale = np.abs(dk2).max() + np.abs(dv2).max() + np.abs(dq2).max() + 1e-300
    for one, other in (
        (dq, dq2),
        (dk, dk2.reshape(k.shape[0], G, R, *k.shape[2:]).sum(axis=2)),
        (dv, dv2.reshape(v.shape[0], G, R, *v.shape[2:]).sum(axis=2)),
    ):
        assert np.abs(asnumpy(one) - other).max() <= 1e-13 * scale


@proves("T9")
def test_attention_to_one_token():
    """T = 1: the only key gets all the weight; a key's score does not matter, so dq = dk = 0."""
    q, k, v, dy = np.random.default_rng(0).standard_normal((4, 2, 3, 1, 4))
    y, saved = run_attention(q, k, v, True, None)
    dq, dk, dv = (asnumpy(d) for d in ops.attention_backward(device(dy), saved)[:3])
    assert same_bits(y, v)
    assert same_bits(dv, dy)
    assert not dq.any()
    assert not dk.any()


@proves("T8", "T9")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_attention_with_scores_of_1e4(dtype):
    q = device([[[[1e4]]]], dtype)
    k, v = device([[[[1.0], [0.5]]]], dtype), device([[[[3.0], [5.0]]]], dtype)
    y, saved = ops.attention(q, k, v, causal=False)
    assert asnumpy(y).item() == 3.0
    assert all(np.isfinite(asnumpy(d)).all() for d in ops.attention_backward(y, saved)[:3])


@proves("T9")
@pytest.mark.skipif(xp is not np, reason="tracemalloc sees the host's memory alone; on a GPU there is one tile")
@pytest.mark.parametrize("causal", [True, False])
def test_attention_holds_no_scores_of_a_whole_head(causal):
    """Neither meanwhile nor for its backward: less than the (T,T) of one head, of two."""
    T = 1024
    q, k, v, dy = np.random.default_rng(0).standard_normal((4, 1, 2, T, 4))
    tracemalloc.start()
    _, saved = ops.attention(q, k, v, causal=causal)
    ops.attention_backward(dy, saved)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < T * T * q.itemsize


def by_distance(kind, H, T, B=8):
    """T18's, or T19's, for one sequence of T tokens."""
    rng, bucket = np.random.default_rng(0), np.arange(2 * T - 1) % B
    if kind == "T18":
        return PositionBias(bucket, np.broadcast_to(rng.standard_normal((1, H, 1, B)), (1, H, T, B)))
    return PositionBias(bucket, *rng.standard_normal((2, 1, H, T, B)))


@proves("T9", "T18", "T19")
@pytest.mark.skipif(xp is not np, reason="tracemalloc sees the host's memory alone; on a GPU there is one tile")
@pytest.mark.parametrize("kind", ["window", "T18", "T19"])
def test_attention_by_place_holds_memory_in_proportion_to_its_length(kind):
    """Twice as many tokens, twice the peak or less: less than the (T,T) of one head, of two."""
    peaks = []
    for T in (1024, 2048):
        q, k, v, dy = np.random.default_rng(0).standard_normal((4, 1, 2, T, 4))
        bias = None if kind == "window" else by_distance(kind, 2, T)
        tracemalloc.start()
        _, saved = ops.attention(q, k, v, causal=True, window=100 if kind == "window" else None, bias=bias)
        ops.attention_backward(dy, saved)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < min(2.2 * peaks[0], 2048 * 2048 * 8)


def tiles_of(saved):
    """All tiles of attention's scores."""
    return [tile for tiles in saved.tiles() for tile in tiles]


@proves("T9")
@pytest.mark.skipif(xp is not np, reason="on a GPU there is one tile")
def test_a_window_s_scores_are_computed_about_it_alone():
    """Of each tile's queries the first sees the earliest key: no score stands further back."""
    q = np.zeros((1, 1, 1024, 1))
    _, saved = ops.attention(q, q, q, causal=True, window=100)
    for tile in tiles_of(saved):
        assert tile.s == slice(max(0, tile.t.start - 99), tile.t.stop)


# --- T11: rotary ---------------------------------------------------------------------------------------------------


@st.composite
def rotaries(draw):
    """x (N,H,T,K) and the positions (T,) of its tokens."""
    shape = (*(draw(st.integers(1, n)) for n in (2, 2, 5)), 2 * draw(st.integers(1, 4)))
    rng = np.random.default_rng(draw(seeds))
    return rng.standard_normal(shape), rng.integers(0, 2000, shape[2])


@proves("T11")
@given(rotaries(), st.sampled_from([100.0, 10000.0]))
def test_rotary_turns_pairs(case, theta):
    """(x_i + i x_{i+K/2}) exp(i angle), angle = position / theta^(2i/K); the turn itself errs by three roundings.

    An angle errs by its own size times that of a power and a product: four roundings or so of up to 2000 radians.
    """
    x, positions = case
    half = x.shape[-1] // 2
    cos, sin = ops.rotary_angles(device(positions), 2 * half, theta, "float64")
    y = asnumpy(ops.rotary(device(x), cos, sin)[0])
    angles = np.array([[float(p) / math.pow(theta, 2 * i / (2 * half)) for i in range(half)] for p in positions])
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    bound = np.abs(x).max() * (8 * gamma(1) * np.abs(angles).max() + 8 * gamma(1))
    assert np.abs(y - np.concatenate([turned.real, turned.imag], axis=-1)).max() <= 4 * bound


@proves("T11")
@given(rotaries(), st.integers(0, 3), seeds)
def test_rotary_of_the_first_p_and_with_scaled_frequencies(case, more, seed):
    """As above, of x's first p elements, the angle over a factor; the others stay, to the bit, forward and backward."""
    x, positions = case
    p, rng = x.shape[-1], np.random.default_rng(seed)
    wide = np.concatenate([x, rng.standard_normal((*x.shape[:-1], more))], axis=-1)
    half = p // 2
    for factors in ((4.0,), tuple(rng.uniform(1, 8, half))):
        cos, sin = ops.rotary_angles(device(positions), p, 10000.0, "float64", factors)
        y, saved = ops.rotary(device(wide), cos, sin)
        each = factors * half if len(factors) == 1 else factors
        angles = np.array([[float(t) / (each[i] * math.pow(1e4, i / half)) for i in range(half)] for t in positions])
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
        bound = 4 * np.abs(x).max() * (10 * gamma(1) * np.abs(angles).max() + 8 * gamma(1))
        assert np.abs(asnumpy(y)[..., :p] - np.concatenate([turned.real, turned.imag], axis=-1)).max() <= bound
        back = asnumpy(ops.rotary_backward(y, saved))
        for a in (asnumpy(y), back):
            assert same_bits(np.ascontiguousarray(a[..., p:]), np.ascontiguousarray(wide[..., p:]))
        assert np.abs(back - wide).max() <= 16 * gamma(1) * np.abs(wide).max()


@proves("T11")
@pytest.mark.parametrize("p", [8, 64, 128])
@pytest.mark.parametrize(("factor", "low", "high", "original"), [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192)])
def test_llama_3_s_factors(p, factor, low, high, original):
    """By wavelength, in exact fractions but for the power: short ones stay, long ones are `factor` times as long, and
    between the two the frequency is a mean, by how many times a wave goes into `original`."""
    theta = 500000.0
    factors = ops.llama3_factors(p, theta, factor=factor, low=low, high=high, original=original)
    assert len(factors) == p // 2
    for i, found in enumerate(factors):
        wavelength = Fraction(2 * math.pi * math.pow(theta, 2 * i / p))
        if wavelength < Fraction(original) / Fraction(high):
            expected = Fraction(1)
        elif wavelength > Fraction(original) / Fraction(low):
            expected = Fraction(factor)
        else:
            smooth = (Fraction(original) / wavelength - Fraction(low)) / (Fraction(high) - Fraction(low))
            expected = 1 / ((1 - smooth) / Fraction(factor) + smooth)
        assert abs(found - float(expected)) <= 64 * gamma(1) * float(expected)
    assert factors[0] == 1.0
    assert factors[-1] == factor


@proves("T11")
@given(rotaries(), st.integers(0, 500))
def test_rotary_scores_depend_on_the_distance_only(case, shift):
    """q . k, turned by their positions, is the same when both stand `shift` places further."""
    x, positions = case
    K = x.shape[-1]

    def scores(offset):
        angles = ops.rotary_angles(device(positions + offset), K, 10000.0, "float64")
        turned = asnumpy(ops.rotary(device(x), *angles)[0])
        return turned @ turned.swapaxes(-1, -2)

    bound = 32 * gamma(1) * (2500 + K) * K * np.abs(x).max() ** 2
    assert np.abs(scores(0) - scores(shift)).max() <= bound


@proves("T11")
@given(rotaries())
def test_rotary_keeps_lengths_and_its_backward_turns_back(case):
    x, positions = case
    angles = ops.rotary_angles(device(positions), x.shape[-1], 10000.0, "float64")
    y, saved = ops.rotary(device(x), *angles)
    back = asnumpy(ops.rotary_backward(y, saved))
    y = asnumpy(y)
    half = x.shape[-1] // 2
    for part in (y, back):
        lengths = np.hypot(part[..., :half], part[..., half:])
        np.testing.assert_allclose(lengths, np.hypot(x[..., :half], x[..., half:]), rtol=16 * gamma(1))
    assert np.abs(back - x).max() <= 16 * gamma(1) * np.abs(x).max()


@proves("T11")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rotary_at_position_zero_is_the_identity(dtype):
    x = device(np.random.default_rng(0).standard_normal((2, 2, 1, 6)), dtype)
    angles = ops.rotary_angles(device([0]), 6, 10000.0, dtype)
    assert same_bits(ops.rotary(x, *angles)[0], x)
    assert angles[0].dtype == angles[1].dtype == dtype


@proves("T11")
def test_rotary_angles_are_rounded_once():
    """In float32 too the angle is a float64: at position 4095 a float32 angle would be 1e-4 off."""
    positions = device(np.arange(4096))
    for wide, narrow in zip(*(ops.rotary_angles(positions, 64, 1e5, t) for t in ("float64", "float32")), strict=True):
        assert same_bits(narrow, asnumpy(wide).astype("float32"))


# --- T12: dropout --------------------------------------------------------------------------------------------------


def mask_of(shape=(4, 3, 5), p=0.3, seed=1, stream="layers.0.attn.q", first_row=0, dtype="float64"):
    """The mask of all tokens of N texts, T each."""
    N, T, D = shape
    n, t = xp.arange(N * T) // T + first_row, xp.arange(N * T) % T
    return ops.dropout_mask(n, t, D, p, seed=seed, stream=stream, dtype=dtype).reshape(shape)


def hash32(h):
    """A 32-bit mixing function (shifts 16, 15, 16), in Python's whole numbers."""
    h ^= h >> 16
    h = h * 0x7FEB352D % 2**32
    h ^= h >> 15
    h = h * 0x846CA68B % 2**32
    return h ^ h >> 16


def crc32(text):
    """The checksum of ISO 3309, a bit at a time."""
    crc = 0xFFFFFFFF
    for byte in text.encode():
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0xEDB88320 * (crc & 1)
    return crc ^ 0xFFFFFFFF


@proves("T12")
@given(seeds, st.sampled_from(["head", "layers.11.mlp.down"]), st.integers(0, 2**20), st.sampled_from([0.1, 0.5]))
def test_dropout_mask_is_the_hash_that_it_says(seed, stream, first_row, p):
    """The masks of a seed are part of what "same seed, same bits" promises: here they are computed anew."""
    N, T, D = 2, 3, 4
    key = crc32(f"{seed} {stream}")
    tokens = [hash32(hash32(first_row + n ^ key) ^ t) for n in range(N) for t in range(T)]
    columns = [hash32(d ^ key ^ 0x9E3779B9) for d in range(D)]
    kept = [[hash32(token ^ column) >= round(p * 2**32) for column in columns] for token in tokens]
    expected = np.where(kept, 1 / (1 - p), 0.0).reshape(N, T, D)
    assert same_bits(mask_of((N, T, D), p, seed, stream, first_row), expected)


@proves("T12")
@given(seeds)
def test_dropout_drops_hashes_below_p(seed):
    """Below p 2^32, and not at it: so of the 2^32 hashes exactly that many are dropped."""
    key = crc32(f"{seed} q")
    h = hash32(hash32(hash32(key)) ^ hash32(key ^ 0x9E3779B9))
    kept, dropped = (asnumpy(mask_of((1, 1, 1), p, seed, "q")).item() for p in (h / 2**32, (h + 1) / 2**32))
    assert kept == 1 / (1 - h / 2**32)
    assert dropped == 0


@proves("T12")
@given(seeds, small, small, small, st.floats(0, 0.99), dtypes)
def test_dropout_mask_is_zero_or_the_scale(seed, N, T, D, p, dtype):
    mask = asnumpy(mask_of((N, T, D), p, seed, dtype=dtype))
    assert mask.shape == (N, T, D)
    assert mask.dtype == dtype
    assert set(mask.ravel()) <= {0, np.dtype(dtype).type(1 / (1 - p))}


@proves("T12")
def test_no_dropout_is_ones():
    assert same_bits(mask_of(p=0.0), np.ones((4, 3, 5)))


@proves("T12", "O4")
@given(seeds, st.integers(1, 6), st.data())
def test_dropout_of_a_row_does_not_depend_on_its_shard(seed, N, data):
    """Any run of rows, cut out of the batch, has the masks that it has in the whole."""
    start = data.draw(st.integers(0, N - 1))
    end = data.draw(st.integers(start + 1, N))
    whole = mask_of((N, 3, 4), seed=seed)
    assert same_bits(mask_of((end - start, 3, 4), seed=seed, first_row=start), whole[start:end])


@proves("T12", "O4")
@given(seeds, st.integers(1, 4), st.integers(1, 4), st.data())
def test_dropout_of_a_token_does_not_depend_on_which_others_are_computed(seed, N, T, data):
    """Any tokens of the batch, picked out, have the masks that they have in the whole."""
    whole = asnumpy(mask_of((N, T, 5), seed=seed)).reshape(N * T, 5)
    index = np.array(data.draw(st.lists(st.integers(0, N * T - 1), min_size=1)))
    some = ops.dropout_mask(
        xp.asarray(index // T), xp.asarray(index % T), 5, 0.3, seed=seed, stream="layers.0.attn.q", dtype="float64"
    )
    assert same_bits(some, whole[index])


@proves("T12")
def test_dropout_in_blocks(tiny_blocks):
    assert same_bits(mask_of((5, 4, 8)), xp.concatenate([mask_of((1, 4, 8), first_row=n) for n in range(5)]))


@proves("T12")
@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_dropout_rate(p):
    """Of n independent elements, n p are dropped, within five deviations: sqrt(n p (1 - p))."""
    n = 100 * 1000
    dropped = int((asnumpy(mask_of((100, 10, 100), p)) == 0).sum())
    assert abs(dropped - n * p) <= 5 * math.sqrt(n * p * (1 - p))


OTHER_MASKS = {
    "seed": {"seed": 2},
    "layer": {"stream": "layers.1.attn.q"},
    "target": {"stream": "layers.0.attn.v"},
    "rows": {"first_row": 100},
}


@proves("T12")
@pytest.mark.parametrize("other", OTHER_MASKS.values(), ids=OTHER_MASKS)
def test_dropout_masks_are_independent(other):
    """Both dropped in n p^2 places of n, within five deviations, for masks that differ in one thing."""
    shape, p = (100, 10, 100), 0.3
    n, q = 100 * 1000, p * p
    both = (asnumpy(mask_of(shape, p)) == 0) & (asnumpy(mask_of(shape, p, **other)) == 0)
    assert abs(both.sum() - n * q) <= 5 * math.sqrt(n * q * (1 - q))


@proves("T12")
def test_dropout_rows_and_places_are_independent():
    """Pairs of rows, and pairs of neighbouring places, share n p^2 dropped elements, within five deviations."""
    dropped, p = asnumpy(mask_of((64, 16, 128), 0.3)).reshape(64, -1) == 0, 0.3
    q = p * p
    for one, other in ((dropped[:-1], dropped[1:]), (dropped[:, :-1], dropped[:, 1:]), (dropped[:32], dropped[32:])):
        assert abs((one & other).sum() - one.size * q) <= 5 * math.sqrt(one.size * q * (1 - q))


@proves("T12")
@given(seeds, small)
def test_dropout_multiplies_forward_and_backward(seed, T):
    x, mask, dy = np.random.default_rng(seed).standard_normal((3, 2, T, 4))
    y, saved = ops.dropout(device(x), device(mask))
    assert same_bits(y, x * mask)
    assert same_bits(ops.dropout_backward(device(dy), saved), dy * mask)


# --- T15: cross-entropy --------------------------------------------------------------------------------------------


def exact_cross_entropy(row, target):
    """-log softmax by math's own exp, log and exact sum."""
    top = max(row)
    return math.log(math.fsum(math.exp(v - top) for v in row)) + top - row[target]


@proves("T15")
@given(seeds, small, st.integers(1, 9), dtypes, st.sampled_from([1.0, 30.0, 1e4]))
def test_cross_entropy_is_minus_log_softmax(seed, M, V, dtype, size):
    """A logit errs by u |x| as max is taken from it, the sum by g(V), log and the difference by a rounding each."""
    rng = np.random.default_rng(seed)
    logits, targets = (size * rng.standard_normal((M, V))).astype(dtype), rng.integers(0, V, M)
    losses, (p, _) = ops.cross_entropy(device(logits.copy()), device(targets))
    expected = [exact_cross_entropy(row, t) for row, t in zip(logits.astype("float64").tolist(), targets, strict=True)]
    spread = float(np.ptp(logits.astype("float64")))
    slack = 4 * gamma(V + 4, dtype) * (1 + math.log(V)) + 4 * gamma(1, dtype) * spread + 8 * gamma(1) * size * 6
    assert losses.dtype == dtype
    assert np.abs(asnumpy(losses) - expected).max() <= slack
    rows = logits.astype("float64").tolist()
    tiny = (V + 2) * float(np.finfo(dtype).tiny)
    for got, row in zip(asnumpy(p), rows, strict=True):
        exact = np.array(exact_softmax(row))
        assert np.all(np.abs(got - exact) <= slack * exact + tiny)


@proves("T15")
@given(seeds, small, st.integers(1, 6), dtypes)
def test_cross_entropy_backward_is_softmax_minus_onehot(seed, M, V, dtype):
    rng = np.random.default_rng(seed)
    targets, dlosses = rng.integers(0, V, M), rng.standard_normal(M).astype(dtype)
    _, saved = ops.cross_entropy(device(rng.standard_normal((M, V)), dtype), device(targets))
    p = asnumpy(saved[0])
    expected = p * dlosses[:, None]
    expected[np.arange(M), targets] -= dlosses
    got = asnumpy(ops.cross_entropy_backward(device(dlosses), saved))
    assert same_bits(got, expected)
    # A shift of all logits of a row changes nothing: the gradient sums to 0.
    assert np.abs(got.sum(axis=-1)).max() <= 2 * gamma(2 * V + 4, dtype) * np.abs(dlosses).max()


@proves("T15")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cross_entropy_of_extremes(dtype):
    logits = device([[1e4, -1e4], [1e4, -1e4], [1e4, 1e4]], dtype)
    losses, _ = ops.cross_entropy(logits, device([0, 1, 0]))
    np.testing.assert_array_equal(asnumpy(losses), np.array([0, 2e4, math.log(2)], dtype))


@proves("T15")
def test_cross_entropy_of_no_row():
    """A shard may have no counted target."""
    losses, saved = ops.cross_entropy(xp.zeros((0, 5)), device([], int))
    assert losses.shape == (0,)
    assert ops.cross_entropy_backward(losses, saved).shape == (0, 5)


# --- What is computed a block at a time ----------------------------------------------------------------------------

BLOCKWISE = {
    "layer_norm": lambda x, w, b: ops.layer_norm(x, w, b, 1e-5)[0],
    "layer_norm_backward": lambda x, w, b: ops.layer_norm_backward(x * b, ops.layer_norm(x, w, b, 1e-5)[1]),
    "rms_norm": lambda x, w, b: ops.rms_norm(x, w, 1e-5)[0],
    "rms_norm_backward": lambda x, w, b: ops.rms_norm_backward(x * b, ops.rms_norm(x, w, 1e-5)[1]),
    "gelu": lambda x, w, b: ops.gelu(x)[0],
    "gelu, derivative": lambda x, w, b: ops.gelu(x)[1],
    "gelu_tanh": lambda x, w, b: ops.gelu_tanh(x)[0],
    "silu": lambda x, w, b: ops.silu(x)[0],
    "relu": lambda x, w, b: ops.relu(x)[0],
    "cross_entropy": lambda x, w, b: ops.cross_entropy(x.reshape(-1, 5).copy(), xp.arange(21) % 5)[0],
    "cross_entropy, softmax": lambda x, w, b: ops.cross_entropy(x.reshape(-1, 5).copy(), xp.arange(21) % 5)[1][0],
}


@proves("T3", "T4", "T5", "T6", "T7", "T15")
@pytest.mark.parametrize("name", BLOCKWISE)
def test_blocks_change_no_bit(name, monkeypatch):
    rng = np.random.default_rng(0)
    x, w, b = device(rng.standard_normal((3, 7, 5))), device(rng.standard_normal(5)), device(rng.standard_normal(5))
    whole = bits(BLOCKWISE[name](x, w, b))
    monkeypatch.setattr("lora_np.backend.CACHE_ELEMENTS", 16)
    assert bits(BLOCKWISE[name](x, w, b)) == whole


@proves("T9", "T10")
@given(attentions(), st.integers(1, 3), st.sampled_from([1, 8, 24]))
def test_tiles_of_attention_change_nothing_beyond_rounding(case, rows, cache):
    q = case[0]
    dy = np.random.default_rng(1).standard_normal(q.shape)

    def everything():
        y, saved = run_attention(*case)
        return [asnumpy(a) for a in (y, *ops.attention_backward(device(dy), saved)[:3])], len(tiles_of(saved))

    whole, one = everything()
    with tiles(rows, cache):
        cut, many = everything()
    N, G, T = case[1].shape[0], case[1].shape[1], q.shape[2]
    most = N * G * -(-T // rows) if xp is np else 1
    assert one == 1
    assert many == most if cache == 1 else many <= most
    scale = max(np.abs(a).max() for a in whole)
    assert all(np.abs(one - other).max() <= 1e-13 * scale for one, other in zip(whole, cut, strict=True))


@proves("T9", "T10")
@pytest.mark.parametrize("window", [None, 5])
def test_a_long_sequence_s_tiles_in_lists_change_nothing_beyond_rounding(window):
    """What each list adds to dk and dv meets in the end."""
    rng = np.random.default_rng(0)
    q, dy, k, v = (device(rng.standard_normal((2, heads, 40, 3))) for heads in (4, 4, 2, 2))

    def everything():
        y, saved = ops.attention(q, k, v, causal=True, window=window)
        return [asnumpy(a) for a in (y, *ops.attention_backward(dy, saved)[:3])], len(list(saved.tiles()))

    whole, one = everything()
    with tiles(1, 1):
        cut, lists = everything()
    assert (one, lists) == (1, 2 * 2 * 4 if xp is np else 1)
    assert all(np.abs(one - other).max() <= 1e-13 * np.abs(one).max() for one, other in zip(whole, cut, strict=True))


@proves("T9")
@pytest.mark.skipif(xp is not np, reason="on a GPU there is one tile")
@given(attentions(), st.integers(1, 3), st.integers(1, 60))
def test_a_tile_stays_in_cache(case, rows, cache):
    """Where it holds more scores than that, it is of the query heads of one text that share their keys."""
    with tiles(rows, cache):
        _, saved = run_attention(*case)
        for p in (saved.of(tile)[-1] for tile in tiles_of(saved)):
            assert p.size <= cache or p.shape[:2] == (1, 1)


@proves("T9")
@given(attentions(), st.sampled_from([1, 16, 131072]))
def test_causal_attention_computes_no_score_that_it_hides(case, cache):
    """With one query a tile none at all: there are as many as pairs of a query and a place that it may see."""
    q, k, _, causal, _ = case
    (N, H, T, _), S = q.shape, k.shape[2]
    with tiles(1, cache):
        _, saved = run_attention(*case)
        computed = sum(saved.of(tile)[-1].size for tile in tiles_of(saved))
    visible_pairs = sum(len(visible(0, t, T, S, causal, None)) for t in range(T))
    assert computed == N * H * (visible_pairs if xp is np else T * S)


# --- What is filled in place, and what never is --------------------------------------------------------------------

# Of each operation: what it takes, by name, and from these (y, saved); and its backward from (dy, saved).
ANGLES = ops.rotary_angles(xp.arange(4), 6, 100.0, "float64")
OPERATIONS = {
    "linear": ("x W w", lambda x, W, w: (ops.linear(x, W, w), W), ops.linear_backward),
    "linear, its weight": ("x W", lambda x, W: (ops.linear(x, W), x), ops.linear_weight_backward),
    "embedding": (
        "E tokens",
        lambda E, tokens: (ops.embedding(tokens, E), tokens),
        lambda dy, tokens: ops.embedding_backward(dy, tokens, 6),
    ),
    "pick": (
        "x index",
        lambda x, index: (ops.pick(x, index), index),
        lambda dy, index: ops.pick_backward(dy, index, (2, 3, 6)),
    ),
    "layer_norm": ("x w b", lambda x, w, b: ops.layer_norm(x, w, b, 1e-5), ops.layer_norm_backward),
    "layer_norm, its weight": ("x w b", lambda x, w, b: ops.layer_norm(x, w, b, 1e-5), ops.norm_weight_backward),
    "rms_norm": ("x w", lambda x, w: ops.rms_norm(x, w, 1e-5), ops.rms_norm_backward),
    "gelu": ("x", ops.gelu, ops.activation_backward),
    "gelu_tanh": ("x", ops.gelu_tanh, ops.activation_backward),
    "silu": ("x", ops.silu, ops.activation_backward),
    "relu": ("x", ops.relu, ops.activation_backward),
    "tanh": ("x", ops.tanh, ops.activation_backward),
    "softmax": ("x", ops.softmax, ops.softmax_backward),
    "attention": (
        "q k v keys",
        lambda q, k, v, keys: ops.attention(q, k, v, causal=True, mask=keys),
        lambda dy, saved: ops.attention_backward(dy, saved)[:3],
    ),
    "rotary": ("q", lambda q: ops.rotary(q, *ANGLES), ops.rotary_backward),
    "dropout": ("x m", lambda x, m: ops.dropout(x, m), ops.dropout_backward),
    "lora_linear": (
        "x W b A B m",
        lambda x, W, b, A, B, m: lora_linear(x, W, b, A, B, 0.5, dropout_mask=m),
        lora_linear_backward,
    ),
    "lora_embedding": (
        "tokens E A B",
        lambda tokens, E, A, B: lora_embedding(tokens, E, A, B, 0.5),
        lora_embedding_backward,
    ),
}


def operands(names, lie=device):
    """What an operation takes, by name; `lie` puts it on the device."""
    rng = np.random.default_rng(0)
    shapes = {
        "x": (2, 3, 6), "m": (2, 3, 6), "w": (6,), "b": (6,), "W": (6, 6), "E": (6, 6), "A": (2, 6), "B": (6, 2),
        "q": (2, 4, 4, 6), "k": (2, 2, 4, 6), "v": (2, 2, 4, 6),
    }  # fmt: skip
    made = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    made |= {"tokens": rng.integers(0, 6, (2, 3)), "index": np.array([4, 0, 3]), "keys": rng.random((2, 4)) < 0.7}
    return {name: lie(made[name]) for name in names.split()}


def flat(result):
    """A backward's result, of one array or several, as a list."""
    return list(result) if isinstance(result, tuple) else [result]


@proves("T1", "T2", "T3", "T4", "T5", "T6", "T7", "T8", "T9", "T11", "T12", "T14", "L2", "L4")
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_changes_nothing_that_it_is_given(name, monkeypatch):
    """Neither its inputs nor dy nor its result; and what is saved serves a second backward, with the same bits."""
    monkeypatch.setattr("lora_np.ops.QUERY_ROWS", 3)  # of four
    names, forward, backward = OPERATIONS[name]
    given_arrays = operands(names)
    before = {name: bits(a) for name, a in given_arrays.items()}
    y, saved = forward(**given_arrays)
    dy = device(np.random.default_rng(1).standard_normal(y.shape))
    y_before, dy_before = bits(y), bits(dy)
    first, second = ([bits(d) for d in flat(backward(dy, saved))] for _ in range(2))
    assert first == second
    assert (bits(y), bits(dy)) == (y_before, dy_before)
    assert {name: bits(a) for name, a in given_arrays.items()} == before


@proves("T15")
def test_cross_entropy_takes_its_logits_memory_and_nothing_else():
    """As it says: the softmax and then dlogits stand where the logits were; targets and dlosses are as before."""
    rng = np.random.default_rng(0)
    logits, targets, dlosses = device(rng.standard_normal((3, 5))), device([1, 0, 4]), device(rng.standard_normal(3))
    before = bits(targets), bits(dlosses)
    _, saved = ops.cross_entropy(logits, targets)
    assert saved[0] is logits
    assert ops.cross_entropy_backward(dlosses, saved) is logits
    assert (bits(targets), bits(dlosses)) == before


def columns_first(a):
    """On the device with its axes the other way round in memory, as a transposed array lies."""
    return device(np.ascontiguousarray(a.transpose())).transpose()


@proves("T1", "T2", "T3", "T4", "T5", "T6", "T7", "T8", "T9", "T11", "T12", "T14", "T15", "L2", "L4")
@pytest.mark.parametrize("name", [*OPERATIONS, "cross_entropy"])
def test_how_arrays_lie_in_memory_changes_nothing_beyond_rounding(name):
    cross_entropy = ("W tokens", lambda W, tokens: ops.cross_entropy(W, tokens.ravel()), ops.cross_entropy_backward)
    names, forward, backward = {**OPERATIONS, "cross_entropy": cross_entropy}[name]

    def everything(lie):
        y, saved = forward(**operands(names, lie))
        result = asnumpy(y).copy()
        dy = lie(np.random.default_rng(1).standard_normal(y.shape))
        return [result, *flat(backward(dy, saved))]

    for one, other in zip(everything(device), everything(columns_first), strict=True):
        assert deviation(other, one) <= 1e-14
