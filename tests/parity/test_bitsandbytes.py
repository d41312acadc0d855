"""NF4 beside bitsandbytes' build for the CPU, to the bit.

The mean of the absolute maxima, which double quantisation takes off, it sums in float32, in an order that depends on
the CPU: ours is that mean rounded once. So bits are compared where every order gives the same mean, and with its mean
in the place of ours. Its dequantize_4bit takes wrong scales where rows do not end with a block (version 0.50, AVX-512),
so a matrix is given to it as one row. Its map of 8 bits is torch.linspace's, which without AVX2 has other last bits.
"""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

import lora_np as ln
from lora_np import storage

torch = pytest.importorskip("torch", reason="a peer: the extra peers")
functional = pytest.importorskip("bitsandbytes.functional", reason="a peer: the extra peers")
proves = pytest.mark.proves
without_avx2 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch.linspace has other bits without AVX2"
)
pytestmark = pytest.mark.skipif(ln.backend_name != "numpy", reason="bitsandbytes' arrays are the host's")


@st.composite
def matrices(draw):
    """A matrix, of all sizes, with zeros, and zero; and a size of blocks."""
    shape, rng = (draw(st.integers(1, 9)), draw(st.integers(1, 300))), np.random.default_rng(draw(seeds))
    W = rng.standard_normal(shape) * 10.0 ** draw(st.integers(-6, 3))
    W *= rng.random(shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    return W.astype("float32"), draw(st.sampled_from([32, 64, 128]))


def theirs(W, block, double):
    """bitsandbytes' codes and state, and what it makes of them."""
    W = W if isinstance(W, torch.Tensor) else torch.from_numpy(W)
    packed, state = functional.quantize_4bit(W, blocksize=block, compress_statistics=double, quant_type="nf4")
    row = copy.copy(state)
    row.shape, row.dtype = torch.Size((W.numel(),)), torch.float32
    with torch.compiler.set_stance("force_eager"):
        return packed.numpy().ravel(), state, functional.dequantize_4bit(packed, row).numpy().reshape(W.shape)


def bits(a):
    return np.asarray(a).view("uint32").tolist()


@proves("L11")
@given(matrices())
def test_four_bits_and_their_maxima(case):
    W, block = case
    q = ln.quantise_nf4(W, block=block, double=False)
    codes, state, wide = theirs(W, block, double=False)
    assert q.codes.tolist() == codes.tolist()
    assert bits(q.absmax) == bits(state.absmax.numpy())
    assert bits(ln.dequantise_nf4(q)) == bits(wide)


@proves("L11")
@pytest.mark.parametrize("n_in", [48, 64], ids=["a last block that is not full", "full blocks"])
def test_numbers_next_to_where_the_nearest_level_changes(n_in):
    """There it shows whether a number is divided by its maximum, or multiplied with its reciprocal."""
    rng, ends = np.random.default_rng(0), (storage.LEVELS[1:] + storage.LEVELS[:-1]) / 2
    for _ in range(100):
        W = np.resize(ends, (1, n_in)) * np.float32(rng.uniform(0.5, 2))
        W = np.nextafter(W, rng.choice(np.array([-9, 9], "float32"), n_in))
        W[0, 0] = np.abs(W).max() / np.abs(ends).max()
        assert ln.quantise_nf4(W, double=False).codes.tolist() == theirs(W, 64, double=False)[0].tolist()


@proves("L11")
@given(matrices(), st.sampled_from(["float16", "bfloat16"]))
def test_matrices_of_16_bits(case, dtype):
    W, block = case
    half = torch.from_numpy(W).to(getattr(torch, dtype))
    given = half.numpy() if dtype == "float16" else storage.narrowed(half.float().numpy())
    codes, _, wide = theirs(half, block, double=False)
    q = ln.quantise_nf4(given, block=block, double=False)
    assert q.codes.tolist() == codes.tolist()
    assert bits(ln.dequantise_nf4(q)) == bits(wide)


@without_avx2
@proves("L11")
@given(matrices())
def test_maxima_quantised_again_without_its_mean(case):
    """All but the mean, which is theirs; and what both make of the same bits."""
    W, block = case
    codes, state, wide = theirs(W, block, double=True)
    maxima = ln.quantise_nf4(W, block=block, double=False).absmax
    offset = state.offset.numpy()
    absmax, outer = storage._in_8_bits(maxima - offset)
    assert (absmax.tolist(), bits(outer)) == (state.absmax.tolist(), bits(state.state2.absmax.numpy()))
    q = storage.NF4(W.shape, block, codes, absmax, outer, offset)
    assert bits(ln.dequantise_nf4(q)) == bits(wide)
    spread = len(maxima) * 2.0**-24 * maxima.sum(dtype="float64") / len(maxima)  # of any order of sums
    assert abs(ln.quantise_nf4(W, block=block).offset - float(offset)) <= 1.01 * spread + 1e-45


@without_avx2
@proves("L11")
@given(seeds, st.integers(0, 10), st.integers(1, 8))
def test_double_quantisation_where_the_mean_is_exact(seed, log_blocks, bits_of):
    """As many blocks as a power of two, of maxima that are small whole numbers: no sum of them is rounded."""
    rng, n = np.random.default_rng(seed), 2**log_blocks
    W = rng.uniform(-1, 1, (n, 64)).astype("float32")
    W[:, 0] = rng.integers(1, 2**bits_of + 1, n)
    q = ln.quantise_nf4(W)
    codes, state, wide = theirs(W, 64, double=True)
    assert q.codes.tolist() == codes.tolist()
    assert q.absmax.tolist() == state.absmax.tolist()
    assert bits(q.outer) == bits(state.state2.absmax.numpy())
    assert bits(q.offset) == bits(state.offset.numpy())
    assert bits(ln.dequantise_nf4(q)) == bits(wide)


@without_avx2
@proves("L11")
def test_the_map_of_8_bits():
    assert bits(storage.DYNAMIC) == bits(functional.create_dynamic_map().numpy())


@without_avx2
@proves("L11")
def test_8_bits_at_every_step_between_and_at_each_end():
    """The ends of the table's steps are the numbers whose neighbours are quantised otherwise."""
    step = np.arange(2**16, dtype="float64")
    ends = ((2 * step - 1) / 65535 - 1).astype("float32")
    for toward in (None, -2, 2):
        at = ends if toward is None else np.nextafter(ends, np.float32(toward))
        rows = np.ones((257, 256), "float32")  # the first of each row is its maximum
        rows[:, 1:] = np.clip(np.resize(at, 257 * 255), -1, 1).reshape(257, 255)
        rows *= np.random.default_rng(0).uniform(0.5, 2, (257, 1)).astype("float32")
        codes, outer = storage._in_8_bits(rows.ravel())
        due, state = functional.quantize_blockwise(torch.from_numpy(rows.ravel()), blocksize=256)
        assert (codes.tolist(), bits(outer)) == (due.tolist(), bits(state.absmax.numpy()))
