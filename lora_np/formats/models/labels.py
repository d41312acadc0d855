"""The names of a classifier's or tagger's labels, as a model's config.json has them."""

from __future__ import annotations

from pathlib import Path

from ..files.json_file import read_json

CONFIG = "config.json"


def named_labels(path: Path, n: int) -> tuple[str, ...] | None:
    """The names of n labels in id2label of a model's folder; None if it names others, or is none.

    A ValueError if id2label is no object of names by their numbers.
    """
    if not (path / CONFIG).is_file():
        return None
    found = read_json(path / CONFIG).get("id2label")
    if found is None or (isinstance(found, dict) and len(found) != n):
        return None
    numbers = [str(i) for i in range(n)]
    names = [found.get(i) for i in numbers] if isinstance(found, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{path / CONFIG}: id2label: expected a name for each of {' '.join(numbers)}, got {found!r:.60}"
        )
    return tuple(map(str, names))
