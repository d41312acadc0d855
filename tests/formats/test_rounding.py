"""One rounding from float64 to what files keep weights in, against exact arithmetic; and steps between numbers."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_np.formats.files.rounding import NAMES, numpy_dtype, rounded, ulps_apart

# Bits of precision, the exponent of the smallest number, the largest number.
FORMATS = {
    "F16": (11, -24, 65504.0),
    "BF16": (8, -133, (2 - 2.0**-7) * 2.0**127),
    "F32": (24, -149, (2 - 2.0**-23) * 2.0**127),
}


def nearest(x, name):
    """The number of the format that is nearest to a float, to even on a tie, by exact arithmetic."""
    precision, smallest, largest = FORMATS[name]
    quantum = Fraction(2) ** max(math.frexp(x)[1] - precision, smallest)
    value = round(Fraction(x) / quantum) * quantum  # Python rounds a Fraction to even
    return math.copysign(math.inf if abs(value) > largest else float(value), x)


def dtype_of(name):
    if name == "BF16":
        pytest.importorskip("ml_dtypes", reason="reads bfloat16: the extra models")
    return numpy_dtype(name)


@st.composite
def near_ties(draw, name):
    """Halfway between two numbers of a format, or just beside: by so little that only float64 can tell."""
    precision, smallest, _ = FORMATS[name]
    quantum = draw(st.integers(smallest, 127 - precision if name != "F16" else 5))
    m = draw(st.integers(1, 2**precision - 1)) + 0.5
    beside = draw(st.sampled_from([0.0, 2.0**-20, -(2.0**-20), 2.0**-27, -(2.0**-27)]))
    return draw(st.sampled_from([1, -1])) * math.ldexp(m + beside, quantum)


@pytest.mark.proves("L5")
@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_rounding_is_to_the_nearest_and_once(name, data):
    dtype = dtype_of(name)
    number = near_ties(name) | st.floats(allow_nan=False, allow_infinity=False)
    values = data.draw(st.lists(number, min_size=1, max_size=20))
    got = rounded(np.array(values), dtype)
    assert got.dtype == dtype
    assert got.astype(float).tolist() == [nearest(x, name) for x in values]


def test_a_cast_to_bfloat16_would_round_twice():
    """Why `rounded` does not cast: 1 + 2^-8 is a tie, and float32 does not see that this is more."""
    dtype = dtype_of("BF16")
    value = np.array([1 + 2.0**-8 + 2.0**-40])
    assert value.astype(dtype).astype(float) == 1.0
    assert rounded(value, dtype).astype(float) == 1 + 2.0**-7


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_ulps_count_the_numbers_between(name, data):
    """By way of nextafter, n times; over zero too, where 0 and -0 are one number."""
    dtype = dtype_of(name)
    size = {2: "uint16", 4: "uint32", 8: "uint64"}[dtype.itemsize]
    first = np.array([data.draw(st.integers(0, 40)) | data.draw(st.sampled_from([0, 1])) << (8 * dtype.itemsize - 1)])
    one = first.astype(size).view(dtype)
    steps = data.draw(st.integers(0, 60))
    other = one
    for _ in range(steps):
        other = np.nextafter(other, np.array([np.inf]).astype(dtype))
    assert ulps_apart(one, other).tolist() == [steps]
    assert ulps_apart(other, one).tolist() == [steps]
    assert ulps_apart(-one, -other).tolist() == [steps]
