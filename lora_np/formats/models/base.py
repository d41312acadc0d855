"""What an adapter's file is read against: a model in memory, or a base whose weights are read when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from ...backend import Array
from ...model import Config


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
