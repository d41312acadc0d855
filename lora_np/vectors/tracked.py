"""Arithmetic that carries its rounding error: numbers with a bound on how far float32 can be from them.

A Tracked array holds the exact value (in float64, whose own roundings are 2^29 times smaller) and, for each element,
a bound on the error that a computation of it in float32 can have come to: Wilkinson's running error analysis, as in
Higham, Accuracy and Stability of Numerical Algorithms, section 3.3. Let u = 2^-24. An operation on numbers with errors
passes these on, and adds its own rounding, u times the size of its result:

    a + b    ea + eb                            a b      |a| eb + |b| ea + ea eb
    a / b    (ea + |a/b| eb) / (|b| - eb)       f(a)     the most that f changes within ea of a, and 8 u |f(a)|

A sum of n terms costs gamma(n) = n u / (1 - n u) times the sum of their sizes, whatever its order, fused or not. 8 u is
4 ulp: what libraries promise, or better, for exp, log, tanh, sin and cos; erf's own error is absolute (ERF). Nothing
overflows.

In a narrower format (P1, `precision`) each result is rounded once more, as it is stored; in TF32 the factors of a
product of matrices are, before it. What must be wide `inside` is computed in float32, and its result stored.

Through a whole model that bound is of no use: it takes every rounding in its worst direction, though they cannot all go
there, and ends above the gradients themselves. There the same formula is evaluated with noise: each result is moved by
a random part of the most that its own rounding can be (Monte Carlo arithmetic, Parker 1997), and the spread of some
evaluations says how errors travel, correlations and all.

Each result remembers what it was made of, so that `gradients` can go back through a formula by the chain rule, in the
same arithmetic: the bounds of gradients come from the formula of the forward alone. This is a second opinion on every
backward of the package, which it shares no code with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from ..backend import Array
from .precision import FLOAT32, Precision, U, gamma, rounded

FUNCTION = 8 * U  # the relative error of a library's elementary function
# The absolute error of its erf. GELU adds 1 to it, so vectorised libraries take Abramowitz and Stegun's 7.1.26, 1 minus
# t (a1 + ... + a5 t^4) exp(-x^2): good to 1.5e-7, 2.5 u, but to no number of ulp near 0. The second part is about 1
# there and comes of a dozen roundings: computed as it stands in float32, erf is off by 10.2 u at the most from -6 to 6
# (PyTorch's, with fused operations, by less). An erf good to 4 ulp stays within 8 u.
ERF = 16 * U

Backward: TypeAlias = "Callable[[Tracked], Tracked]"


class Tracked:
    """An array of exact values, a bound on each one's error in float32, and what it was made of."""

    __array_ufunc__ = None  # an ndarray on the left of an operator lets this class decide

    def __init__(
        self,
        value: Any,
        error: Any = 0.0,
        parents: Sequence[tuple[Tracked, Backward]] = (),
        *,
        rounding: float = 0.0,
        local: Any = None,
        noise: np.random.RandomState | None = None,
        precision: Precision | None = None,
    ) -> None:
        """error: what came with the operands. rounding, times the result and then stored, or local, in all: what the
        operation adds itself. noise: where the numbers of such an evaluation come from; precision: what it is computed
        in; the operands' own if None."""
        exact: Array = np.asarray(value, dtype=np.float64)
        self.noise: np.random.RandomState | None = noise
        if noise is None:
            self.noise = next((parent.noise for parent, _ in parents if parent.noise is not None), None)
        self.precision: Precision = precision or next(
            (parent.precision for parent, _ in parents if parent.precision is not FLOAT32), FLOAT32
        )
        size = np.abs(exact) + error
        own = rounding * size + (self.precision.storing(size) if rounding else 0.0) if local is None else local
        self.parents = parents
        self.value, self.error = exact, np.zeros(exact.shape)
        if self.noise is None:
            self.error += error + own
        elif rounding or local is not None:
            self.value = exact + own * self.noise.uniform(-1, 1, exact.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's."""
        return self.value.shape

    @property
    def size(self) -> Array:
        """How large the computed number can be."""
        return np.abs(self.value) + self.error

    def __neg__(self) -> Tracked:
        return Tracked(-self.value, self.error, [(self, lambda g: -g)])

    def __add__(self, other: Any) -> Tracked:
        a, b = self, tracked(other, self)
        return Tracked(
            a.value + b.value, a.error + b.error,
            [(a, lambda g: _like(g, a.shape)), (b, lambda g: _like(g, b.shape))], rounding=U,
        )  # fmt: skip

    def __sub__(self, other: Any) -> Tracked:
        return self + -tracked(other, self)

    def __mul__(self, other: Any) -> Tracked:
        a, b = self, tracked(other, self)
        return Tracked(
            a.value * b.value, np.abs(a.value) * b.error + np.abs(b.value) * a.error + a.error * b.error,
            [(a, lambda g: _like(g * b, a.shape)), (b, lambda g: _like(g * a, b.shape))], rounding=U,
        )  # fmt: skip

    def __truediv__(self, other: Any) -> Tracked:
        a, b = self, tracked(other, self)
        q = a.value / b.value
        least = np.abs(b.value) - b.error  # where it is no more than 0, nothing is known
        with np.errstate(divide="ignore"):
            error = np.where(least > 0, (a.error + np.abs(q) * b.error) / np.maximum(least, 0), np.inf)
        y = Tracked(
            q, error,
            [(a, lambda g: _like(g / b, a.shape)), (b, lambda g: _like(-(g * y) / b, b.shape))], rounding=U,
        )  # fmt: skip
        return y

    def __matmul__(self, other: Tracked) -> Tracked:
        """(..., n) (n, m) -> (..., m), leading axes broadcast as NumPy does."""
        a, b = self, other
        error = a.error @ np.abs(b.value) + np.abs(a.value) @ b.error + a.error @ b.error
        y, precision = a.value @ b.value, self._beside(other)
        rounding = precision.product(a.shape[-1]) * (a.size @ b.size)
        return Tracked(
            y, error, [(a, lambda g: _like(g @ b.mT, a.shape)), (b, lambda g: _like(a.mT @ g, b.shape))],
            local=rounding + precision.storing(np.abs(y) + error + rounding),
        )  # fmt: skip

    def _beside(self, other: Tracked) -> Precision:
        """What an operation on both is computed in."""
        return other.precision if self.precision is FLOAT32 else self.precision

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Any) -> Tracked:
        return tracked(other, self) - self

    @property
    def mT(self) -> Tracked:
        """The last two axes exchanged."""
        return Tracked(self.value.swapaxes(-1, -2), self.error.swapaxes(-1, -2), [(self, lambda g: g.mT)])

    def sum(self, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False) -> Tracked:
        """In any order."""
        total = self.value.sum(axis=axis, keepdims=keepdims)
        kept = self.value.sum(axis=axis, keepdims=True).shape
        n = self.value.size // total.size
        error = self.error.sum(axis=axis, keepdims=keepdims)
        rounding = gamma(n - 1) * self.size.sum(axis=axis, keepdims=keepdims)
        return Tracked(
            total, error, [(self, lambda g: g.reshape(*kept).spread(self.shape))],
            local=rounding + (self.precision.storing(np.abs(total) + error + rounding) if n > 1 else 0.0),
        )  # fmt: skip

    def mean(self) -> Tracked:
        """Over the last axis, which is kept."""
        return self.sum(-1, keepdims=True) / self.shape[-1]

    def spread(self, shape: tuple[int, ...]) -> Tracked:
        """Broadcast: no number is computed."""
        value, error = np.broadcast_to(self.value, shape), np.broadcast_to(self.error, shape)
        return Tracked(value, error, [(self, lambda g: _like(g, self.shape))])

    def reshape(self, *shape: int) -> Tracked:
        """The same numbers in another shape."""
        return Tracked(self.value.reshape(shape), self.error.reshape(shape), [(self, lambda g: g.reshape(*self.shape))])

    def swapaxes(self, i: int, j: int) -> Tracked:
        """Two axes exchanged."""
        return Tracked(self.value.swapaxes(i, j), self.error.swapaxes(i, j), [(self, lambda g: g.swapaxes(i, j))])

    def __getitem__(self, index: Any) -> Tracked:
        """Elements by any index of NumPy's; the gradients of one that is taken often are summed."""

        def backward(g: Tracked) -> Tracked:
            value, error, size, times = (np.zeros(self.shape) for _ in range(4))
            for total, part in ((value, g.value), (error, g.error), (size, g.size), (times, np.ones(g.shape))):
                np.add.at(total, index, part)
            local = gamma(int(times.max()) - 1) * size
            local = np.where(times > 1, local + g.precision.storing(size), 0.0)
            return Tracked(value, error, local=local, noise=g.noise, precision=g.precision)

        return Tracked(self.value[index], self.error[index], [(self, backward)])

    def detached(self) -> Tracked:
        """The same numbers, which no gradient goes back from."""
        return Tracked(self.value, self.error, noise=self.noise, precision=self.precision)

    def into(self, precision: Precision) -> Tracked:
        """The same numbers, for operations in another precision; stored, if that is narrower."""
        if precision is self.precision:
            return self
        local = precision.storing(self.size) if precision.store else None
        back = [(self, lambda g: g.into(self.precision))]
        return Tracked(self.value, self.error, back, local=local, precision=precision)

    @property
    def inside(self) -> Tracked:
        """The same numbers, for what must be wide inside; what comes of it goes back `into` their own precision."""
        return self.into(self.precision.inside)


def tracked(x: Any, beside: Tracked | None = None) -> Tracked:
    """A number or an array of exact values, as Tracked.

    A scalar that float32 lacks comes rounded to it; or, beside other numbers, one that their format lacks to that.
    """
    if isinstance(x, Tracked):
        return x
    value, precision = np.asarray(x, dtype=np.float64), FLOAT32 if beside is None else beside.precision
    size = np.abs(value)
    exact = value.ndim > 0 or rounded(value, precision.dtype) == value
    return Tracked(value, 0.0 if exact else np.maximum(U * size, precision.storing(size)), precision=precision)


def joined(parts: Sequence[Tracked], axis: int) -> Tracked:
    """One after another along an axis: no number is computed."""
    edges = np.cumsum([0, *(part.shape[axis] for part in parts)])

    def back(start: int, end: int) -> Backward:
        return lambda g: g[(slice(None),) * axis + (slice(start, end),)]

    value, error = (np.concatenate([getattr(x, name) for x in parts], axis) for name in ("value", "error"))
    return Tracked(value, error, [(x, back(*pair)) for x, pair in zip(parts, pairwise(edges), strict=True)])


def _like(g: Tracked, shape: tuple[int, ...]) -> Tracked:
    """A gradient summed over the axes that its parameter was broadcast along."""
    if g.shape == shape:
        return g
    lead = len(g.shape) - len(shape)
    axes = (*range(lead), *(lead + i for i, n in enumerate(shape) if n == 1 and g.shape[lead + i] != 1))
    return g.sum(axes).reshape(*shape)


# --- Elementary functions: their value, derivative, and how much they change within the argument's error ------------


def exp(x: Tracked) -> Tracked:
    y = np.exp(x.value)
    result = Tracked(y, y * np.expm1(x.error), [(x, lambda g: g * result)], rounding=FUNCTION)
    return result


def log(x: Tracked) -> Tracked:
    return Tracked(np.log(x.value), -np.log1p(-x.error / x.value), [(x, lambda g: g / x)], rounding=FUNCTION)


def sqrt(x: Tracked) -> Tracked:
    y = np.sqrt(x.value)
    below = np.sqrt(np.maximum(x.value - x.error, 0))
    error = np.where(x.error == 0, 0.0, x.error / np.where(y + below == 0, 1, y + below))
    result = Tracked(y, error, [(x, lambda g: g * 0.5 / result)], rounding=U)
    return result


def _smooth(x: Tracked, y: Array, slope: Array, backward: Backward, own: Array | None = None) -> Tracked:
    """f(x) of an f whose second derivative is nowhere above 1: it changes by at most |f'| e + e^2 / 2.

    own: the absolute error of the function itself, 4 ulp if None.
    """
    return Tracked(y, np.abs(slope) * x.error + x.error**2 / 2, [(x, backward)], rounding=FUNCTION, local=own)


def tanh(x: Tracked) -> Tracked:
    y = np.tanh(x.value)
    result = _smooth(x, y, 1 - y * y, lambda g: g * (1 - result * result))
    return result


def erf(x: Tracked) -> Tracked:
    y = np.vectorize(math.erf, otypes=[np.float64])(x.value)
    c = 2 / math.sqrt(math.pi)
    own = ERF + x.precision.storing(np.abs(y) + ERF)
    return _smooth(x, y, c * np.exp(-(x.value**2)), lambda g: g * (exp(-(x * x)) * c), own)


def cos(x: Tracked) -> Tracked:
    return _smooth(x, np.cos(x.value), np.sin(x.value), lambda g: -(g * sin(x)))


def sin(x: Tracked) -> Tracked:
    return _smooth(x, np.sin(x.value), np.cos(x.value), lambda g: g * cos(x))


# --- The chain rule ---------------------------------------------------------------------------------------------------


def gradients(seeds: Sequence[tuple[Tracked, Tracked]], inputs: Mapping[str, Tracked]) -> dict[str, Tracked]:
    """The gradient by each input of sum(dy * y) over the pairs (y, dy) in seeds; zero where nothing depends on it."""
    total: dict[int, Tracked] = {}

    def add(x: Tracked, g: Tracked) -> None:
        total[id(x)] = total[id(x)] + g if id(x) in total else g

    for y, dy in seeds:
        add(y, dy)
    order = _sorted([y for y, _ in seeds])
    wanted = {id(x) for x in inputs.values()}
    for node in order:
        if any(id(parent) in wanted for parent, _ in node.parents):
            wanted.add(id(node))
    for node in reversed(order):
        if id(node) in total:
            for parent, backward in node.parents:
                if id(parent) in wanted:
                    add(parent, backward(total[id(node)]))
    return {name: total.get(id(x), Tracked(np.zeros(x.shape))) for name, x in inputs.items()}


def _sorted(ends: Sequence[Tracked]) -> list[Tracked]:
    """All that the ends were made of, each after its parents."""
    order: list[Tracked] = []
    seen: set[int] = set()
    stack = [(end, False) for end in ends]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack += [(parent, False) for parent, _ in node.parents]
    return order
