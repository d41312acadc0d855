"""Times of functions, taken in turn, so that a drift of the machine's speed falls on all of them alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_np.backend import backend_name, xp


class Times(NamedTuple):
    """Seconds of one call: the median of all rounds, and the least and the most."""

    median: float
    least: float
    most: float


def synchronise() -> None:
    """Waits until the device has done what it was given."""
    if backend_name == "cupy":
        xp.cuda.Stream.null.synchronize()  # type: ignore[attr-defined]


def measure(functions: Mapping[str, Callable[[], Any]], *, rounds: int, at_least: float = 0.02) -> dict[str, Times]:
    """The times of functions, each called once a round, and in a round as often as fills `at_least` seconds."""
    calls, seconds = {}, {name: list[float]() for name in functions}
    for name, function in functions.items():  # the first call warms up, the second says how long one takes
        _timed(function, 1)
        calls[name] = max(1, round(at_least / max(_timed(function, 1), 1e-9)))
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(_timed(function, calls[name]))
    return {name: Times(statistics.median(times), min(times), max(times)) for name, times in seconds.items()}


def _timed(function: Callable[[], Any], calls: int) -> float:
    synchronise()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronise()
    return (time.perf_counter() - start) / calls


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "backend": backend_name,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "not set"),
    }
