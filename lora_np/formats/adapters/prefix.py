"""Names that differ in one prefix alone: `model.layers...` and `layers...`."""

from __future__ import annotations

from collections.abc import Collection


def moved(name: str, away: str, to: str) -> str | None:
    """A name with the prefix `to` in the place of `away`; None if it does not begin with that."""
    if away and not name.startswith(f"{away}."):
        return None
    rest = name[len(away) + 1 :] if away else name
    return f"{to}.{rest}" if to else rest


def difference(name: str, other: str) -> tuple[str, str]:
    """The prefix of a name, and of another, behind which they are the same."""
    parts, theirs = name.split("."), other.split(".")
    n = 0
    while n < min(len(parts), len(theirs)) and parts[-1 - n] == theirs[-1 - n]:
        n += 1
    return ".".join(parts[: len(parts) - n]), ".".join(theirs[: len(theirs) - n])


def change_of_prefix(names: Collection[str], known: Collection[str]) -> tuple[str, str] | None:
    """The one prefix in the place of another with which all names are known; None if there is none, or several.

    No number is a part of it: another layer is no mending.
    """
    fitting = [
        pair for pair in _changes(next(iter(names)), known) if all(moved(name, *pair) in known for name in names)
    ]
    return fitting[0] if len(fitting) == 1 else None


def likeliest_change(names: Collection[str], known: Collection[str]) -> tuple[str, str] | None:
    """The one prefix in the place of another with which most names are known; None if there is none."""
    known_by = {
        pair: sum(moved(name, *pair) in known for name in names) for pair in _changes(min(names, key=len), known)
    }
    return max(known_by, key=lambda pair: known_by[pair], default=None)


def _changes(name: str, known: Collection[str]) -> list[tuple[str, str]]:
    """The prefixes, away and in their place, with which a name is known."""
    found = {difference(name, other) for other in known}
    return sorted(
        (away, to)
        for away, to in found
        if away != name and not any(part.isdecimal() for part in f"{away}.{to}".split("."))
    )
