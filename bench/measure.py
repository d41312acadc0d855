"""Measuring: each side of a comparison in a process of its own, all of them in turn, so that drift falls on all alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple

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
    """One case: the seconds of each round, what the last call gave, and the most bytes that its process has held."""

    seconds: list[float]
    value: Any
    peak: int


Measured = Mapping[str, Mapping[str, Timing]]  # by side and case


class Worker:
    """The process of a side; see bench.worker."""

    def __init__(self, side: Side) -> None:
        command = [sys.executable, "-m", "bench.worker", side.make, json.dumps(side.arguments), str(side.threads or 1)]
        environment = {**os.environ, **({} if side.threads is None else ONE_THREAD)}
        self.side = side
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        first = self._answer()
        self.cases: list[str] = first.get("cases", [])
        self.missing: str | None = first.get("missing")

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.process.kill()
        self.process.communicate()  # the end of its input ends it

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


def measure(sides: Iterable[Side], *, rounds: int) -> Measured:
    """The times of all cases of all sides, each once a round. A side whose packages are missing is said and left out."""
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(side)) for side in sides]
        for worker in workers:
            if worker.missing is not None:
                print(f"{worker.side.name}: left out: {worker.missing}", file=sys.stderr)
        asked = [(worker, case) for worker in workers for case in worker.cases]
        for worker, case in asked:
            worker.ask(case)
        answers = [[_after_a_pause(worker, case) for worker, case in asked] for _ in range(rounds)]
    measured: dict[str, dict[str, Timing]] = {}
    for i, (worker, case) in enumerate(asked):
        mine = [answers_of_round[i] for answers_of_round in answers]
        timing = Timing([answer["seconds"] for answer in mine], mine[-1]["value"], mine[-1]["peak"])
        measured.setdefault(worker.side.name, {})[case] = timing
    return measured


def _after_a_pause(worker: Worker, case: str) -> dict[str, Any]:
    time.sleep(PAUSE)
    return worker.ask(case)
