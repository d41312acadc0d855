"""The array library: NumPy, or CuPy when the environment asks for it. Chosen once, at import.

    LORA_NP_BACKEND=numpy   NumPy, on the CPU (the default)
    LORA_NP_BACKEND=cupy    CuPy, on the GPU; an ImportError says what is missing
    LORA_NP_BACKEND=auto    CuPy where it and a GPU are found, else NumPy

Every other module takes `xp` from here, and none of them imports CuPy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["FEW_ROWS", "Array", "DType", "asnumpy", "backend_name", "blocks", "read_only", "xp"]

Array: TypeAlias = npt.NDArray[Any]
DType: TypeAlias = npt.DTypeLike

# Elements of one temporary: few enough that some of them stay in a core's second-level cache, and so many that threads
# seldom meet at the interpreter's lock, which each step of a block takes once.
CACHE_ELEMENTS = 131072
FEW_ROWS = 32  # with fewer rows, as in decoding, a product takes as long as reading its other factor: as so many would


def _import_cupy() -> Any:
    """CuPy, if it is installed and sees a GPU; else an ImportError that says which of the two is missing."""
    try:
        import cupy
    except ImportError:
        raise ImportError(
            "LORA_NP_BACKEND=cupy: CuPy is not installed; install the build for your CUDA version: "
            "pip install cupy-cuda12x, or pip install cupy-cuda13x"
        ) from None
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise ImportError(
            f"LORA_NP_BACKEND=cupy: CuPy is installed but finds no GPU ({error}); install an NVIDIA driver that "
            "fits the CuPy build, or set LORA_NP_BACKEND=numpy"
        ) from None
    if count == 0:
        raise ImportError("LORA_NP_BACKEND=cupy: this machine has no GPU; set LORA_NP_BACKEND=numpy")
    return cupy


def _choose(wanted: str) -> tuple[str, Any]:
    """(name, module) of the backend that `wanted` names."""
    if wanted == "cupy":
        return "cupy", _import_cupy()
    if wanted == "auto":
        try:
            return "cupy", _import_cupy()
        except ImportError:
            return "numpy", np
    if wanted == "numpy":
        return "numpy", np
    raise ValueError(f"LORA_NP_BACKEND: expected numpy, cupy or auto, got {wanted!r}")


backend_name: str
if TYPE_CHECKING:
    import numpy as xp

    backend_name = "numpy"
else:
    backend_name, xp = _choose(os.environ.get("LORA_NP_BACKEND", "numpy"))


def asnumpy(a: Any) -> Array:
    """`a` as a NumPy array on the host: under CuPy a copy from the device, else `a` itself."""
    if isinstance(a, xp.ndarray) and backend_name == "cupy":
        return xp.asnumpy(a)  # type: ignore[attr-defined]
    return np.asarray(a)


def read_only(a: Array) -> Array:
    """A view of `a` that refuses writing; `a` keeps its own flags. CuPy has no such flag: there, `a` on the device."""
    view = xp.asarray(a)[...]
    if backend_name == "numpy":
        view.flags.writeable = False
    return view


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices that cut `rows` rows of `width` elements into blocks that stay in a core's cache.

    A chain of elementwise steps over one block never waits for main memory. On a GPU, where a launch costs more than
    a pass over memory, there is one block.
    """
    step = rows if backend_name == "cupy" else max(1, CACHE_ELEMENTS // max(1, width))
    for start in range(0, rows, max(1, step)):
        yield slice(start, min(start + step, rows))
