"""The inputs of the vectors: the same bits on every machine."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_np.vectors.dyadic import integers, numbers


@given(st.text("abc/.0", max_size=20), st.integers(-2000, 2000), st.integers(1, 2000))
def test_integers_are_shake_256_of_the_name(name, low, span):
    """Written out from the bytes, pair by pair."""
    got = integers(name, (2, 3), low, low + span)
    data = hashlib.shake_256(name.encode()).digest(12)
    assert got.ravel().tolist() == [low + (data[i] + 256 * data[i + 1]) % (span + 1) for i in range(0, 12, 2)]
    assert low <= got.min() <= got.max() <= low + span


def test_a_range_that_two_bytes_cannot_give_is_refused():
    """Else most of it would never be drawn."""
    assert integers("a", (2,), -32768, 32767).shape == (2,)
    with pytest.raises(ValueError, match=r"a: expected a range of at most 65,536 values, got -64000..1536: 65,537"):
        integers("a", (2,), -64000, 1536)
    with pytest.raises(ValueError, match="65,536"):
        numbers("a", (2,), -64.0, 64.0)


def test_a_known_answer():
    """So that a change of the generator cannot go unseen: the first two pairs of bytes of one name."""
    first, second = (KNOWN[i] + 256 * KNOWN[i + 1] for i in (0, 2))
    assert (numbers("L2/bias/x", (2,)) * 1024).tolist() == [first % 2049 - 1024, second % 2049 - 1024]


KNOWN = bytes.fromhex("b3c54abb")


@given(st.sampled_from(["a", "b", "c"]), st.sampled_from([2.0**-10, 2.0**-7]))
def test_numbers_are_exact_in_float32(name, unit):
    x = numbers(name, (50,), -12, 12, unit=unit)
    assert (x.astype(np.float32) == x).all()
    assert (x / unit == np.rint(x / unit)).all()
