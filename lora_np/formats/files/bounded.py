"""A script of this package as a process of its own, which ends when its time or its memory is up.

It has the standard library alone, and no module of the package beside it: what sets its limits stands before its text.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# A thread of Python's own ends the process, with status 1: an expression or a template cannot be stopped from within.
LIMITS = """
import contextlib, faulthandler
with contextlib.suppress(ImportError, OSError, ValueError):  # where the system has such limits
    import resource
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = {memory} if hard == resource.RLIM_INFINITY else min({memory}, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
faulthandler.dump_traceback_later({seconds}, exit=True)
"""


def command(script: Path, seconds: float, memory: int) -> list[str]:
    """What runs a script within so many seconds and bytes, whoever waits for it."""
    text = LIMITS.format(seconds=seconds, memory=memory) + script.read_text(encoding="utf-8")
    return [sys.executable, "-I", "-S", "-c", text]


def answers(script: Path, request: Mapping[str, Any], failed: str, *, seconds: float, memory: int) -> list[Any]:
    """What `script` writes to a request in JSON: a value of JSON for each line, fewer where it ended early.

    An OSError that begins with `failed` if the script did not run.
    """
    done = subprocess.run(
        command(script, seconds, memory), input=json.dumps(request).encode(), stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    if done.returncode > 1:  # 1: its time was up; negative: a signal ended it, as where memory was up
        raise OSError(f"{failed}: {sys.executable} ended with status {done.returncode}")
    return [json.loads(line) for line in done.stdout.split(b"\n")[:-1]]  # the last may not be whole
