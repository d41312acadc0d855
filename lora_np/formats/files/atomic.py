"""Write, then rename: a reader sees the old files or the new ones, never half of one."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from ...backend import Array
from .safetensors_file import import_safetensors

PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.partial")  # the folders that a killed process leaves


def write_tensors(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of host arrays. Only an array that is not contiguous is copied. Without a tensor there is no
    metadata either: safetensors 0.4 writes a file then that nobody can read."""
    safetensors = import_safetensors()
    contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # as the umask has it; what save_file puts in its place is its owner's alone
    try:
        safetensors.numpy.save_file(contiguous, path, metadata=dict(metadata) if metadata and tensors else None)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: could not be written: {error}") from error
    path.chmod(mode)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder to write into; it gets the name `target` when all is written, and is gone if anything fails.

    A FileExistsError if there is something of that name already.
    """
    refuse_existing(target)
    with _partial(target.parent, target.name) as folder:
        yield folder
        _sync_all(folder)
        try:
            os.rename(folder, target)
        except OSError:
            refuse_existing(target)  # another process was first
            raise
        _sync(target.parent)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """`new_folder` for a single file: the path that is to be written."""
    refuse_existing(target)
    with _partial(target.parent, target.name) as folder:
        yield folder / target.name
        _sync(folder / target.name)
        try:
            os.link(folder / target.name, target)  # a rename would write over a file that came to be meanwhile
        except OSError:  # it did, or this file system has no links
            refuse_existing(target)
            os.rename(folder / target.name, target)
        _sync(target.parent)


def refuse_existing(target: Path) -> None:
    """A FileExistsError if there is something of that name already."""
    if os.path.lexists(target):
        raise FileExistsError(f"{target}: exists already; it is not written over")


def expect_new(target: Path) -> None:
    """Before long work: a FileExistsError if there is something of that name, an OSError if it cannot be written."""
    refuse_existing(target)
    with _partial(target.parent, target.name):
        pass


def discard(target: Path) -> None:
    """Removes a folder, if it is there; none sees a part of it."""
    with _partial(target.parent, target.name) as folder, suppress(FileNotFoundError):
        os.rename(target, folder / target.name)


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


def is_partial(path: Path) -> bool:
    """Whether it is a folder that a killed process left: what only has such a name is somebody else's."""
    return PARTIAL.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()


@contextmanager
def _partial(parent: Path, name: str) -> Iterator[Path]:
    """A folder in `parent` that is gone afterwards, with what is still in it. An OSError names a file."""
    with made(parent):
        folder = parent / f".{name}.{secrets.token_hex(4)}.partial"
        folder.mkdir()
        try:
            yield folder
        except OSError as error:
            if error.filename is None and error.errno is not None:  # a full disk, say
                error.filename = str(parent)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """The folder is there meanwhile, and those above it; what was made of them and stays empty is gone afterwards."""
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    above = new[-1].parent if new else folder
    if not above.is_dir():
        raise NotADirectoryError(f"{above}: expected a folder, got a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for one in new:
            with suppress(OSError):  # there is something in it
                one.rmdir()


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
