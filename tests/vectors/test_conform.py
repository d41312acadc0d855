"""Results beside the vectors: what is right, wrong, of another shape, or not there."""

import numpy as np
import pytest
from our_vectors import of, ours

pytest.importorskip("safetensors", reason="files of vectors: the extra cli")

from lora_np.formats.files.atomic import write_tensors
from lora_np.formats.files.safetensors_file import open_tensors
from lora_np.vectors.answers import answers, computed
from lora_np.vectors.conform import compare
from lora_np.vectors.files import Vectors
from lora_np.vectors.narrow import in_precision
from lora_np.vectors.precision import rounded

FEW = Vectors(ours().digest, [*of("L2"), *of("L6"), *of("T5")])


def results(folder, *, dtype="float32", change=None):
    """A folder of what the package computes in `dtype`, changed by `change(id, name, array)`; None leaves it out."""
    folder.mkdir()
    for id in dict.fromkeys(case.id for case, _ in FEW.cases):
        tensors = {}
        for case in (case for case, _ in FEW.cases if case.id == id):
            for name, a in computed(case, dtype).items():
                a = a if change is None else change(id, f"{case.name}/{name}", a)
                if a is not None:
                    tensors[f"{case.name}/{name}"] = np.asarray(a)
        if tensors:
            write_tensors(folder / f"{id}.safetensors", tensors)
    return folder


def only(name, f):
    """Changes one tensor."""
    return lambda id, tensor, a: f(a) if tensor == name else a


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_package_conforms_to_itself(tmp_path, dtype):
    verdicts = compare(results(tmp_path / "r", dtype=dtype), FEW)
    assert [one.id for one in verdicts] == ["L2", "L6", "T5"]
    assert all(one.passed and one.run and one.worst.ratio <= 1 for one in verdicts)


def test_a_result_that_is_off_fails_its_case_alone(tmp_path):
    folder = results(tmp_path / "r", change=only("bias/out/h", lambda a: a + np.float32(1e-4)))
    L2 = compare(folder, FEW)[0]
    assert [found.case.name for found in L2.failed] == ["bias"]
    assert L2.worst.case.name == "bias"
    assert L2.worst.worst == "out/h"
    assert L2.worst.ratio > 10
    assert not L2.passed
    assert L2.looks_like is None


def test_float64_results_are_held_to_float64(tmp_path):
    """What float32 may be off, float64 may not."""
    change = only("bias/out/h", lambda a: a.astype(np.float32).astype(np.float64))
    L2 = compare(results(tmp_path / "r", dtype="float64", change=change), FEW)[0]
    assert [found.case.name for found in L2.failed] == ["bias"]


def test_a_result_of_another_shape_or_not_a_number_fails(tmp_path):
    def change(id, name, a):
        return {"plain/out/h": a.reshape(-1), "bias/out/h": np.full_like(a, np.nan)}.get(name, a)

    L2 = compare(results(tmp_path / "r", change=change), FEW)[0]
    assert {found.case.name: found.misshapen for found in L2.failed} == {"plain": ["out/h"], "bias": []}
    assert L2.worst.ratio == np.inf


def test_what_must_be_exact_is_not_let_off_by_one_bit(tmp_path):
    change = only("times-1/out/W0", lambda a: np.nextafter(a, np.float32(2)))
    L6 = compare(results(tmp_path / "r", change=change), FEW)[1]
    assert [found.case.name for found in L6.failed] == ["times-1"]


def test_what_is_missing_is_said_and_is_not_wrong(tmp_path):
    def change(id, name, a):
        return None if id == "L6" or name in ("bias/out/h", "gelu-near/grad/x") else a

    L2, L6, T5 = compare(results(tmp_path / "r", change=change), FEW)
    assert [found.case.name for found in L2.missing] == ["bias"]
    assert [found.case.name for found in L2.found if found.absent] == ["bias"]
    assert [(found.missing, found.absent) for found in T5.missing] == [(["grad/x"], False)]
    assert not any(one.failed for one in (L2, L6, T5))
    assert (L2.run, L6.run) == (True, False)
    assert (L2.passed, L2.holds) == (False, True)


MISNAMED = {
    "a gradient of every case": lambda name: name.replace("/grad/", "/gradient/"),
    "every output": lambda name: name.replace("/out/", "/output/"),
    "every case": lambda name: f"case-{name}",
    "all in capitals": str.upper,
}


@pytest.mark.parametrize("how", MISNAMED)
def test_an_id_of_which_no_case_is_right_does_not_hold(tmp_path, how):
    """Whether its tensors are missing or misnamed; what is not read is named."""
    folder, rename = results(tmp_path / "r"), MISNAMED[how]
    with open_tensors(folder / "T5.safetensors") as file:
        tensors = {name: file.read(name) for name in file.shapes}
    write_tensors(folder / "T5.safetensors", {rename(name): a for name, a in tensors.items()})
    _, L6, T5 = compare(folder, FEW)
    assert (T5.run, T5.right, T5.holds, T5.failed) == (True, [], False, [])
    assert sorted(T5.unread) == sorted(rename(name) for name in tensors if rename(name) != name)
    assert (L6.unread, L6.holds) == ([], True)
    write_tensors(folder / "T5.safetensors", {name: a for name, a in tensors.items() if rename(name) == name})
    T5 = compare(folder, FEW)[2]
    assert (T5.run, T5.holds, T5.unread) == (True, False, [])


def test_files_that_are_no_results_are_refused(tmp_path):
    folder = results(tmp_path / "r")
    (folder / "L2.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match=r"L2\.safetensors: truncated, or not a safetensors file"):
        compare(folder, FEW)


def test_numbers_of_a_kind_that_is_no_result_are_refused(tmp_path):
    folder = results(tmp_path / "r", change=only("bias/out/h", lambda a: a.astype(np.uint8)))
    with pytest.raises(ValueError, match=r"bias/out/h: expected one of F64 .*, got U8"):
        compare(folder, FEW)


@pytest.mark.parametrize(("dtype", "tag"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
def test_results_are_read_in_the_format_of_their_precision(tmp_path, dtype, tag):
    """And held to its bounds, in float64 too: 2^-28 of a bound that a narrow format needs is asked of nobody."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 in NumPy: the extra models")
    kept = in_precision(next(case for case, _ in of("T2") if case.name == "plain"), "bfloat16")
    vectors = Vectors("", [(kept, answers(kept))], precision="bfloat16")
    right = {f"plain/{name}": rounded(value, "bfloat16") for name, (value, _) in answers(kept).items()}
    for i, kind in enumerate((dtype, "float64")):
        folder = tmp_path / f"{i}"
        folder.mkdir()
        stored = ml_dtypes.bfloat16 if kind == "bfloat16" else kind
        write_tensors(folder / "T2.safetensors", {name: a.astype(stored) for name, a in right.items()})
        with open_tensors(folder / "T2.safetensors") as file:
            assert set(file.dtypes.values()) == {tag if kind == dtype else "F64"}
        (verdict,) = compare(folder, vectors)
        assert (verdict.passed, 0.3 < verdict.worst.ratio <= 1) == (True, True)
    write_tensors(folder / "T2.safetensors", {name: a.astype("float32") * 1.02 for name, a in right.items()})
    assert compare(folder, vectors)[0].failed
