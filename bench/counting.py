"""What a call asks of a GPU, counted from outside of CuPy, without a profiler.

Meanwhile each public function of CuPy's, and each operator and method of its arrays, goes through a counter. It looks
at the outermost call alone: what CuPy calls within one is not counted again.

launches              calls that compute an array or fill one. Each starts a kernel, a copy on the device or cuBLAS, and
                      some start more (a reduction of many elements, a product that is split): the count is the least
                      number of launches. Views start none, nor does room that is not filled.
copies to the device  host arrays and lists sent: array, asarray, set
copies to the host    arrays fetched: asnumpy, get, and all that needs a value, as item(), float(a) and `if a:` do
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any
from unittest.mock import patch

import numpy as np

from lora_np.backend import xp

LAUNCHES, SENT, FETCHED = "launches", "copies to the device", "copies to the host"
Counts = dict[str, int]

BINARY = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul"]
OTHERS = ["eq", "ne", "lt", "le", "gt", "ge", "neg", "abs", "invert", "getitem", "setitem", "array_ufunc"]
IN_PLACE = {f"__i{name}__" for name in BINARY}
OPERATORS = IN_PLACE | {f"__{before}{name}__" for before in ("", "r") for name in BINARY}
OPERATORS |= {f"__{name}__" for name in OTHERS}
VALUES = {f"__{name}__" for name in ("bool", "int", "float", "complex", "str", "repr", "format")}
FETCHES = VALUES | {"asnumpy", "get", "item", "tolist"}
SENDS = {"array", "asarray", "set"}
ROOM = {"empty", "empty_like"}


class Counted:
    """A function, operator or method of CuPy's, which counts what its outermost calls ask for."""

    inside = False  # of any of them: CuPy's own calls are no one else's

    def __init__(self, name: str, function: Any, counts: Counts) -> None:
        self.name, self.function, self.counts = name, function, counts

    def __get__(self, array: Any, kind: Any = None) -> Any:
        """A method is of its array."""
        return self if array is None else MethodType(self, array)

    def __getattr__(self, name: str) -> Any:
        """What an elementwise function has too: add.at."""
        found = getattr(self.function, name)
        return Counted(name, found, self.counts) if callable(found) else found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if Counted.inside:
            return self.function(*args, **kwargs)
        Counted.inside = True
        try:
            result = self.function(*args, **kwargs)
            what = self._asked(result, args, kwargs)
        finally:
            Counted.inside = False
        if what is not None:
            self.counts[what] += 1
        return result

    def _asked(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """What the call that gave this result is counted as."""
        if self.name in FETCHES:
            return FETCHED if isinstance(args[0], xp.ndarray) else None
        if self.name in SENDS and any(isinstance(a, (np.ndarray, list, tuple)) and np.ndim(a) for a in args):
            return SENT
        wrote = result is None or self.name in IN_PLACE or isinstance(self.function, xp.ufunc)
        return LAUNCHES if wrote or result is kwargs.get("out") or self._made(result, args) else None

    def _made(self, result: Any, args: tuple[Any, ...]) -> bool:
        """Whether it is a new array that is filled: not a view of an argument, nor the argument itself."""
        if isinstance(result, (tuple, list)):
            return any(self._made(one, args) for one in result)
        if not isinstance(result, xp.ndarray) or self.name in ROOM:
            return False
        return not any(isinstance(a, xp.ndarray) and xp.may_share_memory(result, a) for a in args)


@contextmanager
def counting() -> Iterator[Counts]:
    """Counts what is asked of CuPy meanwhile."""
    counts = dict.fromkeys((LAUNCHES, SENT, FETCHED), 0)
    with ExitStack() as stack:
        for owner, name, function in _functions():
            stack.enter_context(patch.object(owner, name, Counted(name, function, counts)))
        yield counts


def _functions() -> list[tuple[Any, str, Callable[..., Any]]]:
    """Each function that is counted: where it stands, its name, and itself."""
    owners: list[Any] = [xp, xp.linalg, xp.ndarray]
    found = [(owner, name, getattr(owner, name)) for owner in owners for name in dir(owner)]
    return [
        (owner, name, value)
        for owner, name, value in found
        if callable(value) and not isinstance(value, type) and (name[0] != "_" or name in OPERATORS | VALUES)
    ]
