"""Ctrl-C, or a backend that is missing, before the command line runs: the program ends in one line then too.

It is imported first of all, and imports as little as it can: until it is there, Ctrl-C is Python's own.
"""

import os
import signal
import sys
from types import TracebackType


def _is_program() -> bool:
    """Whether Python was started to run lora-np, and is not another's program that imports this package."""
    started = os.path.basename(sys.argv[0] if sys.argv else "").removesuffix(".exe") == "lora-np"
    return started or ("-m", "lora_np") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)


def _end(signum: int, frame: object) -> None:
    """Ends the process: nothing has been written yet, and libraries turn an exception during import into others."""
    try:
        os.write(2, b"lora-np: interrupted\n")
    finally:
        os._exit(130)


def _end_in_a_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What stops the import, as a backend that is missing: wrong input. A mistake of ours has its trace."""
    if not isinstance(error, (ImportError, ValueError)):
        sys.__excepthook__(kind, error, trace)
        return
    os.write(2, f"lora-np: {error}\n".encode(errors="backslashreplace"))
    os._exit(2)


def hand_over() -> None:
    """The command line runs: Ctrl-C is a KeyboardInterrupt again, as in any program, and errors are its own to tell."""
    if sys.excepthook is _end_in_a_line:
        sys.excepthook = sys.__excepthook__
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if _is_program():
    sys.excepthook = _end_in_a_line
if _is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    try:  # noqa: SIM105  (contextlib takes a while)
        signal.signal(signal.SIGINT, _end)
    except ValueError:  # not in the main thread
        pass
