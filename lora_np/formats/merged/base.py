"""A base's folder, opened: all that is known of it before a weight is read, and the weights when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...adapter import Adapter
from ...backend import Array
from ...model import Config, init_weights
from ...storage import widened
from ..adapters.head import Brought, brought_by
from ..files.messages import named
from ..models.base import LazyWeights
from ..models.folder import CONFIG, MODEL_TYPE, open_own, own_places, read_header
from ..models.huggingface import Files, Place, open_huggingface, places, with_old_names
from ..models.shards import Stored

SEED = 0  # of what neither the file nor the adapter has, until the adapter is read and has it


@dataclass(frozen=True, eq=False)
class Opened:
    """A base (see `Base`) in a folder.

    raw       its config.json
    files     its tensors, and the Config of the file and with the adapters' head
    lacking   the weights that the files lack: init_weights' for seed 0 stand in their place
    """

    folder: Path
    raw: Mapping[str, Any]
    files: Files
    dtype: np.dtype[Any]
    weights: Mapping[str, Array]
    lacking: tuple[str, ...]

    @property
    def config(self) -> Config:
        return self.files.config

    @property
    def is_own(self) -> bool:
        """Whether the folder is one of `save_model`'s."""
        return self.raw["model_type"] == MODEL_TYPE

    def places(self, config: Config, *, in_trunk: bool) -> dict[str, Place]:
        """Where the weights of a `config` stand in such a folder's files, under the names that these already use."""
        if self.is_own:
            return own_places(config)
        return with_old_names(places(config, in_trunk=in_trunk), self.files.tensors)


@named
def open_base(path: str | os.PathLike[str], adapters: Sequence[Path] = ()) -> Opened:
    """Opens a folder that `load_model` reads, with its checks of names, shapes and hash; no weight is kept.

    The head is the one that `adapters` bring, if they do. The dtype is float64 where the files or an adapter have
    that, else float32. A .gguf file is a ValueError: it is merged by `merge_gguf`.
    """
    folder = Path(path)
    if folder.suffix.lower() == ".gguf":
        raise ValueError(
            f"{folder}: expected a model's folder, got a .gguf file: only a merge into another .gguf file is supported"
        )
    raw = read_header(folder)
    is_own = raw["model_type"] == MODEL_TYPE
    brought = [brought_by(adapter) for adapter in adapters]
    files = (open_own if is_own else open_huggingface)(folder, raw, **_one_head(brought, adapters))
    dtype = "float64" if any(one.is_double for one in brought) else files.dtype
    readers: dict[str, Callable[[], Array]] = {}
    for key, place in files.places.items():
        readers |= {name: partial(_read, files.tensors[key], place, dtype, name) for name in place.parts}
    lacking = tuple(name for name in files.config.weight_shapes() if name not in readers)
    readers |= {name: partial(_made, files.config, dtype, name) for name in lacking}
    weights = LazyWeights(readers)
    if files.tied:
        files.check_tied(weights["embed.tokens"], dtype, str(folder / CONFIG))
    return Opened(folder, raw, files, np.dtype(dtype), weights, lacking)


def _one_head(brought: Sequence[Brought], where: Sequence[Path]) -> dict[str, Any]:
    """The one head that adapters bring, if they do: `load_model`'s head and n_labels."""
    options = [one.options for one in brought if one.options["head"] is not None]
    if any(other != options[0] for other in options):
        raise ValueError(f"{where[0]}: it and the other adapters have different heads")
    return options[0] if options else {"head": None, "n_labels": None}


def check_complete(base: Opened, adapters: list[Adapter]) -> None:
    """A ValueError if there is a weight that neither the base's files nor an adapter has."""
    for name in base.lacking:
        if not any(name in adapter.whole for adapter in adapters):
            raise ValueError(f"{base.folder}: {name} is missing, and no adapter brings it")


def _read(stored: Stored, place: Place, dtype: str, name: str) -> Array:
    return widened(place.read(stored, dtype)[name])


def _made(config: Config, dtype: str, name: str) -> Array:
    return init_weights(config, seed=SEED, dtype=dtype, names=[name])[name]
