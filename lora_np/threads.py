"""How work is cut, and the threads that its parts run in.

Work is cut by its shape alone (`backend.blocks`, `pieces`, `row_parts`), and any part may run in any thread: the same
work has the same bits on any number of cores. NumPy lets go of the interpreter's lock in products and elementwise
steps.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, copy_context
from functools import cache
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from .backend import FEW_ROWS, backend_name

S = TypeVar("S")
R = TypeVar("R")


def for_each(parts: Iterable[tuple[Any, ...]]) -> Callable[[Callable[..., None]], None]:
    """Runs the function below it at once, f(*part) for each of the parts, in any order, in threads of `in_threads`."""

    def run(f: Callable[..., None]) -> None:
        deque(map_parts(lambda part: f(*part), parts), maxlen=0)

    return run


def map_parts(f: Callable[[S], R], parts: Iterable[S]) -> Generator[R, None, None]:
    """f of each of the parts, in their order, as they are done, in threads of `in_threads`.

    Where there are more threads than parts, loops within f have the rest. Close what is not read to its end.
    """
    parts, threads = list(parts), _threads.get()
    used = min(threads, len(parts))
    if used <= 1:
        yield from map(f, parts)
        return

    def one(part: S) -> R:
        token = _threads.set(threads // used)
        try:
            return f(part)
        finally:
            _threads.reset(token)

    loop = _Loop(one, parts)
    _hire(threads - 1)
    for _ in range(used - 1):
        _jobs.put((copy_context(), loop.help))
    yield from loop.results()


@contextmanager
def in_threads(threads: int | None = None) -> Iterator[None]:
    """Loops run in threads meanwhile, with one BLAS thread each: in so many; None: in as many as there are cores.

    Within another call it changes nothing, and on a GPU. Where BLAS's own threads cannot be limited, loops run in one.
    """
    if backend_name == "cupy" or _threads.get() or (_blas() is None and not _has_one_blas_thread()):
        yield
        return
    token = _threads.set(threads or os.cpu_count() or 1)
    try:
        with process_settings():
            yield
    finally:
        _threads.reset(token)


# --- How work is cut -------------------------------------------------------------------------------------------------

PART_ROWS = 512


def row_parts(M: int) -> Iterator[slice]:
    """M rows in parts of 512 or so, few enough for large products; of fewer rows than 1024 halves of 256 and more."""
    parts = 1 if backend_name == "cupy" else max(M // PART_ROWS, min(2, M // (PART_ROWS // 2)), 1)
    for i in range(parts):
        yield slice(M * i // parts, M * (i + 1) // parts)


# A product is cut in two where each half still has LEAST multiplications; pieces of more than MOST are cut further, but
# where its sums are long (a head's backward) into none of fewer than SMALLEST elements, which take longer.
LEAST, MOST, SMALLEST = 2**25, 2**29, 3 * 2**14


def pieces(M: int, N: int, K: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the pieces in which a product (M,K) (K,N) is computed: halves of halves of its longer side.

    Smaller ones are slower, since each reads its part of both factors. There is one on a GPU, and in `whole_products`.
    """
    work = max(M, FEW_ROWS) * max(N, FEW_ROWS) * K
    parts = max(min(2, work // LEAST), min(work // MOST, M * N // SMALLEST), 1)
    if backend_name == "cupy" or _whole.get():
        parts = 1
    cuts = [(slice(0, M), slice(0, N))]
    for _ in range(parts.bit_length() - 1):
        cuts = [half for cut in cuts for half in _halves(*cut)]
    yield from cuts


_whole: ContextVar[bool] = ContextVar("whole", default=False)


@contextmanager
def whole_products() -> Iterator[None]:
    """Products are not cut meanwhile: for what is one of several things that threads do."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


def _halves(rows: slice, columns: slice) -> list[tuple[slice, slice]]:
    """Two pieces, from the middle of the longer side."""
    if rows.stop - rows.start > columns.stop - columns.start:
        middle = (rows.start + rows.stop) // 2
        return [(slice(rows.start, middle), columns), (slice(middle, rows.stop), columns)]
    middle = (columns.start + columns.stop) // 2
    return [(rows, slice(columns.start, middle)), (rows, slice(middle, columns.stop))]


# --- The threads -----------------------------------------------------------------------------------------------------

_threads: ContextVar[int] = ContextVar("threads", default=0)  # for the loops of this thread; 0: outside `in_threads`
_jobs: SimpleQueue[Any] = SimpleQueue()
_helpers: list[threading.Thread] = []


_hiring = threading.Lock()


def _hire(n: int) -> None:
    """Sees to it that there are so many threads that wait for loops to help with."""
    with _hiring:
        while len(_helpers) < n:
            helper = threading.Thread(target=_help, name="lora_np", daemon=True)
            _helpers.append(helper)
            helper.start()


def _help() -> None:
    while True:
        context, job = _jobs.get()
        context.run(job)
        del context, job  # or the loop's arrays are held until the next


def _begin_anew() -> None:
    """A forked process has none of the threads, and helps with nothing that was begun before."""
    global _jobs, _hiring
    _helpers.clear()
    _jobs, _hiring = SimpleQueue(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


class _Loop(Generic[S, R]):
    """Parts that threads take, each the next one. Who asked for it takes parts too, and waits for no thread to come."""

    def __init__(self, f: Callable[[S], R], parts: Sequence[S]) -> None:
        self.f, self.parts, self.count, self.changed = f, parts, len(parts), threading.Condition()
        self.taken = self.running = 0
        self.done: dict[int, tuple[R | None, BaseException | None]] = {}

    def results(self) -> Iterator[R]:
        try:
            for i in range(self.count):
                while i not in self.done:
                    if not self._run_next():
                        with self.changed:
                            if i not in self.done:
                                self.changed.wait()
                result, error = self.done.pop(i)
                if error is not None:
                    raise error
                yield result  # type: ignore[misc]
        finally:
            with self.changed:
                self.taken = self.count
                self.changed.wait_for(lambda: not self.running)
            del self.f, self.parts, self.done  # a thread that comes late holds none of their arrays

    def help(self) -> None:
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        """Runs the next part; False if all are taken."""
        with self.changed:
            i = self.taken
            if i == self.count:
                return False
            self.taken, self.running = i + 1, self.running + 1
        result, error = None, None
        try:
            result = self.f(self.parts[i])
        except BaseException as caught:
            error = caught
        with self.changed:
            self.done[i], self.running = (result, error), self.running - 1
            if error is not None:
                self.taken = self.count
            self.changed.notify_all()
        return True


# --- What they need of the process -----------------------------------------------------------------------------------

SLOW = (
    "threadpoolctl is not installed: all runs on BLAS's own threads, more slowly, and the last bits depend on how many "
    "these are; pip install threadpoolctl, or set OPENBLAS_NUM_THREADS=1 before Python starts"
)


def _has_one_blas_thread() -> bool:
    """Whether BLAS was started with one, or could start no more."""
    return os.cpu_count() == 1 or any(
        os.environ.get(f"{name}_NUM_THREADS") == "1" for name in ("OPENBLAS", "MKL", "OMP")
    )


@cache
def _blas() -> Any:
    """threadpoolctl's hold on NumPy's BLAS, which takes a while to find; None where it is missing, with a warning if it
    would have something to limit."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        if not _has_one_blas_thread():
            warnings.warn(SLOW, stacklevel=1)
        return None
    return ThreadpoolController().select(user_api="blas")


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """One BLAS thread for each product meanwhile, where threadpoolctl is installed: the loops have the threads."""
    blas = _blas()
    if blas is None:  # it has one anyway
        yield
        return
    _unclaim(blas)
    limit = blas.limit(limits=1)
    try:
        yield
    finally:
        _unclaim(blas)
        limit.restore_original_limits()
        _unclaim(blas)


def _unclaim(blas: Any) -> None:
    """Lets this thread change the limit: newer versions of threadpoolctl ignore all but the one that did so first."""
    for library in blas.lib_controllers:
        if hasattr(library, "clear_controlling_thread"):
            library.clear_controlling_thread(force=True)


@contextmanager
def quick_switches() -> Iterator[None]:
    """Threads that come back from NumPy wait for the interpreter's lock 10 microseconds at most, not 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


# glibc's options by number, and what they are set to: all threads have one pool of memory, from which arrays of up to
# 32 MB are taken (the most that it allows); it grows by 64 MB at a time, and up to 2 GB that are free in it are kept.
_MALLOC = ((-8, 1), (-3, 2**25), (-2, 2**26), (-1, 2**31 - 1))


@cache
def keep_freed_memory() -> None:
    """What a step frees is kept for the next, from the first loop in threads on.

    Else glibc gives it back to the system, which clears every page of it anew in each step. With another C library than
    glibc this does nothing.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in _MALLOC:
            mallopt(option, value)


_settings = threading.Lock()
_users = 0  # of `process_settings`
_set = ExitStack()


@contextmanager
def process_settings() -> Iterator[None]:
    """What threads need of the process meanwhile: one BLAS thread and quick switches. The last that is here gives them
    back."""
    global _users
    keep_freed_memory()
    with _settings:
        if not _users:
            _set.enter_context(one_blas_thread())
            _set.enter_context(quick_switches())
        _users += 1
    try:
        yield
    finally:
        with _settings:
            _users -= 1
            if not _users:
                _set.close()
