"""LoRA of one matrix: each statement in exact arithmetic, or within a bound that is derived."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import device, dtypes, gamma, same_bits, seeds, whole_numbers

import lora_np as ln
from lora_np import lora, ops
from lora_np.backend import asnumpy, xp
from lora_np.lora import Update
from lora_np.storage import narrowed

proves = pytest.mark.proves
small = st.integers(1, 5)
dyadic = st.sampled_from([-2.0, 0.25, 1.0, 4.0])  # scales whose products are exact


@st.composite
def linears(draw, dtype=None, masked=None):
    """x (N,T,in), W0, b or None, A, B of whole numbers, a dyadic s, and a mask of 0 and 2 or None."""
    N, T, n_in, n_out, r = (draw(small) for _ in range(5))
    dtype = draw(dtypes) if dtype is None else dtype
    rng = np.random.default_rng(draw(seeds))
    shapes = {"x": (N, T, n_in), "W0": (n_out, n_in), "b": (n_out,), "A": (r, n_in), "B": (n_out, r)}
    case = {name: whole_numbers(rng, *shape, dtype=dtype) for name, shape in shapes.items()}
    if draw(st.booleans()):
        case["b"] = None
    masked = draw(st.booleans()) if masked is None else masked
    mask = device(2.0 * rng.integers(0, 2, (N, T, n_in)), dtype) if masked else None
    return {**case, "s": draw(dyadic), "dropout_mask": mask}


def on_host(case):
    """x, W0, b, A, B, s, m as the formulas want them: on the host, b = 0 and m = 1 where there is none."""
    x, W0, A, B = (asnumpy(case[name]).astype("float64") for name in ("x", "W0", "A", "B"))
    b = 0 if case["b"] is None else asnumpy(case["b"])
    m = 1 if case["dropout_mask"] is None else asnumpy(case["dropout_mask"])
    return x, W0, b, A, B, case["s"], m


# --- L2: forward ---------------------------------------------------------------------------------------------------


@proves("L2")
@given(linears())
def test_forward_is_the_papers(case):
    """h = x W0^T + b + s (m*x) A^T B^T, to the bit: whole numbers leave nothing to round."""
    x, W0, b, A, B, s, m = on_host(case)
    h, _ = ln.lora_linear(**case)
    assert h.dtype == case["x"].dtype
    np.testing.assert_array_equal(asnumpy(h), x @ W0.T + b + s * ((m * x) @ A.T @ B.T))


@proves("L2")
@given(linears(masked=True))
def test_dropout_acts_on_the_low_rank_branch_alone(case):
    """With every input dropped the base is left, to the bit."""
    nothing = case["dropout_mask"] * 0
    h, _ = ln.lora_linear(**{**case, "dropout_mask": nothing})
    assert same_bits(h, ops.linear(case["x"], case["W0"], case["b"]))


@proves("L1", "L2")
@given(linears(masked=False), st.sampled_from([-4.0, 0.5, 2.0]))
def test_scaling_s_scales_the_update(case, c):
    base = ops.linear(case["x"], case["W0"], case["b"])
    h, _ = ln.lora_linear(**case)
    scaled, _ = ln.lora_linear(**{**case, "s": c * case["s"]})
    np.testing.assert_array_equal(asnumpy(scaled - base), c * asnumpy(h - base))


@proves("L2")
@given(linears(masked=False))
def test_forward_leaves_its_arguments_alone(case):
    before = {name: None if a is None else asnumpy(a).tobytes() for name, a in case.items() if name != "s"}
    _, saved = ln.lora_linear(**case)
    ln.lora_linear_backward(xp.ones_like(ops.linear(case["x"], case["W0"])), saved)
    assert before == {name: None if a is None else asnumpy(a).tobytes() for name, a in case.items() if name != "s"}


@proves("L2", "L7")
@given(linears(masked=False, dtype="float64"), seeds, st.booleans())
def test_an_update_for_each_row(case, seed, missing):
    """Rows with updates of other ranks and scales, or none, stacked: each row as if it were alone.

    s goes into B, a dyadic one; the filling of zeros adds nothing: no bit differs.
    """
    rng = np.random.default_rng(seed)
    x, W0, b = case["x"], case["W0"], case["b"]
    n_out, n_in = W0.shape
    ranks = rng.integers(1, 4, len(x))
    scales = [float(sign * 2.0**-r) for sign, r in zip(rng.choice([-1, 1], len(x)), ranks, strict=True)]
    rows = [
        Update(whole_numbers(rng, r, n_in), whole_numbers(rng, n_out, r), s) for r, s in zip(ranks, scales, strict=True)
    ]
    if missing and len(rows) > 1:
        rows[0] = None
    stacked = lora.stack_updates(rows)
    h, _ = ln.lora_linear(x, W0, b, *stacked[:3])
    assert (stacked.s, stacked.dropout) == (1.0, 0.0)
    assert stacked.A.shape == (len(x), max(len(row.A) for row in rows if row), n_in)
    for n, row in enumerate(rows):
        alone = ops.linear(x[n], W0, b) if row is None else ln.lora_linear(x[n], W0, b, *row[:3])[0]
        assert same_bits(h[n], alone)


@st.composite
def embeddings(draw):
    """tokens, E (V,D), A (r,V), B (D,r), s, of whole numbers."""
    N, T, V, D, r = (draw(small) for _ in range(5))
    rng = np.random.default_rng(draw(seeds))
    tables = [whole_numbers(rng, *shape) for shape in ((V, D), (r, V), (D, r))]
    return device(rng.integers(0, V, (N, T))), *tables, draw(dyadic)


@proves("L2", "T1")
@given(embeddings())
def test_look_up_reads_the_updated_table(case):
    """E + s (B A)^T, to the bit."""
    tokens, E, A, B, s = case
    h, _ = lora.lora_embedding(*case)
    table = asnumpy(E) + s * (asnumpy(B) @ asnumpy(A)).T
    np.testing.assert_array_equal(asnumpy(h), table[asnumpy(tokens)])


@proves("L4", "T1")
@given(embeddings(), seeds)
def test_look_up_gradients_are_the_chain_rule(case, seed):
    """dA = s B^T dW, dB = s dW A^T, with dW = dE^T (D,V)."""
    tokens, E, A, B, s = case
    dh = whole_numbers(np.random.default_rng(seed), *tokens.shape, E.shape[1])
    dA, dB = lora.lora_embedding_backward(dh, lora.lora_embedding(*case)[1])
    onehot = asnumpy(tokens)[..., None] == np.arange(len(E))
    dW = np.einsum("ntd,ntv->dv", asnumpy(dh), onehot)
    np.testing.assert_array_equal(asnumpy(dA), s * asnumpy(B).T @ dW)
    np.testing.assert_array_equal(asnumpy(dB), s * dW @ asnumpy(A).T)


# --- L3: the start -------------------------------------------------------------------------------------------------


def started(n_out, n_in, seed=0, dtype="float64", *, r, sigma=None):
    return lora.init_factors(np.random.default_rng(seed), n_out, n_in, r, dtype, sigma=sigma)


@proves("L3")
@given(seeds, st.integers(2, 20), st.integers(2, 20), dtypes, st.sampled_from([None, 0.02]))
def test_start_has_a_random_a_and_b_zero(seed, n_out, n_in, dtype, sigma):
    A, B = started(n_out, n_in, seed, dtype, r=2, sigma=sigma)
    assert (A.shape, B.shape) == ((2, n_in), (n_out, 2))
    assert A.dtype == B.dtype == dtype
    assert not asnumpy(B).any()
    assert len(np.unique(asnumpy(A))) == 2 * n_in
    assert same_bits(A, started(n_out, n_in, seed, dtype, r=2, sigma=sigma)[0])


@proves("L3")
@pytest.mark.parametrize("sigma", [None, 0.03], ids=["uniform", "normal"])
def test_start_has_the_distribution_of_a(sigma):
    """Mean and mean square of n = 10^5 numbers, within five deviations of what the law has."""
    n_in = 100
    a = asnumpy(started(1000, n_in, r=100, sigma=sigma)[0])
    a = np.concatenate([a, *(asnumpy(started(1000, n_in, seed, r=100, sigma=sigma)[0]) for seed in range(1, 10))])
    variance = 1 / (3 * n_in) if sigma is None else sigma**2
    fourth = (1 / n_in) ** 2 / 5 if sigma is None else 3 * sigma**4
    assert abs(a.mean()) <= 5 * math.sqrt(variance / a.size)
    assert abs((a**2).mean() - variance) <= 5 * math.sqrt((fourth - variance**2) / a.size)
    if sigma is None:
        assert 0.999 / math.sqrt(n_in) <= np.abs(a).max() <= 1 / math.sqrt(n_in)


@proves("L3", "L4")
@given(linears())
def test_at_the_start_nothing_changes_and_only_b_learns(case):
    """B = 0: the base's output to the bit, dA = 0 exactly, and dB = s g^T ((m*x) A^T) is not 0 where that is not."""
    case["B"] = case["B"] * 0
    h, saved = ln.lora_linear(**case)
    assert same_bits(h, ops.linear(case["x"], case["W0"], case["b"]))
    x, _, _, A, _, s, m = on_host(case)
    dh = xp.ones_like(h)
    _, dA, dB = ln.lora_linear_backward(dh, saved)
    assert not asnumpy(dA).any()
    np.testing.assert_array_equal(asnumpy(dB), np.einsum("nto,ntr->or", asnumpy(dh), s * (m * x) @ A.T))


# --- L4: backward --------------------------------------------------------------------------------------------------


@proves("L4")
@given(linears(), seeds)
def test_backward_is_the_papers(case, seed):
    x, W0, _, A, B, s, m = on_host(case)
    h, saved = ln.lora_linear(**case)
    dh = whole_numbers(np.random.default_rng(seed), *h.shape, dtype=h.dtype)
    dx, dA, dB = ln.lora_linear_backward(dh, saved)
    g = asnumpy(dh).astype("float64")
    np.testing.assert_array_equal(asnumpy(dx), g @ W0 + s * m * (g @ B @ A))
    np.testing.assert_array_equal(asnumpy(dA), s * np.einsum("ntr,nti->ri", g @ B, m * x))
    np.testing.assert_array_equal(asnumpy(dB), s * np.einsum("nto,ntr->or", g, (m * x) @ A.T))
    assert {dx.dtype, dA.dtype, dB.dtype} == {h.dtype}


@proves("L4")
@given(linears(masked=False), seeds)
def test_backward_is_the_chain_rule_of_the_full_gradient(case, seed):
    """dA = s B^T dW, dB = s dW A^T, with dW the gradient that full fine-tuning has: to the bit."""
    h, saved = ln.lora_linear(**case)
    dh = whole_numbers(np.random.default_rng(seed), *h.shape, dtype=h.dtype)
    dW = asnumpy(ops.linear_weight_backward(dh, case["x"])).astype("float64")
    _, _, _, A, B, s, _ = on_host(case)
    _, dA, dB = ln.lora_linear_backward(dh, saved)
    np.testing.assert_array_equal(asnumpy(dA), s * B.T @ dW)
    np.testing.assert_array_equal(asnumpy(dB), s * dW @ A.T)


@proves("L4")
@given(linears(), seeds)
def test_backward_without_dx(case, seed):
    """dx is not computed, and dA and dB are the same."""
    h, saved = ln.lora_linear(**case)
    dh = device(np.random.default_rng(seed).standard_normal(h.shape), h.dtype)
    dx, dA, dB = lora.lora_linear_backward(dh, saved, need_dx=False)
    _, dA2, dB2 = ln.lora_linear_backward(dh, saved)
    assert dx is None
    assert same_bits(dA, dA2)
    assert same_bits(dB, dB2)


# --- L5: merge -----------------------------------------------------------------------------------------------------


@proves("L5")
@given(linears(masked=False))
def test_merge_adds_s_b_a(case):
    _, W0, _, A, B, s, _ = on_host(case)
    merged = lora.merge_matrix(case["W0"], Update(case["A"], case["B"], s))
    assert merged.dtype == case["W0"].dtype
    np.testing.assert_array_equal(asnumpy(merged), W0 + s * (B @ A))


@proves("L5")
@given(seeds, small, small, st.sampled_from([1e-3, 1.0, 1e3]))
def test_merge_rounds_once(seed, n_out, n_in, s):
    """In float32: the nearest to W0 + s B A, but for float64's own roundings: half an ulp and a little."""
    rng = np.random.default_rng(seed)
    W0, A, B = (rng.standard_normal(shape).astype("float32") for shape in ((n_out, n_in), (3, n_in), (n_out, 3)))
    merged = asnumpy(lora.merge_matrix(device(W0), Update(device(A), device(B), s))).astype("float64")
    wide = [a.astype("longdouble") for a in (W0, A, B)]
    exact = (wide[0] + np.longdouble(s) * (wide[2] @ wide[1])).astype("float64")
    size = np.abs(wide[0]) + s * np.abs(wide[2]) @ np.abs(wide[1])
    assert np.all(np.abs(merged - exact) <= np.abs(exact) * 2.0**-24 + gamma(6) * size.astype("float64"))


@proves("L5")
def test_merge_in_blocks_changes_no_bit(monkeypatch):
    rng = np.random.default_rng(0)
    W0, update = whole_numbers(rng, 7, 5), Update(whole_numbers(rng, 2, 5), whole_numbers(rng, 7, 2), 0.25)
    whole = lora.merge_matrix(W0, update)
    monkeypatch.setattr("lora_np.backend.CACHE_ELEMENTS", 10)
    assert same_bits(lora.merge_matrix(W0, update), whole)


def merged_against_unmerged(x, W0, b, A, B, s):
    """(how far the two outputs lie apart, the bound), element by element, in float64."""
    x, W0, b, A, B = (None if a is None else device(a) for a in (x, W0, b, A, B))
    h, _ = ln.lora_linear(x, W0, b, A, B, s)
    merged = ops.linear(x, lora.merge_matrix(W0, Update(A, B, s)), b)
    bound = lora.linear_rounding_bound(x, W0, b, A, B, s, x.dtype)
    apart = np.abs(asnumpy(h).astype("float64") - asnumpy(merged).astype("float64"))
    return apart, asnumpy(bound)


@st.composite
def rough_linears(draw):
    """Numbers of widely differing sizes, from subnormals to near overflow, of either dtype; rank and width from 1."""
    dtype = draw(dtypes)
    info = np.finfo(dtype)
    least, most = math.log10(float(info.smallest_subnormal)), 0.8 * math.log10(float(info.max))
    T, n_in, n_out, r = (draw(st.sampled_from([1, 1, 2, 3, 17])) for _ in range(4))
    rng = np.random.default_rng(draw(seeds))
    x, W0, b, A, B, s = (draw(st.floats(least, most)) if draw(st.booleans()) else 0.0 for _ in range(6))
    low = max(x + A, A + B, s + x, s + B, x + A + B, x + A + s, A + B + s, x + A + s + B)
    assume(max(x + W0, low) < most)  # nothing overflows

    def random(size, *shape):
        return (rng.standard_normal(shape) * 10**size).astype(dtype)

    W0 = random(W0, n_out, n_in)
    b = random(b, n_out) if draw(st.booleans()) else None
    x, A, B, s = random(x, T, n_in), random(A, r, n_in), random(B, n_out, r), float(10**s)
    if draw(st.booleans()):
        W0 = W0 - (s * (B.astype("float64") @ A)).astype(dtype)  # the update takes a base away
    return x, W0, b, A, B, s


@proves("L5")
@given(rough_linears())
def test_merged_and_unmerged_agree_within_the_bound(case):
    apart, bound = merged_against_unmerged(*case)
    assert np.all(apart <= bound)


def cancelling(size):
    """W0 = -s B A but for rounding: the update takes the base away."""
    rng = np.random.default_rng(0)
    x, A, B = (rng.standard_normal(shape) * size for shape in ((8, 9), (2, 9), (7, 2)))
    return x, -3 * (B @ A), np.zeros(7), A, B, 3.0


def hidden(eps):
    """Beside b = 1 both x W0 and the update are less than half an ulp, and lost; their sum is more, and is not."""
    return [[1.0]], [[0.3 * eps]], [1.0], [[1.0]], [[0.3 * eps]], 1.0


# x, W0, b, A, B and s, from the smallest number above 0 and its square root.
HARD = {
    "cancellation": lambda tiny, root: cancelling(1.0),
    "cancellation of large numbers": lambda tiny, root: cancelling(1e6),
    "s x A underflows": lambda tiny, root: ([[1e-20]], [[0.0]], None, [[1.0]], [[1e30]], 1e-30),
    "s underflows": lambda tiny, root: ([[1e9]], [[0.0]], None, [[1e9]], [[1e9]], 1.4 * tiny),
    "x A underflows, s is large": lambda tiny, root: ([[root]], [[0.0]], None, [[0.3 * root]], [[1.0]], 1e30),
    "B A underflows, s is large": lambda tiny, root: ([[1e6]], [[0.0]], None, [[root]], [[0.3 * root]], 1e9),
    "x A B underflows, s is large": lambda tiny, root: (
        [[tiny]],
        [[1.0]],
        None,
        [[1e9]],
        [[tiny * 1e9]],
        0.1 / root**1.6,
    ),
    "x W0 underflows": lambda tiny, root: ([[root] * 9], [[0.7 * root] * 9], None, [[1e-9] * 9], [[1e-9]], 1.0),
    "W0 is subnormal": lambda tiny, root: ([[1e9]], [[tiny]], None, [[1e-9]], [[0.3 * tiny * 1e9]], 1.0),
    "b hides each half": lambda tiny, root: hidden(2.0**-23 if tiny > 1e-50 else 2.0**-52),
    "the update is lost": lambda tiny, root: ([[1.0] * 300], [[1.0] * 300], None, [[1e-9] * 300], [[1e-3]], 1.0),
    "many that cancel": lambda tiny, root: ([[1.0, -1.0] * 500], [[1.1] * 1000], [0.1], [[0.7] * 1000], [[0.3]], 7.0),
}


@proves("L5")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", HARD)
def test_merged_and_unmerged_agree_where_it_is_hard(name, dtype):
    tiny = float(np.finfo(dtype).smallest_subnormal)
    x, W0, b, A, B, s = HARD[name](tiny, tiny**0.5)
    apart, bound = merged_against_unmerged(*(None if a is None else np.array(a, dtype) for a in (x, W0, b, A, B)), s)
    assert np.all(apart <= bound)


@proves("L5")
@pytest.mark.parametrize(("s", "zeros"), [(-3.0, ()), (0.0, ("W0", "b")), (-3.0, ("W0", "b", "A"))])
@given(case=linears(masked=False))
def test_the_bound_is_the_one_that_is_derived(case, s, zeros):
    """2 g(in + r + 4) (|x||W0|^T + |s||x||A|^T|B|^T + |b|) and eta for each product that may underflow.

    Where the first is zero, for want of W0, b and s or A, the second shows.
    """
    case |= {name: case[name] * 0 for name in zeros if case[name] is not None}
    dtype, (r, n_in) = case["x"].dtype, case["A"].shape
    x, W0, b, A, B, _, _ = (np.abs(a) for a in on_host(case))
    M = x @ W0.T + abs(s) * (x @ A.T @ B.T) + b
    B1, x1 = B.sum(axis=1), x.sum(axis=2, keepdims=True)
    unmerged = n_in + n_in * abs(s) * B1 + x @ A.T @ B.T + B1 + r
    merged = (r * abs(s) + 2) * x1 + n_in
    eta = float(np.finfo(dtype).smallest_subnormal)
    got = lora.linear_rounding_bound(case["x"], case["W0"], case["b"], case["A"], case["B"], s, dtype)
    expected = 2 * gamma(n_in + r + 4, dtype) * M + eta * (unmerged + merged)
    assert np.all(np.abs(asnumpy(got) - expected) <= 1e-13 * expected)


@proves("L5")
@given(seeds)
def test_a_matrix_held_in_bfloat16_has_the_bound_of_its_numbers(seed):
    rng = np.random.default_rng(seed)
    x, W0, A, B = (whole_numbers(rng, *shape, dtype="float32") for shape in ((2, 3), (4, 3), (2, 3), (4, 2)))
    bounds = [lora.linear_rounding_bound(x, W, None, A, B, 0.5, "float32") for W in (W0, narrowed(W0))]
    assert same_bits(*bounds)


@proves("L5")
def test_the_bound_is_not_slack():
    """One rounding of the base and one of the merged weight, of many tried, reach a tenth of the bound."""
    rng = np.random.default_rng(0)
    best = 0.0
    for _ in range(300):
        case = [rng.uniform(1, 2, shape).astype("float32") for shape in ((64, 1), (8, 1), (8,), (1, 1), (8, 1))]
        apart, bound = merged_against_unmerged(*case, 1.0)
        best = max(best, float((apart / bound).max()))
    assert 0.1 <= best <= 1


# --- What is never formed ------------------------------------------------------------------------------------------


def peak_of(function):
    """The most bytes that NumPy holds at once for a call, beyond what it held before."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@proves("L2", "L4")
def test_neither_b_a_nor_the_gradient_of_the_frozen_matrix_is_formed():
    """Forward and backward of 4 rows through a matrix of 8 MB take less than a tenth of it."""
    n = 1000
    x, W0, A, B = (device(np.ones(shape)) for shape in ((4, n), (n, n), (2, n), (n, 2)))
    if peak_of(lambda: B @ A) < 8 * n * n:
        pytest.skip("the device's memory is not NumPy's: its allocations cannot be traced")
    assert peak_of(lambda: lora.lora_linear_backward(x, lora.lora_linear(x, W0, None, A, B, 0.5)[1])) < 0.8 * n * n


# --- What does not fit ---------------------------------------------------------------------------------------------

GOOD = {"x": (2, 3), "W0": (4, 3), "b": (4,), "A": (2, 3), "B": (4, 2)}


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (2, 4), r"x: expected \(\.\.\., 3\), got \(2, 4\)"),
        ("x", (), "expected x"),
        ("W0", (4,), "expected x"),
        ("b", (3,), r"b: expected \(4,\), got \(3,\)"),
        ("A", (2, 4), r"A: expected \(r, 3\), got \(2, 4\)"),
        ("A", (1, 2, 3), "expected x"),
        ("B", (4, 3), r"B: expected \(4, 2\), got \(4, 3\)"),
        ("B", (3, 2), r"B: expected \(4, 2\), got \(3, 2\)"),
        ("dropout_mask", (2, 2), r"dropout_mask: expected \(2, 3\), got \(2, 2\)"),
    ],
)
def test_a_wrong_shape_is_refused(name, shape, message):
    arrays = {n: xp.ones(s) for n, s in {**GOOD, name: shape}.items()}
    with pytest.raises(ValueError, match=message):
        ln.lora_linear(**arrays, s=1.0)


def test_a_rank_above_the_matrix_is_refused():
    with pytest.raises(ValueError, match=r"at most min\(in, out\) = 3, got r = 4"):
        started(3, 5, r=4)
