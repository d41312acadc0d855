"""Arithmetic that carries its rounding error: the bounds hold in float32, and gradients are those of complex steps."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from lora_np import gradcheck
from lora_np.backend import asnumpy, xp
from lora_np.vectors import tracked as tr
from lora_np.vectors.tracked import Tracked, gradients, tracked

# A step of a computation: on Tracked arrays, and in NumPy's float32. Each takes two arrays (3,4) above 0 and gives one.
STEPS = {
    "add": (lambda a, b: a + b, lambda a, b: a + b),
    "sub": (lambda a, b: a - b * 0.25, lambda a, b: a - b * np.float32(0.25)),
    "mul": (lambda a, b: a * b, lambda a, b: a * b),
    "div": (lambda a, b: a / (b + 1), lambda a, b: a / (b + 1)),
    "matmul": (lambda a, b: (a @ b.mT) @ a * 2.0**-6, lambda a, b: (a @ b.T) @ a * 2.0**-6),
    "sum": (lambda a, b: a + b.sum(0), lambda a, b: a + b[::-1].sum(0)),
    "mean": (lambda a, b: a - b.mean(), lambda a, b: a - b.mean(-1, keepdims=True, dtype=np.float32)),
    "take": (lambda a, b: a[np.array([2, 2, 0])], lambda a, b: a[np.array([2, 2, 0])]),
    "join": (lambda a, b: tr.joined([b, a[1:]], 0)[2:], lambda a, b: np.concatenate([b, a[1:]])[2:]),
    "exp": (lambda a, b: tr.exp(-a), lambda a, b: np.exp(-a)),
    "log": (lambda a, b: tr.log(a + 2), lambda a, b: np.log(a + 2)),
    "sqrt": (lambda a, b: tr.sqrt(a * a + 0.1), lambda a, b: np.sqrt(a * a + np.float32(0.1))),
    "tanh": (lambda a, b: tr.tanh(a), lambda a, b: np.tanh(a)),
    "erf": (lambda a, b: tr.erf(a), lambda a, b: np.vectorize(math.erf, otypes=["float32"])(a)),
    "sin": (lambda a, b: tr.sin(a) + 2, lambda a, b: np.sin(a) + 2),
    "cos": (lambda a, b: tr.cos(a) + 2, lambda a, b: np.cos(a) + 2),
}
POSITIVE = sorted(set(STEPS) - {"sub", "mean"})  # what gives numbers above 0 again


def inputs(seed):
    """Two arrays (3,4) that float32 has exactly."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 2048, (3, 4)) / 1024 for _ in range(2)]


@given(st.lists(st.sampled_from(POSITIVE), max_size=3), st.sampled_from(sorted(STEPS)), seeds)
def test_a_computation_in_float32_stays_within_the_bound(program, last, seed):
    a, b = inputs(seed)
    with_error, single = [tracked(a), tracked(b)], [a.astype(np.float32), b.astype(np.float32)]
    for step in [*program, last]:
        on_tracked, on_arrays = STEPS[step]
        with_error = [on_tracked(*with_error), with_error[0]]
        single = [on_arrays(*single).astype(np.float32), single[0]]
    y = with_error[0]
    assert single[0].dtype == np.float32
    assert (np.abs(single[0] - y.value) <= y.error).all()


@given(st.sampled_from(sorted(STEPS)), seeds)
def test_errors_of_the_operands_are_passed_on(step, seed):
    """Each operand anywhere within its error, here far larger than any rounding; its corners are the worst of it."""
    rng = np.random.default_rng(seed)
    values, errors = inputs(seed), [rng.random((3, 4)) * 0.01, rng.random((3, 4)) * 0.01]
    y = STEPS[step][0](*(Tracked(value, error) for value, error in zip(values, errors, strict=True)))
    for _ in range(10):
        moved = [v + e * rng.choice([-0.999999, 0.999999], v.shape) for v, e in zip(values, errors, strict=True)]
        other = STEPS[step][0](*map(tracked, moved))
        assert (np.abs(other.value - y.value) <= y.error).all()


@given(seeds)
def test_the_bound_of_a_product_holds_in_every_order_of_summing(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((1, 30)).astype(np.float32), rng.standard_normal((30, 1)).astype(np.float32)
    y = tracked(a) @ tracked(b)
    for _ in range(10):
        total = np.float32(0)
        for k in rng.permutation(30):
            total = total + a[0, k] * b[k, 0]
        assert abs(total - y.value) <= y.error


# The same steps of complex numbers; math.erf takes none.
COMPLEX = {name: f for name, (_, f) in STEPS.items() if name != "erf"} | {
    "sub": lambda a, b: a - b * 0.25,
    "mean": lambda a, b: a - b.mean(-1, keepdims=True),
    "sqrt": lambda a, b: np.sqrt(a * a + 0.1),
}
complex_programs = st.lists(st.sampled_from(sorted(set(POSITIVE) - {"erf"})), max_size=3)


@given(complex_programs, st.sampled_from(sorted(COMPLEX)), seeds)
def test_gradients_are_those_of_complex_steps(program, last, seed):
    ins = dict(zip("ab", inputs(seed), strict=True))
    on_tracked = {name: tracked(x) for name, x in ins.items()}
    pair = list(on_tracked.values())
    for step in [*program, last]:
        pair = [STEPS[step][0](*pair), pair[0]]
    found = gradients([(pair[0], Tracked(np.ones(pair[0].shape)))], on_tracked)

    def total(name, x):
        pair = list({**ins, name: asnumpy(x)}.values())
        for step in [*program, last]:
            pair = [COMPLEX[step](*pair), pair[0]]
        return pair[0].sum()

    for name, x in ins.items():
        by_step = gradcheck.complex_step(lambda z, name=name: total(name, z), x)
        np.testing.assert_allclose(found[name].value, by_step, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("x", [0.5, 1.0, 3.0])
def test_the_derivative_of_erf(x):
    """d erf = 2 / sqrt(pi) exp(-x^2)."""
    at = tracked(np.array([x]))
    (slope,) = gradients([(tr.erf(at), Tracked([1.0]))], {"x": at})["x"].value
    assert slope == pytest.approx(2 / math.sqrt(math.pi) * math.exp(-x * x), rel=1e-14)


def test_what_computes_nothing_has_no_error():
    x = tracked(np.arange(12.0).reshape(3, 4))
    same = (x.mT, x.reshape(4, 3), x.swapaxes(0, 1), x[1:], -x, x.spread((2, 3, 4)), x.detached())
    for y in (*same, tr.joined([x, x], 1)):
        assert not y.error.any()
    assert not (x * np.zeros((3, 4))).error.any()


def test_a_scalar_that_float32_lacks_is_rounded():
    assert tracked(0.25).error == 0
    assert tracked(0.1).error >= abs(float(np.float32(0.1)) - 0.1) > 0


def test_gradients_of_what_is_used_more_than_once_are_summed():
    x, table = tracked(np.array([3.0])), tracked(np.ones((2, 1)))
    y = x * x + x
    assert gradients([(y, Tracked([1.0]))], {"x": x})["x"].value == 7
    taken = table[np.array([0, 0, 1])]
    assert gradients([(taken, Tracked(np.ones((3, 1))))], {"t": table})["t"].value.tolist() == [[2.0], [1.0]]
    assert gradients([(y, Tracked([1.0]))], {"t": table})["t"].value.tolist() == [[0.0], [0.0]]


def test_noise_moves_results_by_no_more_than_their_bounds():
    """One operation: its result lies within its own bound; and numbers that are exact stay where they are."""
    a, b = inputs(0)
    exact = tracked(a) @ tracked(b).mT
    noise = np.random.RandomState(0)
    moved = [Tracked(a, noise=noise) @ Tracked(b, noise=noise).mT for _ in range(20)]
    distances = np.array([np.abs(one.value - exact.value) for one in moved])
    assert (distances <= exact.error).all()
    assert (distances.max(axis=0) > exact.error / 4).all()
    assert (Tracked(a, noise=noise).value == a).all()


def test_it_runs_on_the_host_whatever_the_backend():
    assert isinstance((tracked(asnumpy(xp.ones(3))) + 1).value, np.ndarray)


def polynomial_erf(x):
    """Abramowitz and Stegun, 7.1.26, as it stands, in the precision of x."""
    one, x = x.dtype.type(1), np.abs(x)
    t = one / (one + x.dtype.type(0.3275911) * x)
    total = np.zeros_like(t)
    for a in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        total = (total + x.dtype.type(a)) * t
    return one - total * np.exp(-x * x)


def test_the_error_of_erf_is_that_of_the_formula_that_libraries_take():
    """It is good absolutely, to 2.5 u before its roundings, and to no number of ulp near 0; not much more is let by."""
    x = np.concatenate([np.geomspace(1e-6, 0.1, 100_000), np.linspace(0.1, 6, 100_000)]).astype("float32")
    y = tr.erf(tracked(x))
    single = np.abs(polynomial_erf(x) - y.value)
    assert single.max() / tr.U > 8
    assert (single <= y.error).all()
    assert y.error.max() < 2 * single.max()
    double = np.abs(polynomial_erf(x.astype("float64")) - y.value)
    assert 2 < double.max() / tr.U < 2.6
    assert (single / y.value).max() > 100 * tr.FUNCTION
