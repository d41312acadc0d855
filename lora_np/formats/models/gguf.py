"""Models in GGUF files: a weight is a tensor, some of its rows, or those of its heads in another order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ...backend import Array
from ...model import Config, Model
from ...storage import Matrix
from ..files.blocks import Block, gathered
from .base import LazyWeights, Wanted, read_held
from .gguf_architectures import FREQUENCIES, LAYER_NAMES, Architecture, NotRun, architecture_of, read_config
from .gguf_file import ALL, GGUFFile, open_gguf
from .heads import completed, taken, with_head

NAMES = {
    "embed.tokens": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
}


class Source(NamedTuple):
    """Where a weight of a shape stands: the tensor, its rows there, and in how many heads they are paired; 0: in none.

    plus_one: whether the tensor is 1 + w
    """

    tensor: str
    shape: tuple[int, ...]
    rows: slice
    heads: int
    plus_one: bool

    def read(self, file: GGUFFile, dtype: str) -> Array:
        """The weight."""
        return gathered(self.shape, dtype, self.blocks(file, dtype))

    def blocks(self, file: GGUFFile, dtype: str) -> Iterator[Block]:
        """The weight, some rows at a time.

        From 1 + w, as float32 has it, w comes back so that 1 + w is the tensor's number again.
        """
        for place, values in file.blocks(self.tensor, dtype, heads=self.heads, rows=self.rows):
            yield place, values - 1 if self.plus_one else values


def load_gguf(path: Path, wanted: Wanted) -> Model:
    """The model in a .gguf file of an architecture that is run here, as load_model is asked for it.

    Tensors of every type that the gguf package decodes; the head is tied where the file has none. No more is
    held than the weights in their dtype, float32 if none is wanted, and some rows of one tensor as the file has them.
    A ValueError, in one line, names what is damaged or not supported: the file, and the key or the tensor.
    """
    with open_gguf(path) as file:
        saved, sources = open_model(file)
        config = with_head(saved, wanted.head, wanted.n_labels)
        weights: dict[str, Matrix] = {}
        for name in taken(saved, config):
            weights[name] = _read_held(file, name, sources[name], wanted)
    return Model(config, completed(config, weights, wanted.seed, str(path)))


def _read_held(file: GGUFFile, name: str, source: Source, wanted: Wanted) -> Matrix:
    """A weight as the model is to hold it."""
    if wanted.storage == "gguf":
        blocks = file.read_held(source.tensor, heads=source.heads, rows=source.rows)
        return source.read(file, "float32") if blocks is None else blocks
    dtype = wanted.dtype or "float32"
    where = f"{file.path}: {source.tensor}"
    return read_held({name: ALL}, source.shape, dtype, source.blocks(file, dtype), wanted.storage, where)[name]


def lazy_weights(file: GGUFFile, sources: Mapping[str, Source], dtype: str) -> LazyWeights:
    """The weights of `open_model` in `dtype`, which are read when asked for."""
    return LazyWeights({name: partial(source.read, file, dtype) for name, source in sources.items()})


def open_model(file: GGUFFile) -> tuple[Config, dict[str, Source]]:
    """A file's Config, and where each weight stands. Checked; no weight is read.

    A ValueError names what is damaged; NotRun, which is one, what is not computed here.
    """
    check_one_file(file)
    architecture = architecture_of(file)
    config = read_config(file, architecture)
    sources = _sources(config, architecture)
    _check_tensors(file, config, sources, {FREQUENCIES} if architecture.frequencies else set())
    return config, sources


def is_run(file: GGUFFile) -> bool:
    """Whether the model in a file is computed here; a ValueError if the file is damaged."""
    try:
        open_model(file)
    except NotRun:
        return False
    return True


def file_name(name: str, layer_names: Mapping[str, str] = LAYER_NAMES) -> str:
    """The file's name of one of our weights."""
    if name in NAMES:
        return NAMES[name]
    stem, _, kind = name.rpartition(".")
    _, layer, part = stem.split(".", 2)
    return f"blk.{layer}.{layer_names[part]}.{kind}"


def paired_heads(name: str, config: Config) -> int:
    """How many heads have their rows in pairs (2j, 2j+1) in the file, where T11 turns (j, j + K/2); 0: in order."""
    if name.endswith("attn.q.weight"):
        return config.n_head
    return config.kv_heads if name.endswith("attn.k.weight") else 0


def check_one_file(file: GGUFFile) -> None:
    """A ValueError if the file is one of several of a model."""
    if file.metadata.get("split.count", 0) not in (0, 1):
        raise ValueError(f"{file.path}: split.count: a model in several files is not supported; merge them first")


def _sources(config: Config, architecture: Architecture) -> dict[str, Source]:
    """Where each weight stands; of those that share a tensor, one below the other, in the order of Config's."""
    shapes = config.weight_shapes()
    tensors = {name: file_name(name, architecture.layer) for name in shapes}
    shared, ends = Counter(tensors.values()), dict[str, int]()
    sources = {}
    for name, tensor in tensors.items():
        rows = ALL
        if shared[tensor] > 1:
            start = ends.get(tensor, 0)
            ends[tensor] = start + shapes[name][0]
            rows = slice(start, ends[tensor])
        heads = paired_heads(name, config) if architecture.in_pairs else 0
        plus_one = config.norm == "rms_1p" and len(shapes[name]) == 1
        sources[name] = Source(tensor, shapes[name], rows, heads, plus_one)
    return sources


def _check_tensors(file: GGUFFile, config: Config, sources: Mapping[str, Source], others: Collection[str]) -> None:
    """A ValueError that names a tensor: one that is missing, belongs nowhere, has another shape, or cannot be read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in config.weight_shapes().items():
        tensor, rows = sources[name].tensor, sources[name].rows
        shapes[tensor] = shape if rows == ALL else (rows.stop, *shape[1:])
    for tensor in sorted(shapes.keys() - file.tensors.keys()):
        raise ValueError(f"{file.path}: the tensor {tensor} is missing")
    for tensor in sorted(file.tensors.keys() - shapes.keys() - set(others)):
        raise NotRun(f"{file.path}: the tensor {tensor} has no place in this model")
    for tensor, shape in shapes.items():
        if file.tensors[tensor].shape != shape:
            raise ValueError(f"{file.path}: {tensor}: expected shape {shape}, got {file.tensors[tensor].shape}")
    file.check_tensors()
