"""Write, then rename: a reader sees the old files or the new ones, never half of one."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ...backend import Array
from .safe import import_safetensors


def write_tensors(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of host arrays. Only an array that is not contiguous is copied."""
    safetensors = import_safetensors()
    contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    try:
        safetensors.numpy.save_file(contiguous, path, metadata=dict(metadata) if metadata else None)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: could not be written: {error}") from error


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder to write into; it gets the name `target` when all is written, and is gone if anything fails.

    A FileExistsError if there is something of that name already.
    """
    refuse_existing(target)
    with _partial(target.parent, target.name) as folder:
        yield folder
        _sync_all(folder)
        os.rename(folder, target)
        _sync(target.parent)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """`new_folder` for a single file: the path that is to be written."""
    refuse_existing(target)
    with _partial(target.parent, target.name) as folder:
        yield folder / target.name
        _sync(folder / target.name)
        refuse_existing(target)  # a rename would write over a file that came to be meanwhile
        os.rename(folder / target.name, target)
        _sync(target.parent)


def refuse_existing(target: Path) -> None:
    """A FileExistsError if there is something of that name already."""
    if os.path.lexists(target):
        raise FileExistsError(f"{target}: exists already; it is not written over")


@contextmanager
def replaced_files(target: Path, *, last: str) -> Iterator[Path]:
    """A temporary folder to write into; its files then take their places in the folder `target`, one by one.

    Until all are written and on the disk, none is moved; the file named `last` moves last.
    """
    with _partial(target, "new") as folder:
        yield folder
        _sync_all(folder)
        for name in sorted(os.listdir(folder), key=lambda name: (name == last, name)):
            os.replace(folder / name, target / name)
        _sync(target)


@contextmanager
def _partial(parent: Path, name: str) -> Iterator[Path]:
    """A folder in `parent` that is gone afterwards, with what is still in it."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f".{name}.{secrets.token_hex(4)}.partial"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync_all(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name != "posix":  # a folder cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
