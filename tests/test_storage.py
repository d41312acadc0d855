"""Matrices held in fewer bits: what they hold, how they are read, and that nobody writes to them."""

import copy
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import device, same_bits, seeds, whole_numbers

from lora_np.backend import asnumpy, backend_name, xp
from lora_np.storage import LEVELS, Q4_0, Q4_1, Q8_0, dequantise_nf4, narrowed, quantise_nf4, widened

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


# --- L11: four bits --------------------------------------------------------------------------------------------------

# Half the largest gap between two neighbours: of NF4's numbers, and of the 8 bits' (their last two, below 0 none is 1).
HALF_GAP, HALF_GAP_8 = (1 - 0.6961928009986877) / 2, 0.9 / 128
U = 2.0**-24


@st.composite
def matrices(draw):
    """A matrix and a size of blocks, which may go on over the ends of rows: of all sizes, with zeros, and zero."""
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 150) | st.just(1500)))
    rng = np.random.default_rng(draw(seeds))
    W = rng.standard_normal(shape) * 10.0 ** draw(st.integers(-6, 3))
    W *= rng.random(shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    return W.astype(draw(st.sampled_from(["float16", "float32"]))), draw(st.sampled_from([32, 64, 128]))


def scales(W, block):
    """The absolute maximum of each number's block, by a loop."""
    numbers, found = np.abs(W.ravel().astype("float64")), np.empty(W.size)
    for start in range(0, W.size, block):
        found[start : start + block] = numbers[start : start + block].max()
    return found.reshape(W.shape)


@proves("L11")
@given(matrices())
def test_each_number_becomes_the_nearest_of_sixteen_times_the_maximum_of_its_block(case):
    """Within the roundings of 1 / absmax and of the product with it, which may choose the other of two neighbours; and
    that of the result."""
    W, block = case
    got = asnumpy(dequantise_nf4(quantise_nf4(device(W), block=block, double=False))).astype("float64")
    size = scales(W, block)
    nearest = np.abs(W.astype("float64")[..., None] - size[..., None] * LEVELS).min(axis=-1)
    assert got.shape == W.shape
    assert (np.abs(got - W) <= nearest + 4 * U * size + 1e-38).all()
    assert (np.abs(got - W) <= (HALF_GAP + 4 * U) * size + 1e-38).all()


@proves("L11")
@given(matrices())
def test_the_maxima_in_8_bits_err_by_half_a_gap_of_their_spread_at_most(case):
    """|W' - W| <= |level| |absmax' - absmax| + half a gap of absmax; the maxima are rounded to steps of 2^-15 first."""
    W, block = case
    once, twice = (quantise_nf4(device(W), block=block, double=double) for double in (False, True))
    assert same_bits(once.codes, twice.codes)
    size, first = scales(W, block), scales(W, block).ravel()[::block]
    spread = scales(first - first.mean(), 256).repeat(block)[: W.size].reshape(W.shape)
    off = (HALF_GAP_8 + 2.0**-16) * spread + 8 * U * first.max() + 1e-38
    got = asnumpy(twice[:]).astype("float64")
    assert (np.abs(got - W) <= (HALF_GAP + 4 * U) * size + off).all()
    assert twice.absmax.dtype == "uint8"
    assert abs(float(twice.offset) - first.mean()) <= 2 * U * first.mean() + 1e-38


@proves("L11")
@given(matrices())
def test_what_is_dequantised_is_quantised_to_the_same_bits(case):
    W, block = case
    q = quantise_nf4(device(W), block=block, double=False)
    again = quantise_nf4(dequantise_nf4(q), block=block, double=False)
    assert same_bits(again, q)


@proves("L11")
@given(matrices(), seeds)
def test_rows_are_read_wherever_blocks_end(case, seed):
    W, block = case
    q, rng = quantise_nf4(device(W), block=block), np.random.default_rng(seed)
    start, stop = sorted(rng.integers(0, len(W) + 1, 2))
    some = device(rng.integers(0, len(W), (2, 3)))
    for rows in (slice(start, stop), some):
        assert same_bits(q[rows], q[:][rows])


@proves("L11")
def test_the_bits_of_a_matrix_by_hand():
    """Blocks of 32: 1 to 16 and -1 to -16 over 16, then zeros. A level is 2^4 times it, rounded by no one."""
    W = np.zeros((2, 32), "float32")
    W[0] = np.concatenate([np.arange(1, 17), -np.arange(1, 17)])
    q = quantise_nf4(device(W), block=32, double=False)
    indices = [int(np.abs(LEVELS.astype("float64") - w / 16).argmin()) for w in W[0]]
    assert (
        asnumpy(q.codes).tolist() == [16 * a + b for a, b in zip(indices[::2], indices[1::2], strict=True)] + [119] * 16
    )
    assert asnumpy(q.absmax).tolist() == [16.0, 0.0]
    assert asnumpy(q[:]).tolist() == [[16 * float(LEVELS[i]) for i in indices], [0.0] * 32]
    assert (q.nbytes, quantise_nf4(device(W), block=32).nbytes) == (32 + 8, 32 + 2 + 4 + 4)


@proves("L11")
def test_of_two_nearest_numbers_it_is_the_lower():
    """The middles of neighbours, as float32 has them, in a block whose maximum is 1."""
    W = np.zeros((1, 64), "float32")
    W[0, :15], W[0, 15] = (LEVELS[1:] + LEVELS[:-1]) / np.float32(2), 1
    got = asnumpy(quantise_nf4(device(W), double=False)[:])
    assert got[0, :16].tolist() == LEVELS.tolist()


@proves("L11")
def test_a_bit_more_than_four_is_held_of_each_number():
    """QLoRA, section 3: 8 / 64 + 32 / (64 256) bits for the maxima, and the offset."""
    W = xp.ones((256, 64 * 256), "float32")
    assert quantise_nf4(W).nbytes * 8 == W.size * (4 + 8 / 64 + 32 / (64 * 256)) + 32


@proves("L11")
@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"W": np.ones((2, 2))}, TypeError, "W: expected float32 or float16, got float64"),
        ({"W": np.ones(2, "float32")}, ValueError, r"W: expected a matrix \(out, in\) .*, got shape \(2,\)"),
        ({"W": np.full((2, 2), np.nan, "float32")}, ValueError, r"W: .* of finite numbers, got shape \(2, 2\)"),
        ({"W": np.ones((0, 2), "float32")}, ValueError, r"W: .* of finite numbers, got shape \(0, 2\)"),
        ({"W": [[1], [1, 2]]}, TypeError, "W: expected an array of numbers, got rows of different lengths"),
        ({"block": 48}, ValueError, "block: expected one of 32 64 .* 4096, got 48"),
        ({"double": 1}, TypeError, "double: expected True or False, got int"),
    ],
)  # fmt: skip
def test_what_is_not_quantised(how, error, message):
    with pytest.raises(error, match=f"quantise_nf4: {message}"):
        quantise_nf4(**{"W": np.ones((2, 2), "float32"), **how})


@proves("L11")
def test_what_is_not_dequantised():
    with pytest.raises(
        TypeError, match="dequantise_nf4: q: expected a matrix in NF4, as quantise_nf4 gives it, got BFl"
    ):
        dequantise_nf4(narrowed(xp.ones((2, 2), "float32")))


# --- GGUF's blocks ---------------------------------------------------------------------------------------------------


SIZES = {Q8_0: 34, Q4_0: 18, Q4_1: 20}  # bytes of a block


def blocks_of_32(rng, n_out, n_blocks, size):
    """Random rows of blocks of so many bytes: a float16, which is small, and what stands behind it."""
    raw = rng.integers(0, 256, (n_out, n_blocks, size), dtype=np.uint8)
    numbers = rng.uniform(-2, 2, (n_out, n_blocks, 2)).astype("<f2").view(np.uint8)
    raw[..., : 4 if size == 20 else 2] = numbers[..., : 4 if size == 20 else 2]
    return device(raw.reshape(n_out, -1))


@given(seeds, small, small)
def test_gguf_blocks_are_a_scale_times_whole_numbers(seed, n_out, n_blocks):
    """As the format says it, number by number: 32 bytes with a sign; or halves of 16 bytes less 8, all lower first."""
    rng = np.random.default_rng(seed)
    for kind, size in SIZES.items():
        raw = blocks_of_32(rng, n_out, n_blocks, size)
        W = np.empty((n_out, n_blocks, 32))
        for o, b in np.ndindex(n_out, n_blocks):
            block = asnumpy(raw)[o].reshape(n_blocks, size)[b].tobytes()
            d = struct.unpack("<e", block[:2])[0]
            low, high = [byte & 15 for byte in block[-16:]], [byte >> 4 for byte in block[-16:]]
            if kind is Q4_1:  # two roundings: of the product, and of the sum
                m = np.float32(struct.unpack("<e", block[2:4])[0])
                W[o, b] = [np.float32(d) * np.float32(n) + m for n in low + high]
                continue
            q = struct.unpack("32b", block[2:]) if kind is Q8_0 else [half - 8 for half in low + high]
            W[o, b] = [d * n for n in q]
        assert same_bits(kind((n_out, 32 * n_blocks), raw)[:], device(W.reshape(n_out, -1), "float32"))


# --- Of every kind ---------------------------------------------------------------------------------------------------


def kinds():
    """A matrix (6, 64) of each kind."""
    rng = np.random.default_rng(0)
    W = device(rng.integers(-8, 9, (6, 64)), "float32")
    blocks = [kind((6, 64), blocks_of_32(rng, 6, 2, size)) for kind, size in SIZES.items()]
    return [narrowed(W), quantise_nf4(W), quantise_nf4(W, double=False), *blocks]


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
