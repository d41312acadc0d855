"""Matrices held in fewer bits: what they hold, how they are read, and that nobody writes to them."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import device, same_bits, seeds, whole_numbers

from lora_np.backend import asnumpy, backend_name, xp
from lora_np.storage import narrowed, widened

proves = pytest.mark.proves
small = st.integers(1, 5)


def upper_halves(W):
    """Of float32 numbers, by their bytes: what bfloat16 is. -> uint16, on the host."""
    return asnumpy(W).astype("<f4").view("<u2").reshape(*W.shape, 2)[..., 1].astype("uint16")


@given(seeds, small, small)
def test_bfloat16_is_the_upper_halves_of_the_numbers(seed, n_out, n_in):
    """Small whole numbers are numbers of bfloat16."""
    W = whole_numbers(np.random.default_rng(seed), n_out, n_in, dtype="float32")
    narrow = narrowed(W)
    assert asnumpy(narrow.halves).tolist() == upper_halves(W).tolist()
    assert same_bits(widened(narrow), W)
    assert widened(W) is W


@proves("T2")
@pytest.mark.parametrize(
    "number", [np.float32(1 + 2**-8), np.float32(0.1), np.float32(2.0**-149), np.float64(1), np.int32(2**16)]
)
def test_what_bfloat16_would_round_is_refused(number):
    with pytest.raises(ValueError, match=f"expected float32 numbers that bfloat16 holds, got others .{number.dtype}"):
        narrowed(device([[number, number]], number.dtype))


# --- Of every kind ---------------------------------------------------------------------------------------------------


def kinds():
    """A matrix (6, 64) of each kind."""
    W = np.random.default_rng(0).integers(-8, 9, (6, 64)).astype("float32")
    return [narrowed(device(W))]


@pytest.mark.parametrize("W", kinds(), ids=lambda W: W.name)
def test_a_held_matrix_is_read_as_its_array_is(W):
    array, rows = W[:], device([[5, 0], [2, 2]])
    assert isinstance(array, xp.ndarray)
    assert (W.shape, W.ndim, W.size, len(W), W.dtype) == (array.shape, array.ndim, array.size, len(array), array.dtype)
    for part in (slice(1, 4), slice(0, 0), slice(5, None), rows):
        assert same_bits(W[part], array[part])


@pytest.mark.parametrize("W", kinds(), ids=lambda W: W.name)
def test_a_held_matrix_is_read_only_and_so_are_its_copies(W):
    for one in (W, copy.copy(W), copy.deepcopy(W), pickle.loads(pickle.dumps(W))):
        assert same_bits(one, W)
        if backend_name == "numpy":
            assert not any(part.flags.writeable for part in vars(one).values() if isinstance(part, np.ndarray))


@pytest.mark.parametrize("W", kinds(), ids=lambda W: W.name)
def test_a_held_matrix_is_not_taken_for_an_array(W):
    with pytest.raises(TypeError, match=f"a matrix that is held in {W.name} is no array"):
        np.asarray(W)
    with pytest.raises(TypeError, match=r"(?i)unsupported (operand|type)"):
        xp.zeros((2, 64), "float32") @ W
