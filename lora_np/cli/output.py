"""What the commands show: results on standard output, progress on standard error.

Names and texts come from files that anyone may have written, so every line is `shown`: none can be taken for another.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from ..formats.files.json_file import to_json
from ..formats.files.messages import MAX_LINE, shown
from ..training.loop import TrainingError
from ..training.ranks import Ranks
from .streams import show

# What is said in one line.
FAILURES = (TrainingError, ValueError, TypeError, OSError, ImportError, MemoryError, KeyboardInterrupt)
GRACE = 1.0  # seconds
WITHOUT_BAR = "{desc}: {n_fmt}/{total_fmt} {remaining}{postfix}"  # tqdm's own, with all that it tells, is too long
WITH_BAR = WITHOUT_BAR.replace(" {rem", " |{bar}| {rem")
LEAST_BAR = 4  # characters


class Bar:
    """Progress on standard error: tqdm's bar where it is installed and somebody watches, else a line now and then."""

    def __init__(self, *, shown: bool = True) -> None:
        self.shown = shown
        self.stage = ""
        self.bar: Any = None
        self.last_line = 0.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, stage: str, step: int, steps: int, text: str) -> None:
        """Shows that a stage is at `step` of `steps`."""
        if not self.shown:
            return
        if stage != self.stage:
            self._start(stage, steps)
        if self.bar is not None:
            columns = self.bar.format_dict["ncols"] or MAX_LINE
            used = len(f"{stage}: {step}/{steps} || 0:00:00, {text}")
            self.bar.bar_format = WITH_BAR if used + LEAST_BAR < columns else WITHOUT_BAR
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif step == steps or time.monotonic() - self.last_line > 5:
            self.last_line = time.monotonic()
            print(f"{stage}: step {step} of {steps}, {text}", file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        """A line for whoever watches."""
        if self.shown:
            print(shown(line, MAX_LINE), file=sys.stderr, flush=True)

    def _start(self, stage: str, steps: int) -> None:
        self.stage, self.last_line = stage, time.monotonic()
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=steps, desc=stage, file=sys.stderr, dynamic_ncols=True, bar_format=WITH_BAR)


def failure(error: BaseException) -> tuple[int, str]:
    """The exit status, and what is said: a line, or the traceback of what should not happen."""
    if isinstance(error, KeyboardInterrupt):
        return 130, shown(str(error), MAX_LINE) or "interrupted; nothing is half written"
    if isinstance(error, TrainingError):
        return 1, shown(str(error), MAX_LINE)
    if isinstance(error, MemoryError):
        return 2, f"not enough memory: {error}".rstrip(": ")
    if isinstance(error, FAILURES):
        return 2, shown(str(error), MAX_LINE)
    lines = "".join(traceback.format_exception(error)).split("\n")
    return 1, "\n".join(shown(line, MAX_LINE) for line in lines)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM, with which mpirun passes Ctrl-C on to its ranks, is a KeyboardInterrupt meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def one_end(ranks: Ranks) -> Iterator[None]:
    """An exception in one rank ends them all: they would wait for it for ever."""
    try:
        yield
    except BaseException as error:
        if ranks.size == 1:
            raise
        if not ranks.is_first:
            time.sleep(GRACE)  # where all fail alike, the first says it, and once
        status, text = failure(error)
        print(f"lora-np: rank {ranks.rank} of {ranks.size}: {text}", file=sys.stderr, flush=True)
        ranks.end(status)


def emit(args: argparse.Namespace, result: Any, lines: list[str], *, longest: int = MAX_LINE) -> None:
    """The result: as JSON with --json, else as lines, each of `longest` characters at most.

    A ValueError if it holds a number that is NaN or infinite: there is nothing to be concluded from it.
    """
    try:
        text = to_json(result, indent=2)
    except ValueError:
        raise ValueError("the result holds a number that is NaN or infinite: what was computed overflowed") from None
    show(text if args.json else "\n".join(shown(line, longest) for line in lines))


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of aligned columns, all but the first to the right."""
    rows = [[shown(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
