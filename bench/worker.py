"""A process that times cases when it is told to: python -m bench.worker MODULE:FUNCTION ARGUMENTS THREADS SECONDS.

FUNCTION(**ARGUMENTS), which are JSON, gives the cases; each of THREADS threads has cases of its own. It says the cases'
names, or what is missing; then for each name that comes in, a line each, it says the seconds of a call, what the call
gave if that is a number or a list, and the most memory that the process has held. The first time warms up. The calls
of one timing fill SECONDS.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from lora_np.backend import backend_name, xp

from .timing import timed, warmed_up


def peak_bytes() -> int:
    """The most memory that this process has held: of the GPU's, or else of the host's."""
    if backend_name == "cupy":
        return int(xp.get_default_memory_pool().total_bytes())  # type: ignore[attr-defined]  # the pool never shrinks
    status = Path("/proc/self/status")
    if status.exists():  # of this program; resource counts what the process was before it, too
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def serve(target: str, arguments: str, threads: int, at_least: float, out: TextIO) -> None:
    """Answers on `out` until standard input ends."""

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    module, _, function = target.partition(":")
    try:
        make = getattr(import_module(module), function)
        sets = [make(**json.loads(arguments)) for _ in range(threads)]
    except ImportError as error:
        say({"missing": str(error)})
        return
    say({"cases": list(sets[0])})
    calls: dict[str, int] = {}
    for line in sys.stdin:
        functions = [cases[line.strip()] for cases in sets]
        if line not in calls:
            calls[line] = warmed_up(functions, at_least)
            say({})
            continue
        seconds, value = timed(functions, calls[line])
        kept = value if isinstance(value, (int, float, list)) else None
        say({"seconds": seconds, "value": kept, "peak": peak_bytes()})


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), answers)
