"""Ctrl-C before the command line runs: the package, as the program that was started, ends in one line then too."""

import os
import signal
import sys
from contextlib import suppress
from itertools import pairwise
from types import FrameType


def _is_program() -> bool:
    """Whether Python was started to run lora-np, and is not another's program that imports this package."""
    started = os.path.basename(sys.argv[0] if sys.argv else "").removesuffix(".exe") == "lora-np"
    return started or ("-m", "lora_np") in pairwise(sys.orig_argv)


def _end(signum: int, frame: FrameType | None) -> None:
    """Ends the process: nothing has been written yet, and libraries turn an exception during import into others."""
    with suppress(OSError):
        os.write(2, b"lora-np: interrupted\n")
    os._exit(130)


def allow_interrupts() -> None:
    """Ctrl-C is a KeyboardInterrupt again, as in any program."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if _is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, _end)
