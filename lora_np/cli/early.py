"""What the package, as the program that was started, does before NumPy is imported: ends in a line, limits BLAS.

It is imported first of all, and imports as little as it can: until it is there, Ctrl-C is Python's own. Ctrl-C, or a
backend that is missing, ends in one line then too. BLAS reads how many threads it is to start when NumPy is imported.
"""

import importlib.util
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


BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def limit_blas() -> None:
    """One BLAS thread, where nobody says how many and threadpoolctl cannot: then loops can run in threads."""
    if importlib.util.find_spec("threadpoolctl") is None and not any(os.environ.get(name) for name in BLAS_THREADS):
        os.environ.update(dict.fromkeys(BLAS_THREADS, "1"))


if _is_program():
    limit_blas()
    sys.excepthook = _end_in_a_line
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        try:  # noqa: SIM105  (contextlib takes a while)
            signal.signal(signal.SIGINT, _end)
        except ValueError:  # not in the main thread
            pass
