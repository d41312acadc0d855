"""A merged model's folder: the base's, byte for byte but for the tensors that are merged and what follows from them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..adapters.task import TASK
from ..files.atomic import new_folder
from ..files.json_file import read_json, write_json
from ..files.safetensors_writer import write_stream
from ..files.stamp import changed
from ..models.folder import CONFIG, own_header, stored_hash
from ..models.shards import INDEX, stored_tensors
from ..models.tokenizer_files import TOKENIZER_FILES
from .plan import plan_merge
from .target import Plan

# Weights beside those that were read, or in another format: the base's still, and no part of the merged model.
OTHER_WEIGHTS = (
    r"([^/]*\.safetensors|pytorch_model[^/]*\.bin|tf_model[^/]*\.h5|flax_model[^/]*\.msgpack)(\.index\.json)?"
)

# What an adapter's folder may have beside its tensors: a tokenizer, as where tokens were added, and its labels.
BESIDE = (TASK, *TOKENIZER_FILES)


GGUF_OF_FOLDER = (
    "a model's folder is made a .gguf file by llama.cpp's convert_hf_to_gguf.py FOLDER --outfile FILE, which knows the "
    "metadata and the tokenizer of each architecture"
)


class Merged(NamedTuple):
    """What a merge did: how many tensors it made and kept, and the base's files that it left out.

    taken    files of the tokenizer, and of the labels, that are the adapter's
    remarks  what is wrong with the adapters, though they can be merged
    """

    made: int
    kept: int
    left_out: list[str]
    taken: list[str]
    remarks: list[str]


def merge_folder(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    weights: Sequence[float],
    out: str | os.PathLike[str],
) -> Merged:
    """L5: writes the model of a base's folder and adapters' folders, W0 + sum_i w_i s_i B_i A_i, as a new folder.

    No more is held than one tensor, as it is and in its parts, and the adapters. Every other file, and every other
    tensor's bytes, are the base's; config.json changes where the model is another (a head, untied tables). All is
    written beside `out` and renamed at the end. A FileExistsError if there is anything at `out`; a ValueError or
    FileNotFoundError, in one line, says what does not fit, and where: a weight that is NaN or infinite too, and a file
    that was changed after it was checked.

    What is copied into the new folder is the base's own: a link's file is taken, weights' too, if it lies in the base's
    folder, or is one of the hub's cache (snapshots/x/FILE -> blobs/y); a ValueError names a link that leads elsewhere,
    and one to a folder.
    """
    target, folder, paths = Path(out), Path(base), [Path(adapter) for adapter in adapters]
    if target.suffix.lower() == ".gguf":
        raise ValueError(f"{target}: expected a name for a folder, as the base is one, got .gguf's: {GGUF_OF_FOLDER}")
    for other in (folder, *paths):
        if target.resolve().is_relative_to(other.resolve()):
            raise ValueError(f"{target}: expected a folder outside of {other}, which is not written into")
    with new_folder(target) as new:
        plan = plan_merge(folder, paths, weights)
        others = list(_other_files(folder))
        read = {CONFIG, *(path.name for path in plan.files), *([INDEX] if plan.sharded else [])}
        left_out = [name for name in others if name not in read and re.fullmatch(OTHER_WEIGHTS, name)]
        beside = {name: path / name for path in paths for name in BESIDE if (path / name).is_file()}
        for name in others:
            if name not in left_out:
                _check_link(folder, folder / name)
            if name not in read and name not in left_out and name not in beside:
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, new / name)
        for name, path in beside.items():
            _check_link(path.parent, path)
            shutil.copyfile(path, new / name)
        _write_tensors(plan, new)
        _write_config(plan, new)  # last: without it, no program takes the folder for a model's
    made = sum(target.kept is None for target in plan.targets)
    return Merged(made, len(plan.targets) - made, left_out, sorted(map(str, beside.values())), list(plan.remarks))


def _other_files(folder: Path) -> Iterator[str]:
    """The names of the folder's files, those in its subfolders too; a ValueError for what is neither of the two.

    An OSError names a subfolder that cannot be read.
    """
    for root, folders, files in os.walk(folder, onerror=_raise):
        for name in [*folders, *files]:
            path = Path(root, name)
            if path.is_symlink() and path.is_dir():
                raise ValueError(f"{path}: a link to a folder, which is not followed")
            if name in files:
                if not path.is_file():
                    raise ValueError(f"{path}: expected a file, got something else, or a link to nothing")
                yield path.relative_to(folder).as_posix()


def _raise(error: OSError) -> None:
    raise error


def _check_link(folder: Path, path: Path) -> None:
    """A ValueError if a file of the folder is a link that leads out of it, and not to the blobs of a hub's cache."""
    own = folder.resolve()
    blobs = [parent.parent / "blobs" for parent in own.parents if parent.name == "snapshots"]
    found = path.resolve()
    if not any(found.is_relative_to(allowed) for allowed in (own, *blobs)):
        raise ValueError(f"{path}: a link out of the base's folder, to {found}: put the file itself there")


def _copy_as_read(source: Path, target: Path, **read: Any) -> None:
    """Copies a JSON file; a ValueError unless it still has the values that were read of it."""
    shutil.copyfile(source, target)
    found = read_json(target)
    if any(found.get(key) != value for key, value in read.items()):
        raise changed(source)


def _write_tensors(plan: Plan, new: Path) -> None:
    """The merged files, and the index where their names are others."""
    sizes: dict[str, int] = {}
    places: dict[str, str] = {}
    for path, targets in plan.files.items():
        header, by_key = plan.merged_header(path), {t.key: t for t in targets}
        write_stream(new / path.name, header, (by_key[key].parts_bytes() for key in header.by_place))
        sizes |= {t.key: t.size() for t in targets}
        places |= dict.fromkeys(by_key, path.name)
    if not plan.sharded:
        return
    source = plan.folder / INDEX
    if places.keys() == {key for header in plan.headers.values() for key in header.tensors}:
        _copy_as_read(source, new / INDEX, weight_map=places)
        return
    index = read_json(source)
    metadata = index.get("metadata")
    if isinstance(metadata, dict):
        index["metadata"] = metadata | {"total_size": sum(sizes.values())}
    write_json(new / INDEX, index | {"weight_map": places})


def _write_config(plan: Plan, new: Path) -> None:
    """config.json: the base's bytes, unless the model is another."""
    if plan.about is None:
        assert plan.config is not None
        write_json(new / CONFIG, own_header(plan.config, stored_hash(stored_tensors(new))))
    elif plan.about == plan.raw:
        _copy_as_read(plan.folder / CONFIG, new / CONFIG, **plan.about)
    else:
        write_json(new / CONFIG, plan.about)
