"""A base: a model in memory, or one whose weights are read when asked for; and how a model in memory holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from ...backend import Array, xp
from ...model import Config
from ...storage import BFloat16, Matrix, quantise_nf4, upper_halves
from ..files.blocks import Block, gathered

Storage: TypeAlias = Literal["bfloat16", "nf4", "gguf"]
STORAGES = ("bfloat16", "nf4", "gguf")
HALVES = "uint16"  # what bfloat16 is held in
LAYER_TENSORS = 6  # of each layer of any file, at least: two norms; q, k and v in one, o, gate and up in one, and down


class Wanted(NamedTuple):
    """How a model is to be loaded: load_model's keyword arguments."""

    dtype: str | None
    head: str | None
    n_labels: int | None
    seed: int | None
    storage: Storage | None


@runtime_checkable
class Base(Protocol):
    """A configuration, the weights by our names, and their one dtype. A Model is one, and so is an Opened."""

    @property
    def config(self) -> Config: ...

    @property
    def weights(self) -> Mapping[str, Array]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...


class LazyWeights(Mapping[str, Array]):
    """Weights that are read each time they are asked for; none is kept."""

    def __init__(self, readers: Mapping[str, Callable[[], Array]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> Array:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def check_layers(n_layer: int, n_tensors: int, where: str) -> None:
    """A ValueError if so few tensors cannot be so many layers: said before names are made that no memory holds."""
    if n_layer * LAYER_TENSORS > n_tensors:
        raise ValueError(
            f"{where}: expected {LAYER_TENSORS} tensors at least of each of {n_layer} layers, got {n_tensors}"
        )


def read_held(
    parts: Mapping[str, slice],
    shape: tuple[int, ...],
    dtype: str,
    blocks: Iterable[Block],
    storage: Storage | None,
    where: str,
    *,
    transposed: bool = False,
) -> dict[str, Matrix]:
    """The weights in a tensor as a model is to hold them: a matrix in bfloat16; in NF4, if it is one of a layer's.

    parts: the rows of each, of the tensor as (out, in); transposed: whether it comes as (in, out). `where` names it in
    errors. What is wanted in bfloat16 is never held wider.
    """
    if storage == "bfloat16" and len(shape) == 2:
        dtype, blocks = HALVES, _narrowed(blocks, where)
    whole = gathered(shape, dtype, blocks, "F").T if transposed else gathered(shape, dtype, blocks)
    return {name: _held(name, xp.asarray(whole[rows]), storage, where) for name, rows in parts.items()}


def _narrowed(blocks: Iterable[Block], where: str) -> Iterator[Block]:
    for rows, values in blocks:
        with _storing("bfloat16", where):
            halves = upper_halves(values)
        yield rows, halves


def _held(name: str, value: Array, storage: Storage | None, where: str) -> Matrix:
    if value.dtype == HALVES:
        return BFloat16(value.shape, value)
    if storage == "nf4" and value.ndim == 2 and "layers." in name:
        with _storing("nf4", where):
            return quantise_nf4(value)
    return value


@contextmanager
def _storing(storage: Storage, where: str) -> Iterator[None]:
    """An error within says which tensor cannot be held so."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: storage {storage}: {error}") from None
