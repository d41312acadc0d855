"""What a case has to give: from the package in float64, with an error bound from the definition."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, asnumpy, xp
from .cases import Case
from .definitions import Definition
from .operations import OPERATIONS
from .precision import FLOAT32, PRECISIONS
from .tracked import Tracked, gradients

SMALLEST = 2.0**-126  # a float32 below it may be flushed to zero
FLOAT64 = 2.0**-28  # what is left of a bound in float64: u is 2^29 times smaller, and the answer itself is rounded too
# Of whole models: how many evaluations with noise, and the bound as a multiple of the farthest of them. The noise is as
# large as each rounding can be, sums of n terms as n - 1 roundings in one direction, so real errors are well below it;
# less so where what is stored is narrow, and outweighs the sums: there a larger multiple would let by whole gradients.
EVALUATIONS = 16
SPREAD = 8.0
SPREAD_NARROW = 4.0


class Answer(NamedTuple):
    """A tensor that is asked for: its value, float64 or int64, and how far float32 may be from it; 0: not at all."""

    value: Array
    bound: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The value's."""
        return self.value.shape


def computed(case: Case, dtype: str = "float64") -> dict[str, Array]:
    """What the package gives for a case, computed in `dtype`: out/NAME and grad/NAME, on the host."""
    inputs = {name: xp.asarray(_as(a, dtype)) for name, a in case.inputs.items()}
    outputs, grads = OPERATIONS[case.operation].reference(inputs, case.scalars)
    named = {f"out/{name}": value for name, value in outputs.items()}
    named |= {f"grad/{name}": grads[name] for name in case.gradients}
    return {name: _as(asnumpy(value), dtype) for name, value in named.items()}


def _as(a: Any, dtype: str) -> Array:
    a = np.asarray(a)
    return a.astype(dtype) if a.dtype.kind == "f" else a.astype(np.int64) if a.dtype.kind in "iu" else a


def defined(
    case: Case, definition: Definition | None = None, *, noise: np.random.RandomState | None = None
) -> dict[str, Tracked]:
    """What a definition, its own if None, gives for a case, with its errors: out/NAME and grad/NAME."""
    definition = definition or OPERATIONS[case.operation].definition
    precision = PRECISIONS[case.precision]
    inputs: dict[str, Any] = {
        name: Tracked(a, noise=noise, precision=precision) if a.dtype.kind == "f" else a
        for name, a in case.inputs.items()
    }
    with np.errstate(over="ignore", invalid="ignore"):  # errors, through a whole model, where noise takes their place
        outputs = definition(inputs, case.scalars)
        named = {f"out/{name}": value for name, value in outputs.items()}
        if case.gradients:
            seeds = [(y, inputs[f"d{name}"]) for name, y in outputs.items() if f"d{name}" in inputs]
            seeds = seeds or [(outputs["loss"], Tracked(1.0, precision=precision))]
            grads = gradients(seeds, {name: inputs[name] for name in case.gradients})
            named |= {f"grad/{name}": value for name, value in grads.items()}
    return named


def errors(case: Case, definition: Definition | None = None) -> dict[str, tuple[Array, Array]]:
    """The value of each tensor by a definition, its own if None, and the bound on a float32 result's error."""
    exact = defined(case, definition)
    if not OPERATIONS[case.operation].whole or not any(x.error.any() for x in exact.values()):
        return {name: (x.value, _bound(x.error)) for name, x in exact.items()}
    noise = np.random.RandomState(0)  # of all of NumPy's generators the one whose stream is frozen
    moved = [defined(case, definition, noise=noise) for _ in range(EVALUATIONS)]
    spread = {n: np.max([np.abs(one[n].value - x.value) for one in moved], axis=0) for n, x in exact.items()}
    times = SPREAD if PRECISIONS[case.precision].dtype == "float32" else SPREAD_NARROW
    return {name: (x.value, _bound(times * spread[name])) for name, x in exact.items()}


def answers(case: Case) -> dict[str, Answer]:
    """Every tensor that a case asks for."""
    bounds = errors(case)
    return {name: Answer(value, bounds[name][1]) for name, value in computed(case).items()}


def _bound(error: Array) -> Array:
    """An error as a bound on a float32 result, rounded up to float32; 0 where nothing was rounded."""
    bound = np.where(error == 0, 0.0, error + SMALLEST)
    near = bound.astype(np.float32)
    return np.where(near < bound, np.nextafter(near, np.float32(np.inf)), near).astype(np.float32)


def error_ratio(got: Array, value: Array, bound: Array, precision: str = FLOAT32.name) -> float:
    """The largest error of a result, as a multiple of its bound: above 1 is wrong, and so is NaN: infinity.

    got: float64 results are held to float32's bound times FLOAT64, all others to the bound itself.
    """
    in_float64 = got.dtype == np.float64 and precision == FLOAT32.name
    allowed = bound.astype(np.float64) * (FLOAT64 if in_float64 else 1.0)
    with np.errstate(all="ignore"):
        error = np.abs(got.astype(np.float64) - value)
        ratio = np.where(error == 0, 0.0, error / allowed)
    return float(np.nan_to_num(ratio, nan=np.inf, posinf=np.inf).max(initial=0.0))
