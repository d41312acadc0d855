"""Experts: one parameter (E, ...) of a layer in memory, and E tensors in some files.

PEFT's A (E r, in) and B (out, r E) of such a parameter are, for expert e, rows e r to (e + 1) r of A, and of B each
E-th column from e on: dW_e = s B[:, e::E] A[e r : (e + 1) r]. Its merge adds that to the (out, in) of the expert e, or
its transpose where the parameter is (E, in, out).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

from ...lora import Update
from ..adapters.contents import Pair
from ..files.messages import shown
from ..models.shards import Stored

Index: TypeAlias = int | slice
ALL = slice(None)
# What a layer's experts are in memory, and the tensors that some files keep of each expert, one below the other.
EXPERTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


class Piece(NamedTuple):
    """A tensor in which an expert stands, where it does, and which rows of its dW that is."""

    stored: Stored
    place: Index
    rows: slice


class Experts(NamedTuple):
    """A parameter of a layer's experts: its name, each expert's shape as it is stored, and its pieces."""

    name: str
    shape: tuple[int, ...]
    pieces: list[list[Piece]]

    @property
    def is_one(self) -> bool:
        """Whether it is one tensor (E, ...), which may be stored (in, out)."""
        return self.pieces[0][0].place != ALL

    def fits(self, pair: Pair, turned: bool) -> bool:
        """Whether a pair's shapes are those of the parameter, stored (in, out) if `turned`."""
        shape = len(pair.B), pair.A.shape[1]
        return (self.is_one or not turned) and self.shape == (shape[::-1] if turned else shape)

    def updates(self, pair: Pair) -> Iterator[tuple[Piece, Update]]:
        """What a pair adds to each piece."""
        for pieces, update in zip(self.pieces, pair.updates, strict=True):
            for piece in pieces:
                yield piece, update._replace(B=update.B[piece.rows])


def find_experts(tensors: Mapping[str, Stored], module: str, pair: Pair, where: str) -> tuple[Experts, bool]:
    """The one parameter of a module that a pair fits, and whether it is stored (in, out); else a ValueError."""
    found = [
        (one, turned) for one in _parameters(tensors, module) for turned in (False, True) if one.fits(pair, turned)
    ]
    if len({one.name for one, _ in found}) != 1:
        raise ValueError(
            f"{where}: expected A (E r, in) and B (out, E r) of one parameter of the base, got A {pair.A.shape} and B "
            f"{pair.B.shape}, which {'several' if found else 'none'} of {shown(module)} has"
        )
    experts, turned = found[0]
    if len(found) > 1:
        turned = _are_turned(tensors, module, where)
    E = len(experts.pieces)
    if len(pair.A) != E * pair.r:
        raise ValueError(
            f"{where}: expected A of {E} experts of rank {pair.r}, as the patterns say, got {len(pair.A)} rows"
        )
    return experts, turned


def _parameters(tensors: Mapping[str, Stored], module: str) -> Iterator[Experts]:
    """The parameters of a layer's experts."""
    for name, splits in EXPERTS.items():
        one = tensors.get(f"{module}.{name}")
        if one is not None and len(one.shape) == 3:
            yield Experts(name, one.shape[1:], [[Piece(one, e, ALL)] for e in range(one.shape[0])])
        for parts in splits:
            found: list[list[Stored]] = []
            while all(f"{module}.{len(found)}.{part}.weight" in tensors for part in parts):
                found.append([tensors[f"{module}.{len(found)}.{part}.weight"] for part in parts])
            if found and all(len(stored.shape) == 2 for stack in found for stored in stack):
                pieces = [_stacked(stack) for stack in found]
                yield Experts(name, (pieces[0][-1].rows.stop, found[0][0].shape[1]), pieces)


def _stacked(stack: list[Stored]) -> list[Piece]:
    """An expert's tensors, one below the other."""
    pieces, start = [], 0
    for stored in stack:
        pieces.append(Piece(stored, ALL, slice(start, start + stored.shape[0])))
        start += stored.shape[0]
    return pieces


def _are_turned(tensors: Mapping[str, Stored], module: str, where: str) -> bool:
    """Whether experts are (E, in, out): gate_up_proj is twice as long in the axis of its outputs."""
    both = [tensors.get(f"{module}.{name}") for name in EXPERTS]
    if None not in both:
        (_, a, b), (_, c, d) = (one.shape for one in both if one is not None)
        if (a == 2 * d) != (b == 2 * c):
            return b == 2 * c
    raise ValueError(f"{where}: the shapes do not say whether experts are stored (out, in) or (in, out)")
