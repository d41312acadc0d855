"""What figures depend on: the machine, its threads, the BLAS and its kernel, versions, the date."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from typing import Any

import numpy as np

from lora_np.backend import backend_name, xp
from lora_np.reproduce.report import processor

PACKAGES = ("cupy", "torch", "peft", "transformers", "loralib", "xllamacpp", "jax")
SETTINGS = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "MKL_NUM_THREADS", "CUPY_TF32",
    "CUPY_ACCELERATORS",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """By name; what is not set or not installed is left out."""
    versions = {name: _version(name) for name in PACKAGES}
    settings = {name: os.environ.get(name) for name in SETTINGS}
    found = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "backend": backend_name,
        **_device(),
        **_blas(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    return {name: value for name, value in {**found, **versions, **settings}.items() if value is not None}


def _version(package: str) -> str | None:
    names = [package] if package != "cupy" else ["cupy", "cupy-cuda12x", "cupy-cuda13x"]
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _memory() -> str | None:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def _device() -> dict[str, str]:
    """The GPU's name, and CUDA's version."""
    if backend_name != "cupy":
        return {}
    cuda = xp.cuda  # type: ignore[attr-defined]
    properties, version = cuda.runtime.getDeviceProperties(cuda.Device().id), cuda.runtime.runtimeGetVersion()
    return {"device": properties["name"].decode(), "cuda": f"{version // 1000}.{version % 1000 // 10}"}


def _blas() -> dict[str, Any]:
    """NumPy's BLAS, its version, the kernel that it chose for this processor, and its threads."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return {}
    for library in threadpool_info():
        if library["user_api"] == "blas":
            return {
                "blas": f"{library['internal_api']} {library['version']}",
                "kernel": library.get("architecture"),
                "threads": library["num_threads"],
            }
    return {}
