"""Which tokens the rows of a state are: no layer computes padding, and the last one only what is read of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .backend import Array, xp
from .ops import pick, pick_backward


@dataclass(frozen=True, eq=False)
class Places:
    """The rows of a state.

    They are tokens of N texts, T places each.

        index  (M,), the place n*T + t of each row, and the state is (M,D); None: all places in order, and it is (N,T,D)
        t      (M,), where each row stands in its own text, by which dropout numbers it; None: as index says
    """

    N: int
    T: int
    index: Array | None = None
    t: Array | None = None

    def texts_and_places(self) -> tuple[Array, Array]:
        """The text of each row, and its place in it. -> two (M,)."""
        index = xp.arange(self.N * self.T) if self.index is None else self.index
        return index // self.T, index % self.T if self.t is None else self.t

    def spread(self, x: Array) -> Array:
        """Each row at its place, zeros at the others. (..., D) -> (N,T,D)."""
        if self.index is not None:
            x = pick_backward(x, self.index, (self.N * self.T, x.shape[-1]))  # (M,D) -> (N*T,D)
        return x.reshape(self.N, self.T, -1)

    def gather(self, x: Array) -> Array:
        """The rows that stand at our places. (N,T,D) -> (..., D)."""
        return x if self.index is None else pick(x, self.index)

    def split_heads(self, x: Array, H: int) -> Array:
        """(..., H*K) -> (N,H,T,K), zeros where there is no row."""
        return self.spread(x).reshape(self.N, self.T, H, -1).transpose(0, 2, 1, 3)  # (N,T,H*K) -> (N,H,T,K)

    def merge_heads(self, x: Array) -> Array:
        """(N,H,T,K) -> (..., H*K)."""
        return self.gather(x.transpose(0, 2, 1, 3).reshape(self.N, self.T, -1))  # (N,H,T,K) -> (N,T,H*K)


class Reading(NamedTuple):
    """The one token of each text that is read in the end: by a classifier, or to go on from."""

    rows: Array  # (N,), its row among the states
    places: Places  # N texts of one place
    angles: tuple[Array, Array] | None  # rotary's, of these tokens

    def take(self, x: Array) -> Array:
        """Its rows. (..., D) -> (N,1,D)."""
        return pick(x, self.rows)[:, None]

    def take_backward(self, dy: Array, shape: tuple[int, ...]) -> Array:
        """dy (N,1,D), the shape of x -> dx of that shape."""
        return pick_backward(dy[:, 0], self.rows, shape)
