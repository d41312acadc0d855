"""An adapter's modules in a base's files: by the same names, or by names that differ in one prefix alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from itertools import islice

from ..files.messages import shown

CANDIDATES = 5000  # names that are compared letter by letter, for a message


def prefixes(names: Iterable[str]) -> set[str]:
    """Every module that these tensors stand in: each name without its last part, or its last parts."""
    found = set()
    for name in names:
        while "." in name:
            name = name.rpartition(".")[0]
            if name in found:
                break
            found.add(name)
    return found


def moved(name: str, away: str, to: str) -> str | None:
    """A name with the prefix `to` in the place of `away`; None if it does not begin with that."""
    if away and not name.startswith(f"{away}."):
        return None
    rest = name[len(away) + 1 :] if away else name
    return f"{to}.{rest}" if to else rest


def change_of_prefix(names: Collection[str], known: Collection[str]) -> tuple[str, str] | None:
    """The one prefix in the place of another with which all names are known; None if there is none, or several.

    No number is a part of it: another layer is no mending.
    """
    first = next(iter(names))
    parts = first.split(".")
    found = set()
    for other in known:
        theirs = other.split(".")
        n = 0
        while n < min(len(parts), len(theirs)) and parts[-1 - n] == theirs[-1 - n]:
            n += 1
        away, to = parts[: len(parts) - n], theirs[: len(theirs) - n]
        if n and not any(part.isdecimal() for part in (*away, *to)):
            found.add((".".join(away), ".".join(to)))
    fitting = [pair for pair in sorted(found) if all(moved(name, *pair) in known for name in names)]
    return fitting[0] if len(fitting) == 1 else None


def nearest(name: str, known: Collection[str]) -> str:
    """What to say of a name that is not known: the names most like it."""
    some = list(islice(known, CANDIDATES))
    close = get_close_matches(name[-200:], some, n=3, cutoff=0.6)
    return f"; nearest are {' '.join(map(shown, close))}" if close else ""
