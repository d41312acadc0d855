"""Which tokens the rows of a state are, and where each stands.

Padding is not computed: a state (N,T,D) is packed to the rows of its true tokens, (M,D). Where one token of each
sequence is read in the end, by a classifier or to go on from, the last layer gives these rows alone, (N,1,D).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .backend import Array, DType, xp
from .batch import Batch
from .model import Config
from .ops import pick, pick_backward, rotary, rotary_angles, rotary_backward
from .threads import row_parts


@dataclass(eq=False)
class Cache:
    """The keys and values of the tokens before, for each layer: (N,G,S,K) with room for `longest` places (T16)."""

    keys: list[Array]
    values: list[Array]
    length: int = 0

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Puts k, v (N,G,T,K) behind those of the layer. -> all of them, two views (N,G,S,K)."""
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


@dataclass(frozen=True, eq=False)
class Layout:
    """The rows of a state.

    They are tokens of N sequences, T places each.

        index      (M,), the place n*T + t of each row: packed, the state is (M,D); None: it is (N,T,D)
        t          (N,), where a sequence's one row stands in it (T = 1); None: as index says
        selected   (N,), which row of the state before it that is; None: the rows are not a selection
        first      the batch's first sequence among those of the whole step, of which it may be a shard
        positions  (T,), (N,T) or (M,), rows of the position table; None with rotary positions
        angles     rotary's cos and sin for each layer, (T,p/2) or (N,1,T,p/2) each; None: no rotary ones
        causal     whether a query sees only the keys up to its own place
        mask       (N,S) bool, the keys that count, those before included; None: all
        cache      the keys and values before, in decoding
    """

    N: int
    T: int
    index: Array | None = None
    t: Array | None = None
    selected: Array | None = None
    first: int = 0
    positions: Array | None = None
    angles: list[tuple[Array, Array]] | None = None
    causal: bool = True
    mask: Array | None = None
    cache: Cache | None = None

    def pack(self, x: Array) -> Array:
        """The rows that are computed. (N,T,D) -> (..., D); of ids (N,T) -> (...)."""
        return x if self.index is None else x.reshape(self.N * self.T, *x.shape[2:])[self.index]

    def unpack(self, x: Array) -> Array:
        """Each row at its place, zeros at padding. (..., D) -> (N,T,D)."""
        if self.index is not None:
            x = pick_backward(x, self.index, (self.N * self.T, x.shape[-1]))  # (M,D) -> (N*T,D)
        return x.reshape(self.N, self.T, -1)

    def heads(self, x: Array, K: int) -> Array:
        """(..., H*K) -> (N,H,T,K), zeros at padding. Its backward is `rows`."""
        return self.unpack(x).reshape(self.N, self.T, -1, K).transpose(0, 2, 1, 3)  # (N,T,H*K) -> (N,H,T,K)

    def rows(self, x: Array) -> Array:
        """(N,H,T,K) -> (..., H*K). Its backward is `heads`."""
        return self.pack(x.transpose(0, 2, 1, 3).reshape(self.N, self.T, -1))  # (N,H,T,K) -> (N,T,H*K)

    def rotate(self, x: Array, i: int) -> Array:
        """T11: layer i's queries (N,H,T,K) or keys (N,G,T,K), turned by their positions, if these are rotary."""
        return x if self.angles is None else rotary(x, *self.angles[i])[0]

    def rotate_backward(self, dx: Array, i: int) -> Array:
        """T11: dx (N,H,T,K) or (N,G,T,K) -> the same."""
        return dx if self.angles is None else rotary_backward(dx, self.angles[i])

    def select(self, x: Array, after: Layout) -> Array:
        """T14: the rows of a state that the next has too. (..., D) -> (..., D), or (N,1,D)."""
        return x if after is self else pick(x, after.selected)[:, None]  # type: ignore[arg-type]

    def select_backward(self, dy: Array, after: Layout) -> Array:
        """T14: zero at the rows that were left out. dy (..., D), or (N,1,D) -> (..., D)."""
        if after is self:
            return dy
        shape = (self.N, self.T) if self.index is None else self.index.shape
        return pick_backward(dy[:, 0], after.selected, (*shape, dy.shape[-1]))  # type: ignore[arg-type]

    def row_of(self, places: Array) -> Array:
        """The row that stands at each place n*T + t. (M,) -> (M,)."""
        return places if self.index is None else xp.searchsorted(self.index, places)

    def part(self, rows: Array | slice) -> Layout:
        """Of some rows (m,) of the state."""
        index = xp.arange(self.N * self.T) if self.index is None else self.index
        return replace(self, index=index[rows], t=None if self.t is None else self.t[rows])

    def row_parts(self) -> list[slice]:
        """Parts of the rows, from their number alone: large enough for products to run at full speed."""
        M = self.N * self.T if self.index is None else len(self.index)
        return list(row_parts(M))

    def sequence_and_place(self) -> tuple[Array, Array]:
        """The sequence of each row in the whole step, and its place there: by these dropout numbers it. -> two (M,)."""
        index = xp.arange(self.N * self.T) if self.index is None else self.index
        return index // self.T + self.first, index % self.T if self.t is None else self.t


def lay_out(
    config: Config, batch: Batch, dtype: DType, *, packed: bool, read: Array | None, cache: Cache | None = None
) -> tuple[Layout, Layout]:
    """The layouts of a batch: of all layers' states, and of what the last layer gives; the same, if that is all rows.

    Positions count true tokens, so that padding on the left changes nothing. dtype: of the angles. packed: whether
    padding is left out. read (N,), on the host: the place of the one token of each sequence that is read in the end;
    None: all. Attention takes its query for the last: if causal, that must be the last true token. cache: what stands
    before; the mask is over its tokens too.
    """
    (N, T), past = batch.tokens.shape, 0 if cache is None else cache.length
    mask = None if batch.mask is None else xp.asarray(batch.mask)
    index = xp.asarray(batch.kept) if packed and mask is not None else None
    at = Layout(N, T, index, first=batch.first, causal=config.causal, mask=mask, cache=cache)
    if mask is None:
        positions = xp.arange(past, past + T)  # (T,)
    else:
        positions = xp.maximum(xp.cumsum(mask, axis=1) - 1, 0)[:, past:]  # (N,T)
    if config.positions == "learned":
        at = replace(at, positions=at.pack(positions) + config.position_offset)
    if config.positions == "rotary":
        of_heads = positions if mask is None else positions[:, None]  # (T,) or (N,1,T)
        at = replace(at, angles=_angles(config, of_heads, dtype))
    if read is None:
        return at, at
    n, t = xp.arange(N), xp.asarray(read)
    of_read, angles = xp.broadcast_to(positions, (N, T))[n, t], None  # (N,)
    if at.angles is not None:
        angles = _angles(config, of_read[:, None, None], dtype)  # (N,1,1,p/2)
    return at, replace(at, T=1, index=None, t=t, selected=at.row_of(n * T + t), positions=None, angles=angles)


def _angles(config: Config, positions: Array, dtype: DType) -> list[tuple[Array, Array]]:
    """T11: each layer's cos and sin: those with a window may have a base of their own, and no factors."""
    usual = rotary_angles(positions, config.turned, config.rope_theta, dtype, config.rope_factors)
    windowed = usual
    if config.window_theta is not None:
        windowed = rotary_angles(positions, config.turned, config.window_theta, dtype)
    return [usual if config.window_of(i) is None else windowed for i in range(config.n_layer)]
