"""A path that is to be read as a file: what is said where it is none."""

from __future__ import annotations

from pathlib import Path


def expect_file(path: Path) -> None:
    """A FileNotFoundError if there is nothing of this name; a ValueError if it is a folder, a pipe or a device."""
    if path.is_file():
        return
    if path.is_dir():
        raise ValueError(f"{path}: expected a file, got a folder")
    if path.exists():
        raise ValueError(f"{path}: no regular file: save in one what this pipe or device gives")
    raise FileNotFoundError(f"{path}: no such file")
