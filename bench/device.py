"""What a process is measured by: a clock, the most memory that it held, and what a call asks of a GPU.

On the host the clock is the processor's, and memory is the process's. On a GPU the clock is a pair of CUDA events, set
once the device has done what it was given, and read once it has done what was timed. Memory is then what the library
has taken from the device since the case that is measured began, in use or kept for what comes: its pool never shrinks
by itself, so that is the pool's high-water mark. PyTorch's is taken in the same way.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from lora_np.backend import backend_name, xp

from .counting import Counts, counting

Clock: TypeAlias = Callable[[], Callable[[], float]]  # starts it; what comes back stops it, and gives the seconds


class Meter(Protocol):
    """Of one process."""

    def clock(self) -> Callable[[], float]:
        """Starts a clock. -> what stops it and gives the seconds."""

    def begin(self, call: Callable[[], Any]) -> Counts:
        """Before a case is timed: a GPU forgets the peak so far, and counts what one call asks of it."""

    def peak(self) -> int:
        """The most bytes held: since `begin` on a GPU, on the host since the process started."""


class Host:
    """The processor."""

    def clock(self) -> Callable[[], float]:
        start = time.perf_counter()
        return lambda: time.perf_counter() - start

    def begin(self, call: Callable[[], Any]) -> Counts:
        return {}

    def peak(self) -> int:
        status = Path("/proc/self/status")
        if status.exists():  # of this program; resource counts what the process was before it, too
            lines = status.read_text().splitlines()
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        import resource  # not on Windows

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


HOST = Host()


class CuPy:
    """A GPU, through CuPy."""

    def __init__(self) -> None:
        self.cuda, self.pool = xp.cuda, xp.get_default_memory_pool()  # type: ignore[attr-defined]

    def clock(self) -> Callable[[], float]:
        def stop() -> float:
            end.record()
            end.synchronize()
            return self.cuda.get_elapsed_time(start, end) / 1e3

        start, end = self.cuda.Event(), self.cuda.Event()
        self.cuda.Device().synchronize()
        start.record()
        return stop

    def begin(self, call: Callable[[], Any]) -> Counts:
        self.pool.free_all_blocks()
        with counting() as counts:
            call()
        return counts

    def peak(self) -> int:
        return int(self.pool.total_bytes())


class PyTorch:
    """A GPU, through PyTorch."""

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda

    def clock(self) -> Callable[[], float]:
        def stop() -> float:
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.cuda.synchronize()
        start.record()
        return stop

    def begin(self, call: Callable[[], Any]) -> Counts:
        self.cuda.empty_cache()
        self.cuda.reset_peak_memory_stats()
        call()
        return {}

    def peak(self) -> int:
        return int(self.cuda.max_memory_reserved())


def meter(module: str) -> Meter:
    """That of a process with this module's cases."""
    if backend_name != "cupy":
        return HOST
    return PyTorch() if module == "bench.peft_side" else CuPy()
