"""An adapter in any of its formats, for a base of any architecture, by the modules' names."""

from __future__ import annotations

from pathlib import Path

from ..adapters.adapter import kind_of
from ..adapters.contents import Contents, read_contents
from ..adapters.own_files import read_file
from .any_base import AnyBase
from .gguf_by_name import read_gguf


def read_for(base: AnyBase, path: Path) -> Contents:
    """A ValueError or FileNotFoundError, in one line, says what is missing, damaged, or does not fit the base."""
    kind = kind_of(path)
    if kind == "gguf":
        return read_gguf(base, path)
    return read_contents(path, base.names) if kind == "peft" else read_file(path)
