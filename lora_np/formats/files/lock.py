"""A folder that one process alone writes in."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .atomic import is_partial, made

LOCK = ".lora_np.lock"


@contextmanager
def occupied(folder: Path) -> Iterator[list[str]]:
    """The folder, made if need be, is this process's to write in; what a killed one left half-written is removed.

    -> the names of what is in it. A folder that was made and stays empty is gone afterwards. A BlockingIOError if
    another process has it, on this machine or, where the file system knows of locks, on another. A process that ends,
    however it does, has it no longer.
    """
    with made(folder):
        lock = folder / LOCK
        descriptor = _lock(lock)
        try:
            for name in os.listdir(folder):
                if is_partial(folder / name):
                    shutil.rmtree(folder / name)
            yield sorted(set(os.listdir(folder)) - {LOCK})
        finally:
            with suppress(OSError):  # Windows keeps a file that is open
                lock.unlink()
            os.close(descriptor)


def _lock(path: Path) -> int:
    """The descriptor of a file that no other process has locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _try_lock(descriptor):
                raise BlockingIOError(f"{path.parent}: another process is writing there; wait for it, or name another")
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the one before removed the file after it was opened here


def _try_lock(descriptor: int) -> bool:
    """Whether no other process has the file locked. The lock goes with the descriptor."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Any other error is a file system without locks, on which training goes on without one.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True
