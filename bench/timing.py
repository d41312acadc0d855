"""Times of functions: after a warm-up, as often as fills a while, and in threads where all cores are to be busy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

from lora_np.backend import backend_name
from lora_np.threads import quick_switches

from .device import HOST, Clock

Cases: TypeAlias = Mapping[str, Callable[[], Any]]  # what is timed, by name

SLOW = 1.0  # a first call of so many seconds says how long the next ones take; a shorter one may have been warming up


def cores() -> int:
    """How many products run at once where each has one thread; on a GPU one."""
    return 1 if backend_name == "cupy" else os.cpu_count() or 1


def timed(functions: Sequence[Callable[[], Any]], calls: int = 1, clock: Clock = HOST.clock) -> tuple[float, Any]:
    """Seconds of one call, each function called `calls` times in a thread of its own, and what the first one gave."""
    with ThreadPoolExecutor(len(functions)) as pool, quick_switches():
        stop = clock()
        if len(functions) == 1:
            values = [_repeat(functions[0], calls)]
        else:
            values = list(pool.map(lambda f: _repeat(f, calls), functions))
        return stop() / calls, values[0]


def warmed_up(functions: Sequence[Callable[[], Any]], at_least: float, clock: Clock = HOST.clock) -> int:
    """Calls them until the next call is an ordinary one. -> how many calls fill `at_least` seconds."""
    first, _ = timed(functions, clock=clock)
    slow = first > SLOW and backend_name != "cupy"  # on a GPU the first call compiles kernels
    seconds = first if slow else timed(functions, clock=clock)[0]
    return max(1, round(at_least / max(seconds, 1e-9)))


def _repeat(function: Callable[[], Any], calls: int) -> Any:
    for _ in range(calls - 1):
        function()
    return function()
