"""A base: a model in memory, or one whose weights are read when asked for; and how a model in memory holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from ...backend import Array, xp
from ...model import Config
from ...storage import Matrix, narrowed, quantise_nf4

Storage: TypeAlias = Literal["bfloat16", "nf4", "gguf"]
STORAGES = ("bfloat16", "nf4", "gguf")
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


def held(name: str, value: Array, storage: Storage | None, where: str) -> Matrix:
    """A weight as a model is to hold it: narrowed to bfloat16, if it is a matrix; in NF4, if it is one of a layer's.

    `where` names it in errors.
    """
    if storage is None or value.ndim != 2 or (storage == "nf4" and "layers." not in name):
        return value
    try:
        return narrowed(xp.asarray(value)) if storage == "bfloat16" else quantise_nf4(xp.asarray(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: storage {storage}: {error}") from None
