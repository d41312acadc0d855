"""testing.check: right implementations pass, wrong ones are shown as lines that compute the case."""

import re
import subprocess
import sys

import numpy as np
import pytest

import lora_np as ln
from lora_np.backend import xp
from lora_np.testing import Mismatch, check


def right(case):
    """Another way than the package's: B A is formed, a row at a time."""
    dW = case.s * case.B @ case.A
    m = np.ones_like(case.x) if case.mask is None else case.mask
    n_in, n_out = case.A.shape[1], len(case.B)
    g, x, m_x = case.dh.reshape(-1, n_out), case.x.reshape(-1, n_in), (m * case.x).reshape(-1, n_in)
    h = x @ case.W0.T + m_x @ dW.T + (0 if case.b is None else case.b)
    ddW = g.T @ m_x
    return {
        "h": h.reshape(case.dh.shape),
        "dx": (g @ case.W0 + m.reshape(-1, n_in) * (g @ dW)).reshape(case.x.shape),
        "dA": case.s * case.B.T @ ddW,
        "dB": case.s * ddW @ case.A.T,
        "W": case.W0 + dW,
    }


def package(case):
    """The package's own."""
    x, W0, A, B, dh = (xp.asarray(a) for a in (case.x, case.W0, case.A, case.B, case.dh))
    b, mask = (None if a is None else xp.asarray(a) for a in (case.b, case.mask))
    h, saved = ln.lora_linear(x, W0, b, A, B, case.s, dropout_mask=mask)
    dx, dA, dB = ln.lora_linear_backward(dh, saved)
    return {name: ln.asnumpy(a) for name, a in (("h", h), ("dx", dx), ("dA", dA), ("dB", dB))}


@pytest.mark.proves("L1", "L2", "L4", "L5")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("implementation", [right, package])
def test_what_is_right_passes(implementation, dtype):
    check(implementation, dtype=dtype, examples=50)


def rounded_to(bits):
    """`right`, each factor of its products rounded to so many bits."""

    def fewer(x):
        mantissa, exponent = np.frexp(x)
        return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)

    def implementation(case):
        x, W0, A, B, g = (fewer(a.astype("float64")) for a in (case.x, case.W0, case.A, case.B, case.dh))
        m = np.ones_like(x) if case.mask is None else case.mask.astype("float64")
        low, back, b = fewer(fewer(m * x) @ A.T), fewer(g @ B), 0 if case.b is None else case.b
        rows = (-1, case.r)
        return {
            "h": x @ W0.T + case.s * low @ B.T + b,
            "dx": g @ W0 + case.s * m * (back @ A),
            "dA": case.s * back.reshape(rows).T @ fewer(m * x).reshape(-1, A.shape[1]),
            "dB": case.s * g.reshape(-1, len(B)).T @ low.reshape(rows),
            "W": case.W0 + case.s * B @ A,
        }

    return implementation


def wrong(**changes):
    """`right`, with some of its results changed."""
    return lambda case: right(case) | {name: f(case, right(case)) for name, f in changes.items()}


MISTAKES = [
    (wrong(h=lambda c, y: y["h"] * 0 + c.x @ c.W0.T), "h", "not added"),
    (wrong(h=lambda c, y: y["h"] + (0 if c.b is None else c.b)), "h", "the bias is added twice"),
    (wrong(dA=lambda c, y: y["dA"] / (c.s or 1)), "dA", "dA lacks the scale s"),
    (wrong(dA=lambda c, y: y["dA"] / c.x[..., 0].size, dB=lambda c, y: y["dB"] / c.x[..., 0].size), "d[AB]",
     "means over the rows, not sums"),
    (wrong(W=lambda c, y: 2 * c.W0 - y["W"]), "W", "the update is subtracted"),
    (wrong(W=lambda c, y: c.W0 + c.alpha / c.r * c.B @ c.A), "W", "rank-stabilised case"),
    (wrong(W=lambda c, y: c.W0 + np.floor(c.s) * c.B @ c.A), "W", "s is rounded down to a whole number"),
    (lambda c: right(c._replace(mask=None)), "d?[hABx]", "dropout is left out"),
    (wrong(dA=lambda c, y: right(c._replace(mask=None))["dA"]), "dA", "dA is formed without the dropout mask"),
    (wrong(dB=lambda c, y: right(c._replace(mask=None))["dB"]), "dB", "dB is formed without the dropout mask"),
    (lambda c: right(c._replace(mask=None if c.mask is None else c.mask != 0)), "d?[hABx]",
     "the dropout mask is not divided by 1 - p"),
]  # fmt: skip


@pytest.mark.parametrize(("implementation", "tensor", "text"), MISTAKES, ids=[text for *_, text in MISTAKES])
def test_what_is_wrong_is_named_and_shrunk(implementation, tensor, text):
    with pytest.raises(Mismatch) as found:
        check(implementation)
    lines = str(found.value).splitlines()
    if text != "not added":  # the bias is left out too, where there is one
        assert lines[0].startswith("it looks like this mistake: ")
        assert text in lines[0]
    assert any(re.match(rf"{tensor} is \S+ times its bound off", line) for line in lines)
    assert len(lines) <= 15
    numbers = [float(x) for line in lines for x in re.findall(r"-?\d+\.\d+(?=[\],])", line.split("dtype")[0])]
    if text == "dA lacks the scale s":
        assert sum(x != 0 for x in numbers) <= 5  # one number in each factor is not zero: the smallest that differs


@pytest.mark.parametrize("at_least", [1, 40], ids=["small", "large"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_lines_shown_compute_what_was_expected(at_least, dtype):
    """From the numbers themselves, or of large cases as they were drawn: of these the worst element is shown."""
    with pytest.raises(Mismatch) as found:
        check(wrong(dA=lambda c, y: y["dA"] * (2 if min(c.A.shape) >= at_least else 1)), dtype=dtype)
    lines = str(found.value).splitlines()
    assert max(map(len, lines)) < 1000
    start = next(i for i, line in enumerate(lines) if line.startswith("import"))
    shown = next(line for line in lines if line.startswith("# expected "))
    name, expected = shown.removeprefix("# expected ").split(" = ")
    assert (name == "dA") == (at_least == 1)
    result = subprocess.run(
        [sys.executable, "-c", "\n".join([*lines[start:], f"print({name}.tolist(), {name}.dtype)"])],
        capture_output=True, text=True, check=True, env={"PATH": ""},
    )  # fmt: skip
    computed, got_dtype = result.stdout.rsplit(maxsplit=1)
    assert got_dtype == dtype
    np.testing.assert_allclose(np.array(eval(computed)), np.array(eval(expected)), rtol=1e-5)


def test_another_shape_is_a_mismatch():
    """Shown on the smallest case in which a transpose has one."""
    with pytest.raises(Mismatch, match=r"^dA has the shape \(2, 1\), not \(1, 2\)\n"):
        check(lambda case: {"dA": right(case)["dA"].T})


LATE = {
    "for r > 3": lambda c: right(c._replace(A=np.where(np.arange(c.r)[:, None] < 3, c.A, 0))),
    "for in > 128": lambda c: right(c._replace(x=np.where(np.arange(c.x.shape[-1]) < 128, c.x, 0))),
    "for more than 64 rows": wrong(dB=lambda c, y: y["dB"] * (1 if c.x[..., 0].size <= 64 else 2)),
    "for r = 64": wrong(h=lambda c, y: y["h"] * (1 if c.r < 64 else 2)),
}


@pytest.mark.parametrize("when", LATE)
def test_what_is_wrong_at_larger_sizes_alone_is_seen(when):
    with pytest.raises(Mismatch, match=r"(?m)^d?\w+ is \S+ times its bound off$"):
        check(LATE[when])


def test_what_is_right_for_one_probability_alone_is_seen():
    def three_quarters(case):
        return right(case if case.mask is None else case._replace(mask=(case.mask != 0) / np.float32(0.75)))

    with pytest.raises(Mismatch, match=r"(?m)^d?\w+ is \S+ times its bound off$"):
        check(three_quarters)


@pytest.mark.parametrize(("bits", "text"), [(11, "TF32 or float16"), (8, "bfloat16")])
def test_factors_of_few_bits_are_named(bits, text):
    named = f"^it looks like this mistake: the factors of products are rounded to {bits} bits, as if in {text}\n"
    with pytest.raises(Mismatch, match=named):
        check(rounded_to(bits))


def test_what_is_written_into_an_input_is_said():
    """And nothing else: all that is computed of it would be wrong too."""

    def in_place(case):
        if case.mask is not None:
            case.x[:] = case.x * case.mask
        return right(case)

    with pytest.raises(Mismatch, match=r"^writes into its input x$"):
        check(in_place)


@pytest.mark.parametrize("after", [0, 60])
def test_a_callable_that_gives_this_and_then_that_is_said_to(after):
    """On a line of its own, whether its results are always wrong or now and then."""
    calls = []

    def flaky(case):
        calls.append(case)
        return {
            "h": right(case)["h"] + (len(calls) if len(calls) > after and (not after or len(calls) % 3 == 0) else 0)
        }

    with pytest.raises(Mismatch, match=r"^two calls with the same input give different results: .*\nh is \S+ times"):
        check(flaky)


def test_the_smallest_error_in_float64_is_seen():
    """That of float32."""
    with pytest.raises(Mismatch, match=r"^h is \S+ times its bound off\n"):
        check(lambda case: {"h": right(case)["h"].astype(np.float32)}, dtype="float64")


def test_what_an_implementation_raises_is_raised():
    def broken(case):
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        check(broken)


@pytest.mark.parametrize(("got", "said"), [({}, "nothing"), ({"dW": 0}, r"\['dW'\]")])
def test_results_of_other_names_are_refused(got, said):
    with pytest.raises(ValueError, match=rf"(?m)^testing\.check: expected some of h dx dA dB W, got {said}$"):
        check(lambda case: got)


@pytest.mark.parametrize("got", [None, np.zeros(3), [1.0]])
def test_results_that_are_no_dict_are_refused(got):
    """On one line, without hypothesis's own."""
    with pytest.raises(TypeError) as found:
        check(lambda case: got if case.b is not None else right(case))
    assert str(found.value) == f"testing.check: expected a dict with some of h dx dA dB W, got {type(got).__name__}"
    assert not getattr(found.value, "__notes__", [])


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="expected one of float64 float32 tf32 bfloat16 float16, got 'float8'"):
        check(right, dtype="float8")


def test_it_says_what_is_not_installed():
    """hypothesis is imported here alone, and the package without it."""
    program = "import sys; sys.modules['hypothesis'] = None\nimport lora_np as ln\nln.testing"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "ImportError: lora_np.testing needs hypothesis: pip install hypothesis (the extra test)" in result.stderr
