"""The dtypes that files keep weights in: one rounding to them from float64, and how far apart two numbers are."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...backend import Array
from .safetensors_file import import_bfloat16

NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of a safetensors one."""
    if name == "BF16":
        import_bfloat16()
    return np.dtype(NAMES[name])


def rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    """float64 in another dtype, rounded once, to the nearest, ties to even; what is too large becomes infinite.

    ml_dtypes goes to bfloat16 by way of float32, which rounds twice. So float32 is rounded to odd first (Boldo and
    Melquiond 2008): of the two float32 around an inexact value, the one whose last bit is 1 keeps, in the 16 bits that
    bfloat16 lacks, on which side of a tie the value lies.
    """
    with np.errstate(over="ignore", under="ignore"):
        if dtype.name != "bfloat16":
            return values.astype(dtype, copy=False)
        near = values.astype(np.float32)
        even = (near.view(np.uint32) & 1) == 0
        side = np.where(values > near, np.inf, -np.inf).astype(np.float32)
        return np.where(even & (near != values), np.nextafter(near, side), near).astype(dtype)


def ulps_apart(one: Array, other: Array) -> Array:
    """How many steps of their dtype lie between finite numbers, element by element; 0 and -0 are one. -> uint64."""
    a, b = _order(one), _order(other)
    return np.maximum(a, b).view(np.uint64) - np.minimum(a, b).view(np.uint64)


def _order(values: Array) -> Array:
    """Integers that count as the numbers do: a float's bits, those of a negative one counted downwards."""
    bits = values.view(f"i{values.itemsize}").astype(np.int64)
    lowest = -(1 << (8 * values.itemsize - 1))
    return np.where(bits < 0, lowest - bits, bits)
