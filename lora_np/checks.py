"""What callers pass: an error says what was expected, what came, and where."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeGuard

import numpy as np

from .backend import Array, asnumpy, xp


def as_array(what: str, a: Any, *, host: bool = False) -> Array:
    """`a`, an array or nested lists of one length, on the device, or on the host; a TypeError names what is none."""
    try:
        found = asnumpy(a) if host else xp.asarray(a)
    except ValueError:
        raise TypeError(f"{what}: expected an array of numbers, got rows of different lengths") from None
    except (RuntimeError, TypeError) as error:  # which says why: a tensor that requires grad, or is on another device
        raise TypeError(f"{what}: expected an array of numbers, got {type(a).__name__}: {error}") from None
    if found.dtype.kind in "SU":
        hint = "; a tokenizer makes tokens of it (load_tokenizer)" if what == "tokens" else ""
        raise TypeError(f"{what}: expected an array of numbers, got text{hint}")
    if found.dtype.kind == "O":
        raise TypeError(f"{what}: expected an array of numbers, got {type(a).__name__}")
    return found


def expect(what: str, value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """A TypeError unless a value is of the kind that is wanted."""
    if not isinstance(value, kind):
        raise TypeError(f"{what}: expected {wanted}, got {type(value).__name__}")


def check_count(what: str, value: object, *, at_least: int) -> None:
    """A ValueError unless a value is an integer that is not below `at_least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < at_least:
        raise ValueError(f"{what}: expected an integer of at least {at_least}, got {value!r}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, Python's or NumPy's."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)


def few(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    first = sorted(names)
    return ", ".join(first[:5]) + (f" and {len(first) - 5} more" if len(first) > 5 else "")
