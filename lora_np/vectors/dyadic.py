"""The inputs of the vectors: small dyadic numbers k / 2^10, from a name, with integer arithmetic alone.

The bytes are SHAKE-256 of the name, taken two at a time, the low byte first; each pair, modulo the number of values
allowed, gives one k. Where all bits of a float32 are to count, four bytes give a k / 2^23. So they are the same bits on
every machine, exact in float32, and a tensor's numbers depend on its own name only: a case that is added changes no
other.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

from ..backend import Array

UNIT = 2.0**-10
MOST = 2**16  # values that two bytes can give


def integers(name: str, shape: tuple[int, ...], low: int, high: int) -> Array:
    """Integers in low..high, both included, of the given shape. -> int64. A ValueError if these are more than MOST."""
    if high - low >= MOST:
        raise ValueError(f"{name}: expected a range of at most {MOST:,} values, got {low}..{high}: {high - low + 1:,}")
    pairs = np.frombuffer(hashlib.shake_256(name.encode()).digest(2 * math.prod(shape)), dtype="<u2")
    return low + pairs.astype(np.int64).reshape(shape) % (high - low + 1)


def fine(name: str, shape: tuple[int, ...]) -> Array:
    """Multiples of 2^-23 in -1..1, without 1: a factor of fewer bits, TF32 or float16, rounds them. -> float64."""
    words = np.frombuffer(hashlib.shake_256(name.encode()).digest(4 * math.prod(shape)), dtype="<u4")
    return (words.astype(np.int64).reshape(shape) % 2**24 - 2**23) * 2.0**-23


def numbers(name: str, shape: tuple[int, ...], low: float = -1.0, high: float = 1.0, *, unit: float = UNIT) -> Array:
    """Multiples of `unit` in low..high. -> float64."""
    return integers(name, shape, round(low / unit), round(high / unit)) * unit
