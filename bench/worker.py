"""A process that times cases when it is told to: python -m bench.worker MODULE:FUNCTION ARGUMENTS THREADS SECONDS.

FUNCTION(**ARGUMENTS), which are JSON, gives the cases; each of THREADS threads has cases of its own. It says the cases'
names, or what is missing; then for each name that comes in, a line each, it says the seconds of a call, what the call
gave if that is a number or a list, the most memory held, and what a call asked of a GPU. The first time warms up. The
calls of one timing fill SECONDS.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from typing import Any, TextIO

from .device import meter
from .timing import timed, warmed_up


def serve(target: str, arguments: str, threads: int, at_least: float, out: TextIO) -> None:
    """Answers on `out` until standard input ends."""

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    module, _, function = target.partition(":")
    try:
        make = getattr(import_module(module), function)
        sets = [make(**json.loads(arguments)) for _ in range(threads)]
        measured = meter(module)
    except ImportError as error:
        say({"missing": str(error)})
        return
    say({"cases": list(sets[0])})
    calls: dict[str, int] = {}
    for line in sys.stdin:
        functions = [cases[line.strip()] for cases in sets]
        if line not in calls:
            calls[line] = warmed_up(functions, at_least, measured.clock)
            say({})
            continue
        counts = measured.begin(functions[0])
        seconds, value = timed(functions, calls[line], measured.clock)
        kept = value if isinstance(value, (int, float, list)) else None
        del value  # or the next call would need other memory, which the system has to clear first
        say({"seconds": seconds, "value": kept, "peak": measured.peak(), "counts": counts})


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), answers)
