"""The vectors as files: the same bytes each time, read back as they were, and those that are committed."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from our_vectors import ours

pytest.importorskip("safetensors", reason="files of vectors: the extra cli")

from lora_np.formats.files.atomic import write_tensors
from lora_np.formats.files.safetensors_file import open_tensors
from lora_np.vectors.answers import FLOAT64, answers, error_ratio
from lora_np.vectors.cases import VERSIONS, all_cases
from lora_np.vectors.files import LAYOUT, MANIFEST, SCHEMA, Vectors, digest, made, read_vectors, write_vectors
from lora_np.vectors.narrow import in_precision
from lora_np.vectors.statements import STATEMENTS

COMMITTED = Path(__file__).parents[1] / "conformance" / "vectors"
V1 = "68a57f6ebf403bbe72f4ed2b7de18452b17893c7fd32789510961d6f2d84cc4c"  # what others have conformed to: for good
every_version = pytest.mark.parametrize("version", VERSIONS)


# What the shapes of the weights say too.
MODEL_FIELDS = {"vocab_size", "n_positions", "n_types", "n_labels", "tie_head", "bias"}


@pytest.fixture
def folder(tmp_path):
    write_vectors(tmp_path / "vectors", ours())
    return tmp_path / "vectors"


def edit(path, change):
    """Changes a file of JSON."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_writing_twice_gives_the_same_bytes(folder, tmp_path):
    write_vectors(tmp_path / "again", made())
    names = files_below(folder)
    assert names == files_below(tmp_path / "again")
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_what_was_written_is_read_back(folder):
    back = read_vectors(folder)
    assert back.digest == ours().digest
    for (case, wanted), (read, found) in zip(ours().cases, back.cases, strict=True):
        assert (case.id, case.name, case.operation, case.scalars) == (read.id, read.name, read.operation, read.scalars)
        assert case.gradients == read.gradients
        assert case.inputs.keys() == read.inputs.keys()
        nan = case.operation == "segments"  # beyond each adapter's rank
        assert all(np.array_equal(a, read.inputs[name], equal_nan=nan) for name, a in case.inputs.items())
        assert all(
            (value == found[name].value).all() and (bound == found[name].bound).all()
            for name, (value, bound) in wanted.items()
        )


def of_version(version):
    """Ours, of a version: a later one has all cases of the one before."""
    return [one for one in ours().cases if VERSIONS.index(one[0].since) <= VERSIONS.index(version)]


def test_v1_never_changes():
    assert made((), version="v1").digest == V1
    assert len(all_cases("v1")) == 180


@every_version
def test_the_committed_vectors_are_of_these_inputs_shapes_and_schema(version):
    """Their digest; so that no case changes within a version without being seen."""
    digest = made((), version=version).digest
    assert json.loads((COMMITTED / version / MANIFEST).read_text())["digest"] == digest
    assert read_vectors(COMMITTED / version)[::2] == (digest, version)


@every_version
def test_the_committed_outputs_are_those_computed_here_within_their_own_bounds(version):
    """They depend on BLAS and CPU in the last bits of float64."""
    for (case, wanted), (_, committed) in zip(
        of_version(version), read_vectors(COMMITTED / version).cases, strict=True
    ):
        for name, (value, bound) in committed.items():
            got = wanted[name].value
            assert error_ratio(got, value, bound) <= 1, (case.id, case.name, name)
            assert ((bound == 0) == (wanted[name].bound == 0)).all(), (case.id, case.name, name)


@every_version
def test_the_committed_vectors_are_small(version):
    assert sum(path.stat().st_size for path in (COMMITTED / version).iterdir()) < 2**21


def test_the_manifest_tells_one_text_of_a_statement_from_another(folder):
    """By the SHA-256 of what stands under its heading in statements.md."""
    statements = json.loads((folder / MANIFEST).read_text())["statements"]
    assert statements.keys() == {case.id for case, _ in ours().cases}
    assert statements["L2"] == {
        "title": "Forward",
        "sha256": hashlib.sha256(
            b"$$h = x W_0^\\top + b + s \\thinspace ((m \\odot x) A^\\top) B^\\top,$$\n\n"
            b"with $m$ the scaled dropout mask; $BA$ is never formed."
        ).hexdigest(),
    }
    noted = STATEMENTS["L5"]
    assert noted.notes
    assert len({s.digest for s in (noted, noted._replace(text=""), noted._replace(notes={}))}) == 3


def test_the_manifest_says_all_that_is_in_the_files(folder):
    """As somebody reads it who has only these files."""
    manifest = json.loads((folder / MANIFEST).read_text())
    assert (manifest["schema"], manifest["version"], manifest["layout"]) == (SCHEMA, VERSIONS[-1], LAYOUT)
    tensors = {}
    for id in {entry["id"] for entry in manifest["cases"]}:
        with open_tensors(folder / f"{id}.safetensors") as file:
            tensors |= {f"{id}/{name}": (file.dtypes[name], file.shapes[name]) for name in file.shapes}
    for entry in manifest["cases"]:
        stem = f"{entry['id']}/{entry['name']}"
        for name, shape in entry["inputs"].items():
            dtype, stored = tensors.pop(f"{stem}/in/{name}")
            assert dtype in ("F32", "I64", "BOOL")
            assert list(stored) == shape
        for name, shape in entry["expected"].items():
            dtype, stored = tensors.pop(f"{stem}/{name}")
            assert list(stored) == shape
            assert tensors.pop(f"{stem}/bound/{name}") == ("F32", stored)
            if dtype == "F64":
                assert tensors.pop(f"{stem}/float32/{name}") == ("F32", stored)
        operation = manifest["operations"][entry["operation"]]
        assert operation["equation"]
        described = [key for keys in operation["scalars"] for key in keys.split(", ")]
        assert set(entry["scalars"]) - {"n", *described, *MODEL_FIELDS} == set()
    assert tensors == {}


def test_float32_values_are_the_nearest(folder):
    with open_tensors(folder / "T5.safetensors") as file:
        for name in file.shapes:
            if "/float32/" in name:
                wide = file.read(name.replace("float32/", ""))
                assert (file.read(name) == wide.astype(np.float32)).all()
    assert FLOAT64 == 2.0**-28


def test_an_existing_folder_is_refused(folder):
    with pytest.raises(FileExistsError, match="exists already"):
        write_vectors(folder, ours())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema=2), "expected schema 1, got 2"),
        (lambda m: m.update(version="v0"), "version: expected one of v1 v2, got v0"),
        (lambda m: m.update(version="v1"), "not those that its digest was taken of"),
        (lambda m: m.update(cases={}), "cases: expected a list of objects"),
        (lambda m: m["cases"][0].pop("operation"), "cases: expected a list of objects"),
        (lambda m: m["cases"][0].update(id="../L1"), "cases: expected a list of objects"),
        (lambda m: m["cases"][0].update(expected={}), "cases: expected a list of objects"),
        (lambda m: m["cases"][0].update(name="other"), "the tensor other/in/A is missing"),
        (lambda m: m["cases"][0]["scalars"].update(alpha=7), "not those that its digest was taken of"),
        (lambda m: m.update(precision="int4"), "precision: expected one of float32 tf32 bfloat16 float16, got int4"),
        (lambda m: m.update(precision="bfloat16"), "not those that its digest was taken of"),
        (lambda m: m.update(digest="0"), "not those that its digest was taken of"),
        (lambda m: m["cases"][0].update(inputs={"A": 5}), "not those that its digest was taken of"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused(folder, change, message):
    edit(folder / MANIFEST, change)
    with pytest.raises(ValueError, match=message):
        read_vectors(folder)


def test_files_that_are_damaged_are_refused(folder, tmp_path):
    path = folder / "L1.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"L1\.safetensors: truncated"):
        read_vectors(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"L1\.safetensors"):
        read_vectors(folder)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        read_vectors(folder)


def test_an_input_that_was_changed_is_refused(folder):
    """The digest covers the numbers themselves."""
    path = folder / "L1.safetensors"
    with open_tensors(path) as file:
        tensors = {name: file.read(name) for name in file.shapes}
    tensors["plain/in/A"] = tensors["plain/in/A"] + np.float32(1)
    path.unlink()
    write_tensors(path, tensors)
    with pytest.raises(ValueError, match="not those that its digest was taken of"):
        read_vectors(folder)


def test_a_manifest_says_its_precision_and_what_is_left_out(tmp_path):
    case = next(case for case, _ in ours().cases if case.id == "T2")
    cases = [(case, answers(case)) for case in [in_precision(case, "tf32")]]
    write_vectors(tmp_path / "v", Vectors(digest(cases, VERSIONS[-1], "tf32"), cases, precision="tf32"))
    manifest = json.loads((tmp_path / "v" / MANIFEST).read_text())
    assert (manifest["precision"], "SHAKE-256 of tf32/ID/CASE/NAME" in manifest["inputs"]) == ("tf32", True)
    assert "T3/plain" in manifest["left_out"]["no product of matrices is in it: it is as in float32"]
    assert "computed in tf32" in manifest["layout"]["CASE/bound/out/NAME, CASE/bound/grad/NAME"]
    read = read_vectors(tmp_path / "v")
    assert (read.precision, read.cases[0][0].precision) == ("tf32", "tf32")
    assert read.digest != digest(cases, VERSIONS[-1])
