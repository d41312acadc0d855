"""Times of functions beside each other: called in turn, so that a drift of the machine's speed falls on all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

Seconds: TypeAlias = Mapping[str, Sequence[float]]  # of one call in each round, by function


class Ratio(NamedTuple):
    """One function's time over another's in the same round: the median of all rounds, the least and the most."""

    median: float
    least: float
    most: float


def in_turn(functions: Mapping[str, Callable[[], Any]], *, rounds: int, at_least: float = 0.1) -> Seconds:
    """The seconds of a call of each function in each round: in a round it is called as often as fills `at_least`.

    A first call of each is not counted. A function must return only when its work is done, on a GPU too.
    """
    calls = {name: max(1, round(at_least / max(_timed(function, 1), 1e-9))) for name, function in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(_timed(function, calls[name]))
    return seconds


def _timed(function: Callable[[], Any], calls: int) -> float:
    """The seconds of one of so many calls."""
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - began) / calls


def ratio(seconds: Seconds, one: str, base: str) -> Ratio:
    """How much longer `one` takes than `base`, round by round."""
    of = [a / b for a, b in zip(seconds[one], seconds[base], strict=True)]
    return Ratio(statistics.median(of), min(of), max(of))
