"""Narrow formats: what is rounded in them stays within its bound, and the bounds are no wider than they must be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from lora_np import gradcheck
from lora_np.backend import asnumpy
from lora_np.vectors import definitions
from lora_np.vectors import tracked as tr
from lora_np.vectors.precision import FLOAT32, PRECISIONS, U, rounded
from lora_np.vectors.tracked import Tracked, gradients

proves = pytest.mark.proves
NARROW = ["bfloat16", "float16"]
narrow = pytest.mark.parametrize("name", NARROW)


def single(x):
    """To float32 and back."""
    return np.asarray(x, dtype=np.float32).astype(np.float64)


def steps(dtype):
    """Steps of a computation of two arrays (3,4) above 0: on Tracked arrays, and with every result stored."""

    def s(x):
        return rounded(single(x), dtype)

    def softmax(a):
        e = np.exp(a - a.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    return {
        "add": (lambda a, b: a + b, lambda a, b: s(a + b)),
        "mul": (lambda a, b: a * b, lambda a, b: s(a * b)),
        "div": (lambda a, b: a / (b + 1), lambda a, b: s(a / s(b + 1))),
        "scaled": (lambda a, b: a * 0.1, lambda a, b: s(a * s(0.1))),
        "matmul": (lambda a, b: a @ b.mT @ a * 2.0**-6, lambda a, b: s(s(s(a @ b.T) @ a) * 2.0**-6)),
        "sum": (lambda a, b: a + b.sum(0), lambda a, b: s(a + s(b.sum(0)))),
        "take": (lambda a, b: a[np.array([2, 2, 0])], lambda a, b: a[np.array([2, 2, 0])]),
        "exp": (lambda a, b: tr.exp(-a), lambda a, b: s(np.exp(-a))),
        "log": (lambda a, b: tr.log(a + 2), lambda a, b: s(np.log(s(a + 2)))),
        "sqrt": (lambda a, b: tr.sqrt(a * a + 0.1), lambda a, b: s(np.sqrt(s(s(a * a) + s(0.1))))),
        "tanh": (lambda a, b: tr.tanh(a), lambda a, b: s(np.tanh(a))),
        "softmax": (lambda a, b: definitions.weights_of(a, np.ones((3, 4), bool)), lambda a, b: s(softmax(a))),
        "inside": (lambda a, b: (a.inside * a.inside / (b.inside + 1)).into(a.precision),
                   lambda a, b: s(a * a / (b + 1))),
    }  # fmt: skip


def inputs(seed, dtype, largest=2.0):
    rng = np.random.default_rng(seed)
    return [rounded(rng.uniform(2.0**-6, largest, (3, 4)), dtype) for _ in range(2)]


programs = st.lists(st.sampled_from(sorted(steps("bfloat16"))), min_size=1, max_size=4)


@proves("P1")
@given(st.sampled_from(NARROW), programs, seeds)
def test_a_computation_whose_every_result_is_stored_stays_within_the_bound(name, program, seed):
    a, b = inputs(seed, name)
    with_error, stored = [Tracked(x, precision=PRECISIONS[name]) for x in (a, b)], [a, b]
    for step in program:
        on_tracked, on_arrays = steps(name)[step]
        with_error = [on_tracked(*with_error), with_error[0]]
        stored = [on_arrays(*stored), stored[0]]
    y = with_error[0]
    assert y.precision.name == name
    assert (np.abs(stored[0] - y.value) <= y.error).all()


@proves("P1")
@narrow
@pytest.mark.parametrize("step", ["add", "mul"])
def test_the_bound_is_reached(name, step):
    """No more than a tenth of it is left over, of one operation on some numbers."""
    on_tracked, on_arrays = steps(name)[step]
    nearest = 0
    for seed in range(200):
        a, b = inputs(seed, name)
        y = on_tracked(*(Tracked(x, precision=PRECISIONS[name]) for x in (a, b)))
        nearest = max(nearest, (np.abs(on_arrays(a, b) - y.value) / y.error).max())
    assert 0.9 < nearest <= 1


@proves("P1")
@given(seeds)
def test_storing_in_float16_is_what_numpy_does(seed):
    """From the smallest numbers on: those that are too small for it become 0, at the most, and 0 stays 0."""
    x = np.concatenate([[0.0], np.ldexp(np.random.default_rng(seed).uniform(0.5, 1, 400), np.arange(400) % 40 - 30)])
    error, bound = np.abs(x.astype(np.float16).astype(np.float64) - x), PRECISIONS["float16"].storing(x)
    assert (error <= bound).all()
    assert (rounded(x, "float16") == x.astype(np.float16)).all()
    assert error[1:].max() > 0
    assert (error / np.maximum(bound, 1e-300)).max() > 0.99


@proves("P1")
def test_storing_in_bfloat16_is_what_ml_dtypes_does():
    bfloat16 = pytest.importorskip("ml_dtypes", reason="bfloat16 in NumPy: the extra models").bfloat16
    x = single(np.ldexp(np.random.default_rng(0).uniform(0.5, 1, 20_000), np.arange(20_000) % 200 - 120))
    error, bound = (
        np.abs(x.astype(np.float32).astype(bfloat16).astype(np.float64) - x),
        PRECISIONS["bfloat16"].storing(x),
    )
    assert (error <= bound).all()
    assert (error / bound).max() > 0.99


def on_a_tensor_core(a, b, block):
    """The sum of products as such hardware has it: `block` of them and what came before, aligned, cut."""
    total = 0.0
    for start in range(0, len(a), block):
        parts = [total, *(a[start : start + block] * b[start : start + block])]
        unit = 2.0 ** (np.frexp(np.abs(parts).max())[1] - 24)
        total = sum(np.trunc(part / unit) * unit for part in parts)
        unit = 2.0 ** (np.frexp(total)[1] - 24)
        total = np.trunc(total / unit) * unit
    return total


@proves("P1")
@given(st.sampled_from([4, 8, 16]), st.sampled_from(["random", "growing", "tiny"]), seeds)
def test_sums_that_truncate_stay_within_the_bound(block, how, seed):
    """Of numbers whose products float32 has exactly. Beside 1, those below its last bit vanish one by one."""
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(1, 2**8, 64) / 2.0**8 for _ in range(2))
    if how == "growing":
        a = np.sort(a)
    if how == "tiny":
        a[0], b[0], a[1:], b[1:] = 1.0, 1.0, (2 - 2.0**-7) * 2.0**-12, (2 - 2.0**-7) * 2.0**-13
    exact = (a * b).sum()
    for name in ("bfloat16", "float16", "tf32"):
        error = PRECISIONS[name]._replace(dtype="float32", factor=0.0).product(len(a)) * exact
        assert abs(on_a_tensor_core(a, b, block) - exact) <= error
    if how == "tiny":
        assert abs(on_a_tensor_core(a, b, block) - exact) > FLOAT32.product(len(a)) * exact


@proves("P1")
@given(seeds)
def test_products_of_rounded_factors_stay_within_tf32_s_bound(seed):
    """TF32 has 11 bits: float16's, without its limits. And float32's bound they do not keep."""
    rng = np.random.default_rng(seed)
    a, b = (single(rng.uniform(0.5, 1, shape)) for shape in ((5, 64), (64, 5)))
    y = Tracked(a, precision=PRECISIONS["tf32"]) @ Tracked(b, precision=PRECISIONS["tf32"])
    got = single(rounded(a, "float16") @ rounded(b, "float16"))
    assert (np.abs(got - y.value) <= y.error).all()
    assert (np.abs(got - y.value) > (Tracked(a) @ Tracked(b)).error).any()
    assert y.precision.name == "tf32"


def test_in_float32_nothing_is_wide_or_stored():
    x = Tracked(np.array([1.0, 0.1]))
    assert x.inside is x
    assert not x.precision.storing(x.value).any()
    assert ((x * x).error == U * x.value**2).all()


@narrow
def test_what_is_wide_inside_is_rounded_once(name):
    """x^2 - x of which a narrow format would keep nothing."""
    precision = PRECISIONS[name]
    x = Tracked(np.array([1 + 2 * precision.store]), precision=precision)
    wide, stored = ((x.inside * x.inside - x.inside).into(precision), x * x - x)
    assert wide.error < 1.2 * precision.store * wide.value
    assert stored.error > wide.value / 2
    assert wide.into(precision) is wide


def test_gradients_come_back_in_the_format_that_they_left():
    """Through what is wide inside, and without a rounding where they are added as they are looked up."""
    precision = PRECISIONS["bfloat16"]
    x = Tracked(np.array([1.5, 0.75]), precision=precision)
    y = (x.inside * x.inside).into(precision)
    found = gradients([(y, Tracked(np.ones(2), precision=precision))], {"x": x})["x"]
    assert found.precision is precision
    assert (found.value == [3.0, 1.5]).all()
    taken = gradients([(x[np.array([0, 1, 1])], Tracked(np.ones(3), precision=precision))], {"x": x})["x"]
    assert (taken.error > 0).tolist() == [False, True]


@given(seeds)
def test_the_gradient_of_softmax_is_that_of_complex_steps(seed):
    """It is written by hand, as nothing else is, for the weights as they are stored."""
    rng = np.random.default_rng(seed)
    x, dp, visible = rng.standard_normal((3, 4)), rng.standard_normal((3, 4)), rng.random((3, 4)) < 0.8
    on_tracked = Tracked(x)
    found = gradients([(definitions.weights_of(on_tracked, visible), Tracked(dp))], {"x": on_tracked})["x"].value

    def total(z):
        e = np.exp(asnumpy(z)) * visible
        return (e / (e.sum(-1, keepdims=True) + ~visible.any(-1, keepdims=True)) * dp).sum()

    np.testing.assert_allclose(found, gradcheck.complex_step(total, x), rtol=1e-12, atol=1e-14)
