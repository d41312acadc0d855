"""P1: how implementations round, in float32 and in other precisions.

Sums are in float32, and results are rounded once, as they are stored. Tensor cores, which sum some products and what
came before at once, align the significands to the largest, cut off what is right of its last bit, and truncate as they
normalise (Fasi, Higham, Mikaitis and Pranesh, Numerical behavior of NVIDIA tensor cores, 2021). With 24 bits each
number but the largest loses less than 2^-23 of the largest, and so does each partial sum: k + 1 such losses for k
products, and k is 4 at least. An ordinary sum in float32 loses less.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..backend import Array

U = 2.0**-24  # half the distance from 1 to the next float32
TRUNCATED = 2.0**-23 * 5 / 4
FORMATS = {  # bits of a significand, the leading one with them; the smallest number above 0
    "float64": (53, 2.0**-1074), "float32": (24, 2.0**-149), "float16": (11, 2.0**-24), "bfloat16": (8, 2.0**-133),
}  # fmt: skip


def rounded(x: Array, dtype: str) -> Array:
    """x to the nearest number of that dtype, ties to even; none is too large for it."""
    bits, smallest = FORMATS[dtype]
    _, exponent = np.frexp(x)
    unit = np.maximum(np.ldexp(1.0, exponent - bits), smallest)
    return np.rint(x / unit) * unit


def gamma(n: int, u: float = U) -> float:
    """What n roundings come to, relative to the number, or to the sum of the sizes of what is summed."""
    return n * u / (1 - n * u)


class Precision(NamedTuple):
    """P1: what there is beside the roundings of float32, which every operation has.

    dtype   what results are stored in
    factor  the most by which each factor of a product of matrices is rounded before it, relative to its size
    term    what each term of such a product costs in its sum, relative to the sum of all their sizes
    """

    name: str
    dtype: str = "float32"
    factor: float = 0.0
    term: float = TRUNCATED

    @property
    def inside(self) -> Precision:
        """That of what must be wide inside: float32 where results are stored in less."""
        return self if self.dtype == "float32" else FLOAT32

    @property
    def store(self) -> float:
        """The most by which storing changes a result, relative to its size; 0 in float32, where U is counted."""
        return 0.0 if self.dtype == "float32" else 2.0 ** -FORMATS[self.dtype][0]

    def storing(self, size: Array) -> Array:
        """The most by which storing changes numbers of this size. They may underflow, but 0 stays 0."""
        if self.dtype == "float32":
            return np.zeros(np.shape(size))
        return np.minimum(np.maximum(self.store * size, FORMATS[self.dtype][1] / 2), size)

    def product(self, n: int) -> float:
        """What the sum of n products costs, both factors rounded before, relative to the sum of their sizes."""
        return 2 * self.factor + self.factor**2 + gamma(n, self.term)


FLOAT32 = Precision("float32", term=U)
PRECISIONS = {
    one.name: one
    for one in (
        FLOAT32, Precision("tf32", factor=2.0**-11), Precision("bfloat16", "bfloat16"),
        Precision("float16", "float16"),
    )
}  # fmt: skip
