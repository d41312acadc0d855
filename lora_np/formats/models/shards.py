"""A model's tensors in one safetensors file, or in several that an index names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...backend import Array
from ..files.blocks import Block, gathered
from ..files.json_file import read_json
from ..files.messages import shown
from ..files.safetensors_file import TensorFile, open_tensors, refuse_pickle

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PLAIN = r"[\w-][\w.-]{0,200}\.safetensors"  # a name that leads nowhere else


class Stored(NamedTuple):
    """A tensor in a file, which is opened anew for each reading, and must be what it was."""

    file: TensorFile
    name: str

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def dtype(self) -> str:
        return self.file.dtypes[self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.shapes[self.name]

    def __str__(self) -> str:
        return f"{self.path}: {shown(self.name)}"

    def read_raw(self) -> Array:
        """The tensor in its own dtype, in host memory."""
        with self.file.again() as file:
            return file.read(self.name)

    def read_finite(self) -> Array:
        """The same; a ValueError if its dtype is none of FLOATS, or an element is NaN or infinite."""
        with self.file.again() as file:
            return file.read_finite(self.name)

    def parts(self) -> Iterator[bytes]:
        """Its bytes, a part at a time."""
        with self.file.again() as file:
            yield from file.parts(self.name)

    def equals(self, other: Stored) -> bool:
        """Whether both are the same dtype, shape and bytes, read a part at a time."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        return all(one == two for one, two in zip(self.parts(), other.parts(), strict=True))

    def blocks(self, dtype: str) -> Iterator[Block]:
        """The tensor as float32 or float64, some rows at a time; a ValueError if a number is NaN, infinite or too
        large."""
        with self.file.again() as file:
            for rows, values in file.blocks(self.name):
                with np.errstate(over="ignore"):  # float64 beyond float32's range is refused below
                    values = values.astype(dtype, copy=False)
                if not np.isfinite(values).all():
                    raise ValueError(f"{self}: holds numbers that are NaN, infinite, or too large for {dtype}")
                yield rows, values

    def read(self, dtype: str) -> Array:
        """The tensor as `blocks` has it, in host memory."""
        return gathered(self.shape, dtype, self.blocks(dtype))


def stored_tensors(folder: Path, weights: str = WEIGHTS) -> dict[str, Stored]:
    """Every tensor of a folder, by its name. The single file `weights` goes before an index.

    A ValueError or FileNotFoundError names the file, and the tensor, that is missing, in two files or in none.
    """
    refuse_pickle(folder, weights)
    index = f"{weights}.index.json"
    if (folder / weights).exists() or not (folder / index).exists():
        return _in_file(folder / weights)
    places = _index(folder / index)
    tensors: dict[str, Stored] = {}
    for file_name in sorted(set(places.values())):
        found = _in_file(folder / file_name)
        for name, stored in found.items():
            if name in tensors:
                raise ValueError(f"{stored}: in {tensors[name].path.name} too")
            if places.get(name) != file_name:
                raise ValueError(f"{stored}: {index} does not say that it is there")
            tensors[name] = stored
    for name in sorted(places.keys() - tensors.keys()):
        raise ValueError(f"{folder / places[name]}: the tensor {shown(name)} is missing, which {index} says is there")
    return tensors


def _in_file(path: Path) -> dict[str, Stored]:
    with open_tensors(path) as file:
        return {name: Stored(file, name) for name in file.shapes}


def _index(path: Path) -> Mapping[str, str]:
    """The name of each tensor's file, which must lie in the index's own folder."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{path}: weight_map: expected an object of files by their tensors' names")
    for name, file_name in places.items():
        if not isinstance(file_name, str) or not re.fullmatch(PLAIN, file_name):
            raise ValueError(
                f"{path}: {shown(name)}: expected a .safetensors file in this folder, got {file_name!r:.80}"
            )
    return places
