"""The vectors as files: one of safetensors for each id, and a manifest that says what is in them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array
from ..formats.files.atomic import new_folder, write_tensors
from ..formats.files.json_file import read_json, to_json, write_json
from ..formats.files.messages import named, shown
from ..formats.files.safetensors_file import TensorFile, open_tensors
from .adapter_files import FILES, write_file_cases
from .answers import Answer, answers, computed
from .cases import VERSIONS, Case, all_cases
from .narrow import INPUTS, narrowed
from .operations import OPERATIONS
from .precision import FLOAT32, PRECISIONS
from .refusals import REFUSALS, write_refusals
from .statements import STATEMENTS

SCHEMA = 1  # of the manifest, and of the tensors' names
MANIFEST = "manifest.json"
READABLE = ("F64", "F32", "F16", "BF16", "I64", "I32", "BOOL")
LAYOUT = {
    "CASE/in/NAME": "an input, F32 (exact), I64 or BOOL",
    "CASE/out/NAME": "an output expected, F64 or I64",
    "CASE/grad/NAME": "the gradient of the loss by the input NAME, F64; the loss is `loss`, or sum(dY * Y) with the "
    "input dY for the output Y",
    "CASE/float32/out/NAME, CASE/float32/grad/NAME": "the same, rounded to F32",
    "CASE/bound/out/NAME, CASE/bound/grad/NAME": "F32: the most by which each element may differ if computed in "
    "float32; 0: exactly equal. In float64: 2^-28 of it",
    "results": "a folder with a file ID.safetensors for each id that was computed, and in it CASE/out/NAME and "
    "CASE/grad/NAME of every case, in the precision that was computed in",
}


class Vectors(NamedTuple):
    """The cases, each with what it has to give, and the digest of all that does not depend on the machine."""

    digest: str
    cases: Sequence[tuple[Case, Mapping[str, Answer]]]
    version: str = VERSIONS[-1]
    precision: str = FLOAT32.name


def made(
    ids: Collection[str] | None = None, *, version: str = VERSIONS[-1], precision: str = FLOAT32.name
) -> Vectors:  # fmt: skip
    """A version's vectors, computed here and now; of these ids alone, if they are given, but with the digest of all."""
    cases, _ = narrowed(all_cases(version), precision)
    shown = [(case, answers(case)) for case in cases if ids is None or case.id in ids]
    return Vectors(digest(((case, computed(case)) for case in cases), version, precision), shown, version, precision)


def digest(cases: Iterable[tuple[Case, Mapping[str, Any]]], version: str, precision: str = FLOAT32.name) -> str:
    """SHA-256 of the schema, the version and the precision if it is not float32, of each case but its title, and of its
    inputs as they stand in the file.

    Of what it has to give, which comes by name as arrays or Answers, the shapes alone.
    """
    what = [SCHEMA, version, *([] if precision == FLOAT32.name else [precision])]
    total = hashlib.sha256(to_json(what).encode())
    for case, wanted in cases:
        entry = {name: value for name, value in _entry(case, wanted).items() if name != "title"}
        total.update(json.dumps(entry, sort_keys=True, allow_nan=False).encode())
        for name in sorted(case.inputs):
            total.update(_stored(case.inputs[name]).tobytes())
    return total.hexdigest()


def write_vectors(folder: Path, vectors: Vectors) -> None:
    """A new folder with a file for each id and the manifest; and folders of adapters, as files, right and wrong ones.

    A FileExistsError if there is something of that name.
    """
    with new_folder(folder) as partial:
        for id in dict.fromkeys(case.id for case, _ in vectors.cases):
            tensors = [_tensors(case, wanted) for case, wanted in vectors.cases if case.id == id]
            write_tensors(partial / f"{id}.safetensors", {name: a for one in tensors for name, a in one.items()})
        if (vectors.version, vectors.precision) == (VERSIONS[-1], FLOAT32.name):
            write_file_cases(partial / FILES)
            write_refusals(partial / REFUSALS)
        write_json(partial / MANIFEST, _manifest(vectors))


def _tensors(case: Case, wanted: Mapping[str, Answer]) -> dict[str, Array]:
    """The tensors of a case, by their names in the file."""
    tensors = {f"{case.name}/in/{name}": _stored(a) for name, a in case.inputs.items()}
    for name, (value, bound) in wanted.items():
        tensors[f"{case.name}/{name}"] = value
        if value.dtype.kind == "f":
            tensors[f"{case.name}/float32/{name}"] = value.astype(np.float32)
        tensors[f"{case.name}/bound/{name}"] = bound
    return tensors


def _stored(a: Array) -> Array:
    """An input as its file has it, the low byte first."""
    return a.astype("<f4") if a.dtype.kind == "f" else a.astype("<i8") if a.dtype.kind == "i" else a


def _manifest(vectors: Vectors) -> dict[str, Any]:
    texts = ("title", "equation", "inputs", "outputs", "scalars")
    return {
        "schema": SCHEMA, "version": vectors.version, "digest": vectors.digest, "layout": LAYOUT, **_precision(vectors),
        "statements": {id: _statement(id) for id in dict.fromkeys(case.id for case, _ in vectors.cases)},
        "operations": {op.name: {text: getattr(op, text) for text in texts} for op in OPERATIONS.values()},
        "cases": [_entry(case, wanted) for case, wanted in vectors.cases],
    }  # fmt: skip


def _precision(vectors: Vectors) -> dict[str, Any]:
    """What the cases are computed in, how their inputs are made such, and which cases mean nothing in it."""
    name = vectors.precision
    if name == FLOAT32.name:
        return {}
    bounds = f"F32: the most by which each element may differ if computed in {name}, as P1 says; 0: exactly equal"
    layout = {key: bounds if "bound" in key else text for key, text in LAYOUT.items()}
    _, left_out = narrowed(all_cases(vectors.version), name)
    return {"precision": name, "inputs": INPUTS[name], "left_out": left_out, "layout": layout}


def _statement(id: str) -> dict[str, str]:
    """What the cases of an id hold to: its text's digest tells one version of it from another."""
    return {"title": STATEMENTS[id].title, "sha256": STATEMENTS[id].digest}


def _entry(case: Case, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """A case in the manifest: all that is in it but the numbers."""
    return {
        "id": case.id, "name": case.name, "operation": case.operation, "title": case.title,
        "scalars": dict(case.scalars), "inputs": {name: list(a.shape) for name, a in case.inputs.items()},
        "expected": {name: list(a.shape) for name, a in wanted.items()},
    }  # fmt: skip


@named
def read_vectors(folder: Path) -> Vectors:
    """The vectors in a folder. A ValueError or FileNotFoundError says what is wrong with which file."""
    path = folder / MANIFEST
    manifest = read_json(path)
    if manifest.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {shown(str(manifest.get('schema')))}")
    version = manifest.get("version")
    if version not in VERSIONS:
        raise ValueError(f"{path}: version: expected one of {' '.join(VERSIONS)}, got {shown(str(version))}")
    precision = manifest.get("precision", FLOAT32.name)
    if not (isinstance(precision, str) and precision in PRECISIONS):
        raise ValueError(f"{path}: precision: expected one of {' '.join(PRECISIONS)}, got {shown(str(precision))}")
    entries = manifest.get("cases")
    if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
        raise ValueError(
            f"{path}: cases: expected a list of objects with id, name, operation, inputs and what is expected"
        )
    cases: list[tuple[Case, Mapping[str, Answer]]] = []
    for id in dict.fromkeys(entry["id"] for entry in entries):
        with open_tensors(folder / f"{id}.safetensors") as file:
            cases += [_read_case(file, entry, precision) for entry in entries if entry["id"] == id]
    found = digest(cases, version, precision)
    if found != manifest.get("digest"):
        raise ValueError(f"{path}: the cases and inputs are not those that its digest was taken of")
    return Vectors(found, cases, version, precision)


def _is_entry(entry: Any) -> bool:
    """Whether an object of the manifest has what is read of it; an id may be nothing but the name of a file."""
    if not isinstance(entry, dict):
        return False
    words = [entry.get(key) for key in ("id", "name", "operation", "title")]
    maps = [entry.get(key) for key in ("inputs", "expected", "scalars")]
    return (
        all(isinstance(word, str) for word in words)
        and all(isinstance(one, dict) for one in maps)
        and bool(entry["expected"])  # a case that asks for nothing would pass whatever is there
        and re.fullmatch(r"[A-Z]\d{1,2}", entry["id"]) is not None
    )


def _read_case(file: TensorFile, entry: Mapping[str, Any], precision: str) -> tuple[Case, dict[str, Answer]]:
    stem, wanted = entry["name"], entry["expected"]
    inputs = {name: _wide(read_tensor(file, f"{stem}/in/{name}")) for name in entry["inputs"]}
    gradients = tuple(name.removeprefix("grad/") for name in wanted if name.startswith("grad/"))
    case = Case(
        entry["id"], stem, entry["operation"], entry["title"], entry["scalars"], inputs, gradients, precision=precision
    )  # fmt: skip
    answers = {n: Answer(read_tensor(file, f"{stem}/{n}"), read_tensor(file, f"{stem}/bound/{n}")) for n in wanted}
    for name, (value, bound) in answers.items():
        if value.shape != bound.shape:
            raise ValueError(f"{file.path}: {shown(stem)}/{shown(name)}: {value.shape}, but its bound {bound.shape}")
    return case, answers


def _wide(a: Array) -> Array:
    return a.astype(np.float64) if a.dtype.kind == "f" else a


def read_tensor(file: TensorFile, name: str) -> Array:
    """A tensor of a file of vectors or results; a ValueError if it is missing, or of a dtype that none of them has."""
    if name not in file.dtypes:
        raise ValueError(f"{file.path}: the tensor {shown(name)} is missing")
    if file.dtypes[name] not in READABLE:
        raise ValueError(
            f"{file.path}: {shown(name)}: expected one of {' '.join(READABLE)}, got {shown(file.dtypes[name])}"
        )
    return file.read(name)
