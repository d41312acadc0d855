"""A script of this package as a process of its own, which ends when its time or its memory is up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def answers(script: Path, request: Mapping[str, Any], failed: str) -> list[Any]:
    """What `script` writes to a request in JSON: a value of JSON for each line, fewer where it ended early.

    An OSError that begins with `failed` if the script did not run.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(script)], input=json.dumps(request).encode(), stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    if done.returncode > 1:  # 1: its time was up; negative: a signal ended it, as where memory was up
        raise OSError(f"{failed}: {sys.executable} ended with status {done.returncode}")
    return [json.loads(line) for line in done.stdout.split(b"\n")[:-1]]  # the last may not be whole
