"""A safetensors file as bytes: its header, and its tensors' bytes one after another. No tensor is held whole.

The file is 8 bytes, the header's length; the header, a JSON object of each tensor's dtype, shape and place; the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .plain import to_json
from .safe import open_tensors

METADATA = "__metadata__"
CHUNK = 2**20


class Header(NamedTuple):
    """A file's first bytes as they stand, and what they say: an entry for each tensor, in order, and metadata."""

    raw: bytes
    entries: Mapping[str, dict[str, Any]]

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """The tensors' entries."""
        return {name: entry for name, entry in self.entries.items() if name != METADATA}

    @property
    def by_place(self) -> list[str]:
        """The names of the tensors, in the order of their bytes."""
        return sorted(self.tensors, key=lambda name: tuple(self.entries[name]["data_offsets"]))


def read_header(path: Path) -> Header:
    """The header of a file whose entries fit its size and each other: safetensors itself checks that first."""
    with open_tensors(path), open(path, "rb") as file:
        raw = file.read(8)
        raw += file.read(int.from_bytes(raw, "little"))
    return Header(raw, json.loads(raw[8:]))


def new_header(tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str] | None) -> Header:
    """The header of a file with these tensors in this order: each one's dtype, as the format calls it, shape, bytes."""
    entries: dict[str, dict[str, Any]] = {} if metadata is None else {METADATA: dict(metadata)}
    start = 0
    for name, (dtype, shape, size) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = to_json(entries).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors' bytes begin at a multiple of 8
    return Header(len(text).to_bytes(8, "little") + text, entries)


def tensor_bytes(path: Path, header: Header, name: str) -> Iterator[bytes]:
    """The bytes of one tensor, a part at a time."""
    start, end = (len(header.raw) + place for place in header.entries[name]["data_offsets"])
    with open(path, "rb") as file:
        file.seek(start)
        while start < end:
            part = file.read(min(CHUNK, end - start))
            if not part:
                raise ValueError(f"{path}: the file was changed while it was read")
            start += len(part)
            yield part


def write_stream(path: Path, header: Header, tensors: Iterable[Iterable[bytes | memoryview]]) -> None:
    """A new file: the header, then the bytes of each tensor, in the order of `by_place`."""
    with open(path, "xb") as file:
        file.write(header.raw)
        for parts in tensors:
            for part in parts:
                file.write(part)
