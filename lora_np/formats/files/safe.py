"""Safetensors files, read as what they are: bytes that anyone may have written.

What is wrong with a file is one ValueError that names the file, and the tensor if it is one's fault. Nothing is read
before its type and shape are known, and nothing is ever executed: pickle files are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...backend import Array

MAX_HEADER_BYTES = 100 * 10**6  # the format's own limit
DTYPES = {"F32": "float32", "F64": "float64"}
FLOATS = ("F64", "F32", "F16", "BF16")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def import_safetensors() -> Any:
    """The safetensors package; an ImportError says how to get it."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("reading and writing safetensors files needs safetensors: pip install 'lora-np[cli]'") from (
            error
        )
    return safetensors


# What moves a terminal's cursor, ends a line, turns its direction, or is no character: control codes but the tab, line
# and paragraph ends, embeddings and isolates of direction, halves of surrogate pairs.
UNSAFE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MAX_SHOWN = 200


def shown(text: str, most: int = MAX_SHOWN) -> str:
    """A text that came from a file, fit to be a part of one line: escapes for what is unsafe, the middle left out.

    most: how long it may be. What is shown already stays as it is.
    """
    text = UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
    return text if len(text) <= most else f"{text[: most // 2 - 2]} ... {text[-(most - most // 2 - 3) :]}"


def import_bfloat16() -> None:
    """Makes bfloat16 known to NumPy; an ImportError says how."""
    try:
        import ml_dtypes  # noqa: F401 (its import is all that is needed)
    except ImportError as error:
        raise ImportError("reading bfloat16 needs ml_dtypes: pip install 'lora-np[models]'") from error


class TensorFile:
    """An open safetensors file: the names, dtypes and shapes of its tensors, its metadata, and their values."""

    def __init__(self, path: Path, handle: Any) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = handle.metadata() or {}
        self._handle = handle
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
        self.dtypes = {name: part.get_dtype() for name, part in slices.items()}
        self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}

    def check_names(self, expected: Mapping[str, tuple[int, ...]], left_out: Collection[str] = ()) -> None:
        """A ValueError that names a tensor: one that is missing, belongs nowhere, or has another shape or dtype.

        left_out: what may be there besides, and is not read.
        """
        for name in sorted(expected.keys() - self.shapes.keys()):
            raise ValueError(f"{self.path}: the tensor {shown(name)} is missing")
        for name in sorted(self.shapes.keys() - expected.keys() - set(left_out)):
            raise ValueError(f"{self.path}: the tensor {shown(name)} has no place in this model")
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise ValueError(f"{self.path}: {name}: expected shape {shape}, got {self.shapes[name]}")
            if self.dtypes[name] not in DTYPES:
                raise ValueError(f"{self.path}: {name}: expected float32 or float64, got {self.dtypes[name]}")

    def read(self, name: str) -> Array:
        """The tensor, in host memory. Check its name and dtype first."""
        if self.dtypes[name] == "BF16":
            import_bfloat16()
        values: Array = self._handle.get_tensor(name)
        return values

    def read_as(self, name: str, dtype: np.dtype[Any]) -> Array:
        """The tensor, finite, widened to `dtype` if need be; a ValueError if it would be rounded."""
        check_widens(DTYPES[self.dtypes[name]], dtype, f"{self.path}: {name}")
        return self.read_finite(name).astype(dtype, copy=False)

    def read_finite(self, name: str) -> Array:
        """The tensor; a ValueError if its dtype is none of FLOATS, or an element is NaN or infinite."""
        if self.dtypes[name] not in FLOATS:
            raise ValueError(f"{self.path}: {name}: expected one of {' '.join(FLOATS)}, got {self.dtypes[name]}")
        values = self.read(name)
        if not np.isfinite(values).all():
            raise ValueError(f"{self.path}: {name}: holds NaN or infinite numbers")
        return values


def check_widens(stored: str, dtype: np.dtype[Any], where: str) -> None:
    """A ValueError if numbers of the dtype `stored` would be rounded to the model's."""
    if not np.can_cast(np.dtype(stored), dtype, "safe"):
        raise ValueError(f"{where}: {stored} would be rounded to the model's {dtype}; load it as {stored}")


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """A safetensors file, its header checked against its size before anything is read by it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    safetensors = import_safetensors()
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(
            f"{path}: truncated, or not a safetensors file: it is {size} bytes long and says that its header alone "
            f"takes {length}"
        )
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"{path}: expected a header of at most {MAX_HEADER_BYTES} bytes, got {length}")
    try:
        with safetensors.safe_open(path, framework="numpy") as handle:
            yield TensorFile(path, handle)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file: {shown(str(error))}") from None


def refuse_pickle(folder: Path, wanted: str) -> None:
    """A ValueError if `folder` is a pickle file, or has weights in one instead of the file `wanted`."""
    beside = sorted(folder.iterdir()) if folder.is_dir() and not (folder / wanted).exists() else []
    for path in (folder, *beside):
        if path.is_file() and path.suffix in PICKLES:
            raise ValueError(
                f"{path}: refused: a pickle file can run any code when it is read; save the weights as {wanted}"
            )
