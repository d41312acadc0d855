"""Measuring: each side of a comparison in a process of its own, all in turn, so that drift falls on all alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from .counting import Counts
from .figures import Figure
from .options import Options

ROOT = Path(__file__).resolve().parents[1]
AT_LEAST = 0.05  # seconds that one timing of a case fills with calls of it
PAUSE = 0.05  # seconds between two sides: idle threads of the one before go to sleep
ONE_THREAD = dict.fromkeys(
    ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)


class Side(NamedTuple):
    """One process: its name, the function that gives its cases ("bench.step:ours"), and that function's arguments.

    threads: how many threads run a case at once, each with data and one BLAS thread of its own; None: the case is
    called once, and takes the threads that it likes.
    """

    name: str
    make: str
    arguments: Mapping[str, Any] = {}
    threads: int | None = None


class Timing(NamedTuple):
    """One case: the seconds of each round, what the last call gave, and the most bytes held; see bench.device.

    counts: on a GPU, what a call asked of it, by name; see bench.counting.
    """

    seconds: list[float]
    value: Any
    peak: int
    counts: Counts

    def asked(self, of: Figure) -> Iterator[Figure]:
        """The counts of a call as figures beside that of its time; what it did not ask for is left out."""
        for what, count in self.counts.items():
            if count:
                yield of._replace(what=f"{of.what}, {what}", unit=what.split()[0], values=[count])


Measured = Mapping[str, Mapping[str, Timing]]  # by side and case


class Worker:
    """The process of a side; see bench.worker."""

    def __init__(self, side: Side, at_least: float) -> None:
        given = [side.make, json.dumps(side.arguments), str(side.threads or 1), str(at_least)]
        command = [sys.executable, "-m", "bench.worker", *given]
        environment = {**os.environ, **({} if side.threads is None else ONE_THREAD)}
        self.side = side
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT, text=True
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.process.kill()
        self.process.communicate()  # the end of its input ends it

    def cases(self) -> list[str]:
        """The names of its cases, once it is ready: none where a package is missing, which is said."""
        first = self._answer()
        if "missing" in first:
            print(f"{self.side.name}: left out: {first['missing']}", file=sys.stderr)
        return first.get("cases", [])

    def ask(self, case: str) -> dict[str, Any]:
        """Warms the case up, the first time; then times it."""
        assert self.process.stdin is not None
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.side.name}: {self.side.make} ended with status {self.process.wait()}")
        return json.loads(line)


def measure(sides: Iterable[Side], o: Options) -> Measured:
    """The times of all cases of all sides, each once a round. A side whose packages are missing is named, left out."""
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(side, 0 if o.quick else AT_LEAST)) for side in sides]
        asked = [(worker, worker.cases()) for worker in workers]
        for worker, cases in asked:
            for case in cases:
                worker.ask(case)
        answers = [[_after_a_pause(worker, cases) for worker, cases in asked] for _ in range(o.rounds)]
    return {
        worker.side.name: {
            case: Timing([one[i][case]["seconds"] for one in answers], last["value"], last["peak"], last["counts"])
            for case, last in answers[-1][i].items()
        }
        for i, (worker, cases) in enumerate(asked)
        if cases
    }


def _after_a_pause(worker: Worker, cases: list[str]) -> dict[str, dict[str, Any]]:
    """One round of a side."""
    time.sleep(PAUSE)
    return {case: worker.ask(case) for case in cases}
