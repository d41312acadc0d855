"""Float64, float32, TF32, float16 and bfloat16, end to end: vectors, results of a right and a wrong program, verdict.

The machine is emulated (emulated.py); PyTorch's kernels on the CPU are real.
"""

import json

import numpy as np
import pytest
from emulated import MACHINES, OPERATIONS, Machine, cut

pytest.importorskip("safetensors", reason="files of vectors: the extra cli")

from lora_np import cli
from lora_np.formats.files.atomic import write_tensors
from lora_np.vectors.answers import answers, error_ratio
from lora_np.vectors.cases import all_cases
from lora_np.vectors.files import read_vectors
from lora_np.vectors.narrow import narrowed

proves = pytest.mark.proves
IDS = ("L2", "L4", "O4", "T2", "T4", "T9", "T10", "T15")  # in TF32 those with a product
FORMATS = ["float64", "float32", "tf32", "float16", "bfloat16"]


def run(capsys, *argv):
    """What a command exits with, and prints."""
    return cli.main([str(a) for a in argv]), *capsys.readouterr()


@pytest.fixture
def few(monkeypatch):
    """Of these ids the cases that are emulated: whole models take seconds."""

    def cases(version="v2"):
        return [case for case in all_cases(version) if case.id in IDS and case.operation in OPERATIONS]

    for module in ("vectors.files", "cli.conformance"):
        monkeypatch.setattr(f"lora_np.{module}.all_cases", cases)


def option(precision):
    """Float64 is compared with float32's vectors."""
    return [] if precision in ("float32", "float64") else ["--precision", precision]


def computed(folder, results, machine, *, wrong=()):
    """What a program writes that reads the vectors, on a machine; wrong in these operations."""
    tensors = {}
    for case, wanted in read_vectors(folder).cases:
        t = {n: a.astype(machine.dtype) if a.dtype.kind == "f" else a for n, a in case.inputs.items()}
        outputs, grads = OPERATIONS[case.operation](machine, t, case.scalars, case.operation in wrong)
        found = {f"out/{n}": a for n, a in outputs.items()} | {f"grad/{n}": grads[n] for n in case.gradients}
        into = tensors.setdefault(case.id, {})
        into |= {f"{case.name}/{name}": np.asarray(found[name]) for name in wanted}
    results.mkdir()
    for id, of_id in tensors.items():
        write_tensors(results / f"{id}.safetensors", of_id)
    return results


@proves("P1")
@pytest.mark.parametrize("precision", FORMATS)
def test_a_right_program_conforms_and_a_wrong_one_does_not(tmp_path, capsys, few, precision):
    folder = tmp_path / "vectors"
    assert run(capsys, "vectors", "--out", folder, *option(precision))[0] == 0
    right = computed(folder, tmp_path / "right", MACHINES[precision])
    for how in (option(precision), ["--vectors", folder]):
        status, out, err = run(capsys, "conform", right, "--all", *how)
        assert (status, err) == (0, ""), out
    assert out.splitlines()[-1].startswith("conforms" + (f" in {precision}: yes" if option(precision) else ": yes"))
    for operation in {case.operation for case, _ in read_vectors(folder).cases}:
        wrong = computed(folder, tmp_path / operation, MACHINES[precision], wrong=[operation])
        status, out, _ = run(capsys, "conform", wrong, "--vectors", folder, "--json")
        failed = {case["name"]: one["id"] for one in json.loads(out)["ids"] for case in one["cases"] if case["failed"]}
        assert (status, bool(failed)) == (1, True), operation
        assert json.loads(out)["precision"] == (precision if option(precision) else "float32")


def outside(machine, inputs, bounds):
    """The operations of which a machine's results, on one precision's inputs, are not within another's bounds."""
    found = set()
    for case in narrowed([case for case in all_cases() if case.id in IDS], inputs)[0]:
        if case.operation in OPERATIONS:
            t = {n: a.astype(np.float32) if a.dtype.kind == "f" else a for n, a in case.inputs.items()}
            outputs, grads = OPERATIONS[case.operation](machine, t, case.scalars, False)
            got = {f"out/{n}": a for n, a in outputs.items()} | {f"grad/{n}": grads[n] for n in case.gradients}
            wanted = answers(case._replace(precision=bounds))
            if any(error_ratio(a, *wanted[name]) > 1 for name, a in got.items()):
                found.add(case.operation)
    return found


PRODUCTS = {"lora_linear", "linear", "attention"}


@proves("P1")
def test_tf32_is_told_from_float32_and_bfloat16_from_tf32():
    assert outside(MACHINES["tf32"], "tf32", "tf32") == set()
    assert outside(MACHINES["tf32"], "tf32", "float32") == PRODUCTS
    assert outside(MACHINES["float32"], "tf32", "float32") == set()
    assert outside(MACHINES["bfloat16"], "tf32", "tf32") == PRODUCTS
    assert outside(MACHINES["bfloat16"], "bfloat16", "float16") == set(OPERATIONS)


@proves("P1")
@pytest.mark.parametrize(("precision", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_what_must_be_wide_inside_is_seen_to_be(precision, bits):
    """A machine whose norm, softmax and loss store every step."""

    class Stepwise(np.ndarray):
        """Each result of NumPy's functions cut."""

        def __array_ufunc__(self, ufunc, method, *inputs, out=(), **how):
            plain = [np.asarray(a) for a in inputs]
            into = tuple(np.asarray(a) for a in out)
            y = getattr(ufunc, method)(*plain, **how, **({"out": into} if out else {}))
            return cut(y, bits).view(Stepwise) if np.asarray(y).dtype.kind == "f" else y

    machine = Machine(store=lambda x: cut(x, bits))
    narrow = {"rms_norm", "cross_entropy"}
    t_of = lambda case: {n: a.astype(np.float32).view(Stepwise) if a.dtype.kind == "f" else a  # noqa: E731
                         for n, a in case.inputs.items()}  # fmt: skip
    seen = set()
    for case in narrowed([case for case in all_cases() if case.id in ("T4", "T15")], precision)[0]:
        outputs, grads = OPERATIONS[case.operation](machine, t_of(case), case.scalars, False)
        got = {f"out/{n}": a for n, a in outputs.items()} | {f"grad/{n}": grads[n] for n in case.gradients}
        if any(error_ratio(np.asarray(a), *answers(case)[name]) > 1 for name, a in got.items()):
            seen.add(case.operation)
    assert seen == narrow
