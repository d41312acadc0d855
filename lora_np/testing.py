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

A case that fails is shrunk by hypothesis and shown as a few lines of Python that compute it here. The bounds are those
of the conformance vectors: derived, element by element, for the precision computed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .backend import Array
from .formats.files.extras import missing
from .vectors.answers import answers, error_ratio
from .vectors.cases import Case
from .vectors.definitions import scale
from .vectors.mistakes import explained

try:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
except ImportError as error:
    raise missing("lora_np.testing", "hypothesis", "test") from error

TENSORS = {"h": "out/h", "dx": "grad/x", "dA": "grad/A", "dB": "grad/B", "W": "out/W"}
SHORT = {long: short for short, long in TENSORS.items()}
FORWARD = "h, saved = ln.lora_linear(x, W0, b, A, B, s, dropout_mask=mask)"
BACKWARD = "dx, dA, dB = ln.lora_linear_backward(dh, saved)"
MERGED = "W = W0 + s * B @ A"
LINEAR = ("x", "W0", "b", "A", "B", "mask", "dh")
FAILING = 20  # failing cases that are looked at for a mistake to name
SIZES = sorted(  # in, out, r: the smallest first, which hypothesis shrinks to
    ((n, m, r) for n in (1, 2, 3) for m in (1, 2, 3) for r in range(1, min(n, m) + 1)), key=lambda sizes: sum(sizes)
)


class Mismatch(AssertionError):
    """What an implementation gave is outside its bounds; the message computes the case."""


class Linear(NamedTuple):
    """An adapted linear with its input and the gradient of its output (L1, L2): NumPy arrays of one dtype.

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


def check(
    implementation: Callable[[Linear], Mapping[str, Any]], *, dtype: str = "float32", examples: int = 100
) -> None:
    """Compares an implementation with L1, L2, L4 and L5; a Mismatch shows the smallest case found that differs.

    implementation: takes a Linear, gives some of h (N,T,out), dx (N,T,in), dA (r,in), dB (out,r) and the merged weight
    W (out,in), by name, as anything that NumPy takes. dtype: float32 or float64, of the arrays that it gets, and the
    precision that its results are held to.
    """
    if dtype not in ("float32", "float64"):
        raise ValueError(f"testing.check: dtype: expected float32 or float64, got {dtype!r}")

    failing: list[tuple[Case, Mapping[str, Array]]] = []

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(_cases())
    def compare(case: Case) -> None:
        linear = _linear(case, dtype)
        for part, got in _results(case, implementation(linear), dtype):
            wrong = _wrong(part, got)
            if wrong is not None:
                failing.append((part, got))
                raise Mismatch(_program(linear, *wrong))

    try:
        compare()
    except Mismatch as mismatch:
        mistake = explained(failing[:FAILING])
        lead = [] if mistake is None else [f"it looks like this mistake: {mistake[0]}"]
        raise Mismatch("\n".join([*lead, *mismatch.args])) from None


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    """An adapted linear, as a case of the vectors: small sizes, small dyadic numbers."""
    (n_in, n_out, r), (N, T) = draw(st.sampled_from(SIZES)), draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)]))

    def numbers(*shape: int) -> Array:
        size = int(np.prod(shape))
        return (
            np.array(draw(st.lists(st.integers(-8, 8), min_size=size, max_size=size)), dtype=float).reshape(shape) / 4
        )

    scalars: dict[str, Any] = {"alpha": draw(st.sampled_from([3.0, 16.0, 1.0, 0.0])), "r": r}
    scalars["rslora"] = draw(st.booleans())
    inputs = {"x": numbers(N, T, n_in), "W0": numbers(n_out, n_in), "A": numbers(r, n_in), "B": numbers(n_out, r)}
    inputs["dh"] = numbers(N, T, n_out)
    if draw(st.booleans()):
        inputs["b"] = numbers(n_out)
    if draw(st.booleans()):
        inputs["keep"] = numbers(N, T, n_in) >= 0
        scalars["p"] = 0.25
    return Case("L4", "generated", "lora_linear", "", scalars, inputs, ("x", "A", "B"))


def _merged(case: Case, dtype: str) -> Case:
    """The same matrix, merged."""
    inputs = {name: a for name, a in case.inputs.items() if name in ("x", "W0", "b", "A", "B")}
    return case._replace(operation="merge", scalars={**case.scalars, "dtype": dtype}, inputs=inputs, gradients=())


def _results(case: Case, got: Mapping[str, Any], dtype: str) -> list[tuple[Case, dict[str, Array]]]:
    """What an implementation gave: by the forward and backward, and by the merge."""
    if not isinstance(got, Mapping):
        raise TypeError(f"testing.check: expected a dict with some of {' '.join(TENSORS)}, got {type(got).__name__}")
    unknown = sorted(got.keys() - TENSORS.keys())
    if unknown or not got:
        raise ValueError(f"testing.check: expected some of {' '.join(TENSORS)}, got {unknown or 'nothing'}")
    arrays = {TENSORS[name]: np.asarray(value).astype(dtype) for name, value in got.items()}
    merged = {name: a for name, a in arrays.items() if name == TENSORS["W"]}
    parts = [(case, {name: a for name, a in arrays.items() if name not in merged}), (_merged(case, dtype), merged)]
    return [part for part in parts if part[1]]


def _wrong(case: Case, got: Mapping[str, Array]) -> tuple[str, str, Array, Array] | None:
    """What is wrong, if anything: the tensor's short name, how, what was expected, and what was got."""
    wanted = answers(case)
    for name, a in got.items():
        if a.shape != wanted[name].shape:
            return SHORT[name], f"has the shape {a.shape}, not {wanted[name].shape}", wanted[name].value, a
    ratios = {name: error_ratio(a, *wanted[name]) for name, a in got.items()}
    worst = max(ratios, key=lambda name: ratios[name])
    if ratios[worst] <= 1:
        return None
    return SHORT[worst], f"is {ratios[worst]:.3g} times its bound off", wanted[worst].value, got[worst]


def _linear(case: Case, dtype: str) -> Linear:
    c, arrays = case.scalars, {n: a.astype(dtype) for n, a in case.inputs.items()}
    mask = arrays["keep"] * np.asarray(1 / (1 - c["p"]), dtype=dtype) if "keep" in arrays else None
    return Linear(
        arrays["x"], arrays["W0"], arrays.get("b"), arrays["A"], arrays["B"], c["alpha"], c["r"], c["rslora"], mask,
        arrays["dh"],
    )  # fmt: skip


def _program(linear: Linear, name: str, problem: str, wanted: Array, got: Array) -> str:
    """What is wrong with a tensor, and the lines that compute it here."""

    def array(a: Array | None) -> str:
        return "None" if a is None else f'np.array({a.tolist()}, dtype="{a.dtype}")'

    needed, last = (("W0", "A", "B"), [MERGED]) if name == "W" else (LINEAR, [FORWARD, BACKWARD])
    lines = [
        f"{name} {problem}",
        "import numpy as np, lora_np as ln",
        *(f"{needs} = {array(getattr(linear, needs))}" for needs in needed),
        f"s = {linear.s!r}  # alpha = {linear.alpha:g}, r = {linear.r}, rslora = {linear.rslora}",
        *last,
    ]
    return "\n".join([*lines, f"# expected {name} = {wanted.tolist()}", f"# got      {name} = {got.tolist()}"])
