"""Derivatives without calculus, to hold the hand-written ones against.

Complex step: f'(x) = Im f(x + i h) / h for a real-analytic f. Nothing is subtracted, so with h = 1e-30 it is exact to
rounding. Central differences, (f(x + h) - f(x - h)) / 2h, are the second opinion: good to about ten digits, and they
need no complex arithmetic. Both take anybody's function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from .backend import Array, asnumpy, xp

Scalar: TypeAlias = Callable[[Array], Any]
Arrays: TypeAlias = dict[str, Array]

STEP = 1e-30


def complex_step(f: Scalar, x: Array) -> Array:
    """The gradient of f at x, exact to rounding. f takes a complex128 array like x and gives a scalar.

    f must be real-analytic and keep complex numbers: no abs, no conj, no comparison but of real parts.
    x: any shape, float64. -> float64, x's shape.
    """
    x = asnumpy(x).astype(np.complex128)
    gradient = np.empty(x.shape)
    for place in np.ndindex(x.shape):
        real = x[place]
        x[place] = real + 1j * STEP
        gradient[place] = complex(f(xp.asarray(x))).imag / STEP
        x[place] = real
    return gradient


def central_difference(f: Scalar, x: Array, *, step: float = 1e-5) -> Array:
    """The gradient of f at x to about ten digits. f takes an array like x, float64, and gives a real scalar."""
    x = asnumpy(x).astype(np.float64)
    gradient = np.empty(x.shape)
    for place in np.ndindex(x.shape):
        real = x[place]
        x[place] = real + step
        above = float(f(xp.asarray(x)))
        x[place] = real - step
        gradient[place] = (above - float(f(xp.asarray(x)))) / (2 * step)
        x[place] = real
    return gradient


def relative_error(got: Array, expected: Array, *, floor: float = 0.0) -> float:
    """The largest deviation, relative to the largest element expected, or to `floor` if that is more."""
    got, expected = asnumpy(got), asnumpy(expected)
    if got.shape != expected.shape:
        raise ValueError(f"gradient: expected shape {expected.shape}, got {got.shape}")
    worst = float(np.abs(got - expected).max(initial=0.0))
    size = max(float(np.abs(expected).max(initial=0.0)), floor)
    return worst / size if worst else 0.0


def check(
    forward: Callable[..., Array],
    backward: Callable[..., Mapping[str, Array]],
    inputs: Mapping[str, Array],
    *,
    seed: int = 0,
    gradient: Callable[[Scalar, Array], Array] = complex_step,
) -> dict[str, float]:
    """The worst relative error of each gradient of a function of yours.

    forward(**inputs) -> y, of complex arrays too; backward(dy, **inputs) -> {name of an input: its gradient}.
    The scalar differentiated is sum(dy * y) for a random dy. -> {name: error}.
    """
    device = {name: xp.asarray(value) for name, value in inputs.items()}
    dy = xp.asarray(np.random.default_rng(seed).standard_normal(forward(**device).shape))
    got = backward(dy, **device)
    if not got or got.keys() - device.keys():  # of nothing, every error would be small
        raise ValueError(f"gradcheck.check: expected gradients of some of {' '.join(device)}, got {list(got)}")

    def error(name: str) -> float:
        def scalar(x: Array) -> Any:
            others = {other: value.astype(x.dtype) for other, value in device.items() if other != name}
            return (dy * forward(**others, **{name: x})).sum()

        return relative_error(got[name], gradient(scalar, device[name]))

    return {name: error(name) for name in got}
