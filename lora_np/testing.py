"""Is your adapted linear right? Any callable beside the specification, on generated cases.

    import torch
    from lora_np import testing

    def mine(case):
        x, A, B, W0, dh = (torch.tensor(a, requires_grad=True) for a in (case.x, case.A, case.B, case.W0, case.dh))
        h = x @ W0.T + (x if case.mask is None else x * torch.tensor(case.mask)) @ A.T @ B.T * (case.alpha / case.r)
        h = h if case.b is None else h + torch.tensor(case.b)
        dx, dA, dB = torch.autograd.grad(h, [x, A, B], dh)
        W = W0 + case.alpha / case.r * B @ A
        return {name: t.detach().numpy() for name, t in [("h", h), ("dx", dx), ("dA", dA), ("dB", dB), ("W", W)]}

    testing.check(mine)  # a Mismatch: s = alpha / r in a rank-stabilised case

First come small cases of small numbers, of which hypothesis finds the smallest that fails; then sizes to 130 and ranks
to 64, of numbers that fill float32. A case is shown as a few lines of Python that compute it here. The bounds are those
of the conformance vectors: derived, element by element, for the precision computed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from .backend import Array
from .formats.files.extras import missing
from .vectors.answers import answers, error_ratio
from .vectors.cases import Case
from .vectors.definitions import scale
from .vectors.mistakes import explained
from .vectors.precision import FLOAT32, FORMATS, PRECISIONS, rounded

try:
    from hypothesis import HealthCheck, Phase, Verbosity, given, settings
    from hypothesis import strategies as st
    from hypothesis.errors import Flaky
except ImportError as error:
    raise missing("lora_np.testing", "hypothesis", "test") from error

DTYPES = ("float64", *PRECISIONS)
TENSORS = {"h": "out/h", "dx": "grad/x", "dA": "grad/A", "dB": "grad/B", "W": "out/W"}
SHORT = {long: short for short, long in TENSORS.items()}
FORWARD = "h, saved = ln.lora_linear(x, W0, b, A, B, s, dropout_mask=mask)"
BACKWARD = "dx, dA, dB = ln.lora_linear_backward(dh, saved)"
MERGED = "W = W0 + s * B @ A"
LINEAR = ("x", "W0", "b", "A", "B", "mask", "dh")
SIZES = sorted(  # in, out, r: the smallest first, which hypothesis shrinks to
    ((n, m, r) for n in (1, 2, 3) for m in (1, 2, 3) for r in range(1, min(n, m) + 1)), key=lambda sizes: sum(sizes)
)
LARGE = (  # N, T, in, out, r: the smaller first; to either side of the sizes that kernels cut by
    (1, 4, 4, 4, 2), (2, 3, 5, 4, 3), (1, 5, 4, 7, 4), (2, 2, 8, 6, 5), (1, 7, 9, 9, 8), (3, 3, 8, 17, 7),
    (2, 9, 17, 9, 9), (1, 1, 17, 33, 16), (1, 17, 33, 17, 17), (2, 17, 33, 65, 33), (1, 33, 65, 64, 32),
    (4, 17, 130, 33, 31), (1, 65, 65, 130, 64), (1, 130, 130, 130, 64),
)  # fmt: skip
TELLING = 16  # cases of the smaller of them: in which mistakes are told apart
ALPHAS = (3.0, 16.0, 1.0, 0.0)
PROBABILITIES = (0.5, 0.25, 0.1, 0.9)
SHOWN = 32  # elements of a result that are all shown; of a larger one, the worst
CHANGES = "two calls with the same input give different results: is something random, or kept between calls?"


class Mismatch(AssertionError):
    """What an implementation gave is outside its bounds; the message computes the case."""


class Linear(NamedTuple):
    """An adapted linear with its input and the gradient of its output (L1, L2): NumPy arrays of one dtype.

    In bfloat16 and tf32, which NumPy lacks, they are of float32, and in bfloat16 of numbers that it has.
    mask is the scaled dropout mask, 0 or 1 / (1 - p); b and mask may be None.
    """

    x: Array  # (N,T,in)
    W0: Array  # (out,in)
    b: Array | None  # (out,)
    A: Array  # (r,in)
    B: Array  # (out,r)
    alpha: float
    r: int
    rslora: bool  # whether s = alpha / sqrt(r), not alpha / r
    mask: Array | None  # (N,T,in)
    dh: Array  # (N,T,out)

    @property
    def s(self) -> float:
        """The scale, as L1 has it."""
        return scale(self._asdict())


class Drawn(NamedTuple):
    """A case, and the seed that its numbers came from; None: they are small, and stand for themselves."""

    case: Case
    seed: int | None = None


class Wrong(NamedTuple):
    """A result that is wrong: its short name, how, what was expected, what was got, and the worst element."""

    name: str
    how: str
    wanted: Array
    got: Array
    worst: tuple[int, ...]


def check(
    implementation: Callable[[Linear], Mapping[str, Any]], *, dtype: str = "float32", examples: int = 100
) -> None:
    """P1 on L1, L2, L4 and L5: compares an implementation; a Mismatch shows the smallest case found that differs.

    implementation: takes a Linear, gives some of h (N,T,out), dx (N,T,in), dA (r,in), dB (out,r) and the merged weight
    W (out,in), by name, as anything that NumPy takes; its inputs are its to read. dtype: float64, float32, tf32,
    bfloat16 or float16, the precision of the numbers that it gets, and that its results are held to. examples: how many
    small cases.
    """
    if dtype not in DTYPES:
        raise ValueError(f"testing.check: dtype: expected one of {' '.join(DTYPES)}, got {dtype!r}")

    def problem(drawn: Drawn) -> str | None:
        return _problem(implementation, drawn, dtype)

    found = _smallest(problem, examples) or _first(problem, dtype)
    if found is not None:
        drawn, message = found
        if problem(drawn) != message:
            raise Mismatch(f"{CHANGES}\n{message}")
        mistake = explained(list(_failing(implementation, dtype)))
        lead = [] if mistake is None else [f"it looks like this mistake: {mistake[0]}"]
        raise Mismatch("\n".join([*lead, message]))


def _first(problem: Callable[[Drawn], str | None], dtype: str) -> tuple[Drawn, str] | None:
    """The first of the large cases that has a problem, and which; None: there is none."""
    for drawn in _large(dtype):
        message = problem(drawn)
        if message is not None:
            return drawn, message
    return None


def _smallest(problem: Callable[[Drawn], str | None], examples: int) -> tuple[Drawn, str] | None:
    """The smallest of the small cases that has a problem, and which; None: none was found."""
    last: list[tuple[Drawn, str]] = []

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, report_multiple_bugs=False,
        print_blob=False, phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )  # fmt: skip
    @given(_small())
    def compare(drawn: Drawn) -> None:
        message = problem(drawn)
        if message is not None:
            last[:] = [(drawn, message)]
            raise Mismatch

    try:
        compare()
    except (Mismatch, Flaky):
        return last[0]
    return None


# --- Cases -----------------------------------------------------------------------------------------------------------


@st.composite
def _small(draw: st.DrawFn) -> Drawn:
    """An adapted linear, as a case of the vectors: small sizes, small dyadic numbers."""
    (n_in, n_out, r), (N, T) = draw(st.sampled_from(SIZES)), draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)]))

    def numbers(*shape: int) -> Array:
        size = int(np.prod(shape))
        return (
            np.array(draw(st.lists(st.integers(-8, 8), min_size=size, max_size=size)), dtype=float).reshape(shape) / 4
        )

    scalars: dict[str, Any] = {"alpha": draw(st.sampled_from(ALPHAS)), "r": r, "rslora": draw(st.booleans())}
    inputs = {name: numbers(*shape) for name, shape in _shapes(N, T, n_in, n_out, r).items()}
    if draw(st.booleans()):
        inputs["b"] = numbers(n_out)
    if draw(st.booleans()):
        inputs["keep"] = numbers(N, T, n_in) >= 0
        scalars["p"] = draw(st.sampled_from(PROBABILITIES))
    return Drawn(_case(scalars, inputs))


def _large(dtype: str) -> Iterator[Drawn]:
    """Cases of larger sizes, each without dropout and with it: of no zeros, and every kind of scale."""
    for i, (size, dropout) in enumerate((size, dropout) for size in LARGE for dropout in (False, True)):
        r = size[-1]
        alpha = (16.0, r + 3.0, 2.0 * r, 5.0, 3.0)[i % 5]
        p = PROBABILITIES[i // 2 % len(PROBABILITIES)] if dropout else None
        yield _filled(i, size, {"alpha": alpha, "r": r, "rslora": i % 3 == 1}, dtype, bias=i % 4 in (1, 2), p=p)


def _filled(
    seed: int, sizes: tuple[int, int, int, int, int], scalars: Mapping[str, Any], dtype: str, *, bias: bool,
    p: float | None,
) -> Drawn:  # fmt: skip
    """A case of random numbers in [-1, 1) that fill a significand, float32's at the most; as `_drawing` says it."""
    rng = np.random.RandomState(seed)
    unit = 2 ** (_bits(dtype) - 1)
    shapes = _shapes(*sizes) | ({"b": (sizes[3],)} if bias else {})
    inputs = {name: rng.randint(-unit, unit, shape, dtype="int64") / unit for name, shape in shapes.items()}
    if p is None:
        return Drawn(_case(scalars, inputs), seed)
    keep = rng.random_sample(shapes["x"]) >= p
    return Drawn(_case({**scalars, "p": p}, {**inputs, "keep": keep}), seed)


def _stored(dtype: str) -> str:
    """What numbers are stored in."""
    return PRECISIONS[dtype].dtype if dtype in PRECISIONS else dtype


def _bits(dtype: str) -> int:
    return min(FORMATS[_stored(dtype)][0], FORMATS["float32"][0])


def _shapes(N: int, T: int, n_in: int, n_out: int, r: int) -> dict[str, tuple[int, ...]]:
    return {"x": (N, T, n_in), "W0": (n_out, n_in), "A": (r, n_in), "B": (n_out, r), "dh": (N, T, n_out)}


def _case(scalars: Mapping[str, Any], inputs: Mapping[str, Array]) -> Case:
    return Case("L4", "generated", "lora_linear", "", scalars, inputs, ("x", "A", "B"))


def _merged(case: Case, dtype: str) -> Case:
    """The same matrix, merged."""
    inputs = {name: a for name, a in case.inputs.items() if name in ("x", "W0", "b", "A", "B")}
    scalars = {**case.scalars, "dtype": _stored(dtype)}
    return case._replace(operation="merge", scalars=scalars, inputs=inputs, gradients=())


def _linear(case: Case, dtype: str) -> Linear:
    """A case as the implementation gets it: arrays of its own."""
    stored = _stored(dtype)
    held = "float32" if stored == "bfloat16" else stored
    c, arrays = case.scalars, {n: a.astype(held) for n, a in case.inputs.items()}
    mask = arrays["keep"] * _kept(c["p"], stored).astype(held) if "keep" in arrays else None
    return Linear(
        arrays["x"], arrays["W0"], arrays.get("b"), arrays["A"], arrays["B"], c["alpha"], c["r"], c["rslora"], mask,
        arrays["dh"],
    )  # fmt: skip


def _kept(p: float, stored: str) -> Array:
    """What an element that dropout keeps is multiplied by."""
    return rounded(np.asarray(1 / (1 - p)), stored)


# --- Results ---------------------------------------------------------------------------------------------------------


def _problem(implementation: Callable[[Linear], Mapping[str, Any]], drawn: Drawn, dtype: str) -> str | None:
    """What is wrong with what an implementation does with a case; None: nothing."""
    given, linear = _linear(drawn.case, dtype), _linear(drawn.case, dtype)
    results = _results(drawn.case, implementation(given), dtype)
    written = [name for name in LINEAR if not np.array_equal(getattr(given, name), getattr(linear, name))]
    if written:
        return f"writes into its input {' '.join(written)}"
    for part, got in results:
        wrong = _wrong(part, got)
        if wrong is not None:
            return _program(drawn, linear, wrong, dtype)
    return None


def _failing(
    implementation: Callable[[Linear], Mapping[str, Any]], dtype: str
) -> Iterator[tuple[Case, Mapping[str, Array]]]:
    """What is got wrong of the smaller of the large cases; those that an implementation stops at tell nothing."""
    for drawn in islice(_large(dtype), TELLING):
        try:
            results = _results(drawn.case, implementation(_linear(drawn.case, dtype)), dtype)
        except Exception:
            continue
        yield from ((part, got) for part, got in results if _wrong(part, got) is not None)


def _results(case: Case, got: Mapping[str, Any], dtype: str) -> list[tuple[Case, dict[str, Array]]]:
    """What an implementation gave: by the forward and backward, and by the merge."""
    if not isinstance(got, Mapping):
        raise TypeError(f"testing.check: expected a dict with some of {' '.join(TENSORS)}, got {type(got).__name__}")
    unknown = sorted(got.keys() - TENSORS.keys())
    if unknown or not got:
        raise ValueError(f"testing.check: expected some of {' '.join(TENSORS)}, got {unknown or 'nothing'}")
    precision, held = (FLOAT32.name, "float64") if dtype == "float64" else (dtype, "float32")
    case = case._replace(precision=precision)
    arrays = {TENSORS[name]: np.asarray(value).astype(held) for name, value in got.items()}
    merged = {name: a for name, a in arrays.items() if name == TENSORS["W"]}
    parts = [(case, {name: a for name, a in arrays.items() if name not in merged}), (_merged(case, dtype), merged)]
    return [part for part in parts if part[1]]


def _wrong(case: Case, got: Mapping[str, Array]) -> Wrong | None:
    """What is wrong, if anything."""
    wanted = answers(case)
    for name, a in got.items():
        if a.shape != wanted[name].shape:
            return Wrong(SHORT[name], f"has the shape {a.shape}, not {wanted[name].shape}", wanted[name].value, a, ())
    ratios = {name: error_ratio(a, *wanted[name]) for name, a in got.items()}
    worst = max(ratios, key=lambda name: ratios[name])
    if ratios[worst] <= 1:
        return None
    value, bound = wanted[worst]
    each = [error_ratio(*one) for one in zip(got[worst].ravel(), value.ravel(), bound.ravel(), strict=True)]
    element = np.unravel_index(int(np.argmax(each)), value.shape)
    how = f"is {ratios[worst]:.3g} times its bound off"
    return Wrong(SHORT[worst], how, value, got[worst], tuple(int(i) for i in element))


# --- What is shown ---------------------------------------------------------------------------------------------------


def _program(drawn: Drawn, linear: Linear, wrong: Wrong, dtype: str) -> str:
    """What is wrong with a tensor, and the lines that compute it here."""
    needed, last = (("W0", "A", "B"), [MERGED]) if wrong.name == "W" else (LINEAR, [FORWARD, BACKWARD])
    lines = [
        f"{wrong.name} {wrong.how}",
        "import numpy as np, lora_np as ln",
        *(_literals(linear, needed) if drawn.seed is None else _drawing(drawn, linear, dtype)),
        f"s = {linear.s!r}  # alpha = {linear.alpha:g}, r = {linear.r}, rslora = {linear.rslora}",
        *last,
    ]
    name, wanted, got = wrong.name, wrong.wanted, wrong.got
    if wanted.size > SHOWN and wrong.worst:
        name, wanted, got = f"{name}[{', '.join(map(str, wrong.worst))}]", wanted[wrong.worst], got[wrong.worst]
    elif wanted.size > SHOWN:  # of another shape, which has been said
        return "\n".join(lines)
    return "\n".join([*lines, f"# expected {name} = {wanted.tolist()}", f"# got      {name} = {got.tolist()}"])


def _literals(linear: Linear, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        a = getattr(linear, name)
        yield f"{name} = None" if a is None else f'{name} = np.array({a.tolist()}, dtype="{a.dtype}")'


def _drawing(drawn: Drawn, linear: Linear, dtype: str) -> Iterator[str]:
    """What `_filled` does."""
    case, held = drawn.case, linear.x.dtype
    names = [name for name in case.inputs if name != "keep"]
    unit = f"2**{_bits(dtype) - 1}"
    shapes = ", ".join(str(case.inputs[name].shape) for name in names)
    yield f"rng, shapes = np.random.RandomState({drawn.seed}), [{shapes}]"
    yield f'numbers = [rng.randint(-{unit}, {unit}, shape, dtype="int64") / {unit} for shape in shapes]'
    yield f'{", ".join(names)} = (a.astype("{held}") for a in numbers)'
    if "b" not in case.inputs:
        yield "b = None"
    if "keep" not in case.inputs:
        yield "mask = None"
    else:
        p = case.scalars["p"]
        kept = _kept(p, "bfloat16").item() if dtype == "bfloat16" else f"1 / (1 - {p})"
        yield f'mask = (rng.random_sample(x.shape) >= {p}) * np.asarray({kept}, dtype="{held}")  # p = {p}'
