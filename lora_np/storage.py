"""How a frozen matrix is held in fewer bits. It is read as an array is, W[rows], and gives float32 numbers.

Nothing is kept of what is read, so a product widens a matrix a block of rows at a time: `wide_blocks`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias

import numpy as np

from .backend import FEW_ROWS, Array, blocks, read_only, xp
from .checks import as_array, expect


@dataclass(frozen=True, eq=False)
class Held(ABC):
    """A matrix of float32 numbers that is held in fewer bits. Its arrays are read-only.

    shape: (out, in)
    """

    shape: tuple[int, int]
    name: ClassVar[str]
    ndim: ClassVar[int] = 2
    dtype: ClassVar[np.dtype[Any]] = np.dtype("float32")
    __array_ufunc__ = None  # an array times this is a TypeError

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, read_only(value) if isinstance(value, xp.ndarray) else value)

    @abstractmethod
    def __getitem__(self, rows: slice | Array) -> Array:
        """The rows of a slice, float32 (m, in); or those of numbers (...), float32 (..., in)."""

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, *_: Any, **__: Any) -> Array:
        raise TypeError(f"a matrix that is held in {self.name} is no array: its rows are W[rows], all of them W[:]")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # a copy is read-only too

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that it is held in."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, xp.ndarray))


Matrix: TypeAlias = Array | Held


def widened(W: Matrix) -> Array:
    """A held matrix as float32; an array as it is."""
    return W[:] if isinstance(W, Held) else W


def wide_blocks(W: Held, M: int) -> Iterator[slice]:
    """Rows of W (out, in) that are widened together, for a product with M rows: enough of them for it to run at full
    speed; with few rows, which take as long as reading W, so many as stay in cache."""
    return blocks(len(W), W.shape[1] // (16 if M > FEW_ROWS else 4))


def as_matrix(what: str, W: Any) -> Any:
    """A held matrix as it is, anything else as an array; a TypeError names what is none."""
    return W if isinstance(W, Held) else as_array(what, W)


# --- bfloat16 --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BFloat16(Held):
    """A matrix in bfloat16: the upper halves of its float32 numbers, uint16 (out, in). The same numbers."""

    halves: Array
    name = "bfloat16"

    def __getitem__(self, rows: slice | Array) -> Array:
        bits = self.halves[rows].astype(xp.uint32)
        bits <<= 16
        return bits.view(xp.float32)


def narrowed(W: Array) -> BFloat16:
    """float32 numbers (out, in) that bfloat16 holds, held so. A ValueError if one would be rounded."""
    halves = xp.empty_like(W, dtype=xp.uint16)
    for rows in blocks(*W.shape):
        halves[rows] = upper_halves(W[rows])
    return BFloat16(W.shape, halves)


def upper_halves(W: Array) -> Array:
    """What `BFloat16` holds of some rows, on the host or on the device: uint16, of their shape."""
    bits = W.view(xp.uint32) if W.dtype == xp.float32 else None
    if bits is None or (bits & 0xFFFF).any():
        raise ValueError(f"expected float32 numbers that bfloat16 holds, got others ({W.dtype})")
    return (bits >> 16).astype(xp.uint16)


# --- L11: four bits --------------------------------------------------------------------------------------------------

# NF4's sixteen numbers: quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, appendix E).
LEVELS = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # sizes of a block, as bitsandbytes has them
OUTER = 256  # absolute maxima that are quantised together
TINY = 1e-38  # the least absolute maximum, where one is divided by


def _dynamic_map() -> Array:
    """The 256 numbers of bitsandbytes' 8 bits, in order (Dettmers 2016, dynamic tree quantisation).

    0 and 1; and for i = 0..6 the middles of 2^i equal parts of [0.1, 1], times 10^(i-6), with both signs. The ends of
    the parts as torch.linspace has them in float32: counted from the nearer end, with one rounding.
    """
    numbers, tenth, one = [0.0, 1.0], np.float32(0.1), np.float32(1)
    for i in range(7):
        n = 2**i
        k, step = np.arange(n + 1), float((one - tenth) / np.float32(n))
        ends = np.where(k < (n + 1) // 2, float(tenth) + step * k, 1 - step * (n - k)).astype(np.float32)
        middles = (ends[:-1] + ends[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        numbers += [*middles, *-middles]
    return np.sort(np.array(numbers, np.float32))


def _between(numbers: Array) -> Array:
    """Where the nearest of two neighbours changes."""
    return (numbers[1:] + numbers[:-1]) / 2


DYNAMIC = _dynamic_map()
_DYNAMIC, _LEVELS = xp.asarray(DYNAMIC), xp.asarray(LEVELS)
_DYNAMIC_ENDS, _LEVEL_ENDS = xp.asarray(_between(DYNAMIC.astype(np.float64))), _between(LEVELS).tolist()
_PAIRS = xp.asarray(np.stack([LEVELS.repeat(16), np.tile(LEVELS, 16)], axis=1)).view(xp.uint64)[:, 0]  # of each byte


@dataclass(frozen=True, eq=False)
class NF4(Held):
    """L11: a matrix in four bits. Row by row, each `block` numbers have an absolute maximum, which scales LEVELS.

    codes    uint8 (out in / 2): indices of LEVELS, two to a byte, the first in its upper half
    absmax   float32 (out in / block); or quantised again, uint8: indices of the dynamic map
    outer    then: float32 (out in / block / 256), absolute maxima of what is left without the offset
    offset   then: float32 (), the mean of the absolute maxima
    """

    block: int
    codes: Array
    absmax: Array
    outer: Array | None = None
    offset: Array | None = None
    name = "NF4"

    def __getitem__(self, rows: slice | Array) -> Array:
        n_out, n_in = self.shape
        row = xp.arange(n_out)[rows][..., None]
        if n_in % self.block:  # blocks go on over the ends of rows
            at = row * n_in + xp.arange(n_in)  # (..., in)
            codes = self.codes[at >> 1] >> xp.where(at & 1, 0, 4).astype(xp.uint8) & 15
            return _LEVELS[codes] * self._scales(at // self.block)
        codes = self.codes.reshape(n_out, -1)[rows]  # (..., in / 2)
        n = n_in // self.block
        scales = self._scales(row * n + xp.arange(n))  # (..., in / block)
        W = _PAIRS.take(codes).view(xp.float32).reshape(*scales.shape, self.block)
        W *= scales[..., None]
        return W.reshape(*scales.shape[:-1], n_in)

    def _scales(self, at: Array) -> Array:
        """The absolute maxima of blocks."""
        if self.outer is None:
            return self.absmax.take(at)
        return _DYNAMIC.take(self.absmax.take(at)) * self.outer.take(at // OUTER) + self.offset


def quantise_nf4(W: Any, *, block: int = 64, double: bool = True) -> NF4:
    """L11 (QLoRA, section 3): a matrix in NF4, to the bits of bitsandbytes' `quantize_4bit`.

    W (out, in), float32 or float16, or held in fewer bits. Each number becomes the nearest of LEVELS times the absolute
    maximum of its block, of W's numbers row by row. double: these maxima are quantised again, in 8 bits, in blocks of
    256, without their mean; it is rounded once here, and summed in float32 there. A TypeError or ValueError if W is
    none of these, or has NaN or infinite numbers, or bitsandbytes no blocks of that size.
    """
    W = widened(as_matrix("quantise_nf4: W", W))
    if W.dtype not in (xp.float32, xp.float16):
        raise TypeError(f"quantise_nf4: W: expected float32 or float16, got {W.dtype}")
    if W.ndim != 2 or not W.size or not all(bool(xp.isfinite(W[rows]).all()) for rows in blocks(*W.shape)):
        raise ValueError(f"quantise_nf4: W: expected a matrix (out, in) of finite numbers, got shape {W.shape}")
    if block not in BLOCKS:
        raise ValueError(f"quantise_nf4: block: expected one of {' '.join(map(str, BLOCKS))}, got {block!r}")
    expect("quantise_nf4: double", double, bool, "True or False")
    numbers = W.reshape(-1)
    full, rest = divmod(numbers.size, block)
    absmax = xp.empty(full + (rest > 0), xp.float32)
    codes = xp.empty(-(-numbers.size // 2), xp.uint8)
    for part in blocks(full, block):
        of = slice(part.start * block, part.stop * block)
        A = numbers[of].astype(xp.float32).reshape(-1, block)
        absmax[part] = abs(A).max(axis=1)
        scaled = A * (1 / xp.maximum(absmax[part], xp.float32(TINY)))[:, None]
        codes[of.start // 2 : of.stop // 2] = _packed(_nearest_level(scaled.reshape(-1)))
    if rest:  # a last block that is not full: there, bitsandbytes divides
        A = numbers[full * block :].astype(xp.float32)
        absmax[full] = xp.maximum(abs(A).max(), xp.float32(TINY))
        codes[full * block // 2 :] = _packed(_nearest_level(A / absmax[full]))
    if not double:
        return NF4(W.shape, block, codes, absmax)
    offset = xp.asarray(absmax.mean(dtype=xp.float64), dtype=xp.float32)
    return NF4(W.shape, block, codes, *_in_8_bits(absmax - offset), offset)


def _packed(codes: Array) -> Array:
    """Two to a byte, the first in its upper half; an odd last one with a zero's."""
    even = codes if codes.size % 2 == 0 else xp.concatenate([codes, xp.full(1, 7, xp.uint8)])
    return even[::2] << 4 | even[1::2]


def _nearest_level(scaled: Array) -> Array:
    """The index of the nearest of LEVELS, the lower of two: how many ends lie below. -> uint8"""
    codes = xp.zeros(scaled.shape, xp.uint8)
    for end in _LEVEL_ENDS:
        codes += scaled > end
    return codes


def _in_8_bits(a: Array) -> tuple[Array, Array]:
    """float32 (n,) in bitsandbytes' 8 bits: indices of the dynamic map, uint8 (n,), and each 256's absolute maximum.

    Its CPU build rounds to 2^16 - 1 steps from -1 to 1 first, whose nearest it has in a table.
    """
    rows = xp.zeros((-(-a.size // OUTER), OUTER), xp.float32)
    rows.reshape(-1)[: a.size] = a
    outer = abs(rows).max(axis=1)
    is_zero = outer <= 2.0**-128  # or next to it: it has no finite reciprocal
    scaled = rows * (1 / xp.where(is_zero, xp.float32(1), outer))[:, None]
    step = ((scaled + 1) * xp.float32(0.5) * xp.float32(65535) + xp.float32(0.5)).astype(xp.int32)  # towards 0
    codes = xp.searchsorted(_DYNAMIC_ENDS, step.reshape(-1) * (2 / 65535) - 1).astype(xp.uint8)
    codes.reshape(rows.shape)[is_zero] = 0
    return codes[: a.size], outer


def dequantise_nf4(q: NF4) -> Array:
    """L11: the matrix that `quantise_nf4` gave, or `NF4` holds: float32 (out, in), the bits of bitsandbytes'
    `dequantize_4bit`."""
    expect("dequantise_nf4: q", q, NF4, "a matrix in NF4, as quantise_nf4 gives it")
    return q[:]


# --- GGUF's blocks of 32 ---------------------------------------------------------------------------------------------
#
# A row is blocks of 32 numbers d q: a float16 d, and whole numbers q. Held as a file has them, uint8 (out, bytes).


def _blocks_of_32(raw: Array, size: int, floats: int = 1) -> tuple[Array, Array]:
    """Of rows (..., bytes) in blocks of `size` bytes: the float16 numbers that each starts with, as float32
    (..., blocks, floats); the bytes behind them."""
    shape = *raw.shape[:-1], raw.shape[-1] // size
    numbers = raw.view(xp.float16).reshape(*shape, size // 2)[..., :floats].astype(xp.float32)
    return numbers, raw.reshape(*shape, size)[..., 2 * floats :]


@dataclass(frozen=True, eq=False)
class Q8_0(Held):
    """A matrix in GGUF's Q8_0: q in one byte, -128..127."""

    raw: Array
    name = "Q8_0"

    def __getitem__(self, rows: slice | Array) -> Array:
        d, q = _blocks_of_32(self.raw[rows], 34)
        W = q.view(xp.int8).astype(xp.float32)
        W *= d
        return W.reshape(*W.shape[:-2], self.shape[1])


@dataclass(frozen=True, eq=False)
class Q4_0(Held):
    """A matrix in GGUF's Q4_0: q + 8 in four bits, 16 numbers in the lower halves of 16 bytes, then 16 in the upper."""

    raw: Array
    name = "Q4_0"

    def __getitem__(self, rows: slice | Array) -> Array:
        d, q = _blocks_of_32(self.raw[rows], 18)
        W = (_halves(q).view(xp.int8) - xp.int8(8)).astype(xp.float32)
        W *= d
        return W.reshape(*W.shape[:-2], self.shape[1])


@dataclass(frozen=True, eq=False)
class Q4_1(Held):
    """A matrix in GGUF's Q4_1: d q + m, with a float16 m behind d; q in four bits, in Q4_0's order."""

    raw: Array
    name = "Q4_1"

    def __getitem__(self, rows: slice | Array) -> Array:
        d_m, q = _blocks_of_32(self.raw[rows], 20, floats=2)
        W = _halves(q).astype(xp.float32)
        W *= d_m[..., :1]
        W += d_m[..., 1:]
        return W.reshape(*W.shape[:-2], self.shape[1])


def _halves(q: Array) -> Array:
    """The lower halves of bytes (..., 16), then the upper. -> uint8 (..., 32)"""
    q = xp.ascontiguousarray(q)
    halves = [half.view(xp.complex128) for half in (q & 15, q >> 4)]  # so that 16 bytes are copied at once
    return xp.concatenate(halves, axis=-1).view(xp.uint8)
