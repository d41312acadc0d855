"""A safetensors file, written as bytes: its header, and its tensors' bytes one after another. None is held whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .json_file import to_json
from .safetensors_file import METADATA, Entry, Header


def new_header(tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str] | None) -> Header:
    """The header of a file with these tensors in this order: each one's dtype, as the format calls it, shape, bytes."""
    entries: dict[str, Entry] = {}
    start = 0
    for name, (dtype, shape, size) in tensors.items():
        entries[name] = Entry(dtype, shape, start, start + size)
        start += size
    found: dict[str, Any] = {} if metadata is None else {METADATA: metadata}
    for name, (dtype, shape, *offsets) in entries.items():
        found[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = to_json(found).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors' bytes begin at a multiple of 8
    return Header(len(text).to_bytes(8, "little") + text, entries, metadata)


def write_stream(path: Path, header: Header, tensors: Iterable[Iterable[bytes | memoryview]]) -> None:
    """A new file: the header, then the bytes of each tensor, in the order of `by_place`."""
    with open(path, "xb") as file:
        file.write(header.raw)
        for parts in tensors:
            for part in parts:
                file.write(part)
