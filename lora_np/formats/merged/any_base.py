"""A base's folder of any architecture: its configuration and its tensors, as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..models.folder import read_any_header
from ..models.shards import Stored, stored_tensors
from .renamed import in_memory
from .tied import Tied, tied


@dataclass(frozen=True, eq=False)
class AnyBase:
    """A base whose model need not be known.

    raw       its config.json
    tensors   by their keys
    brought   those that it lacks, of a head that an adapter has whole
    """

    folder: Path
    raw: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    brought: frozenset[str] = frozenset()

    @property
    def model_type(self) -> str:
        return str(self.raw["model_type"])

    @cached_property
    def modules(self) -> set[str]:
        """Every module that these tensors stand in: each name without its last part, or its last parts."""
        found = set()
        for key in self.tensors:
            name = key
            while "." in name:
                name = name.rpartition(".")[0]
                if name in found:
                    break
                found.add(name)
        return found

    @cached_property
    def names(self) -> set[str]:
        """What its modules are called in memory, as PEFT has them."""
        return {in_memory(module, self.model_type) for module in self.modules}

    @cached_property
    def tied(self) -> Tied:
        return tied(self.raw, self.tensors)


def open_any_base(folder: Path) -> AnyBase:
    """Opens a folder; no weight is read. A ValueError or FileNotFoundError, in one line, says what is wrong with it."""
    return AnyBase(folder, read_any_header(folder), stored_tensors(folder))
