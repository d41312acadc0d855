"""Float64, float32, TF32, float16 and bfloat16, end to end: vectors, results of a right and a wrong program, verdict.

The machine is emulated (emulated.py); PyTorch's kernels on the CPU are real.
"""

import importlib
import json
import re
from functools import cache

import numpy as np
import planted
import pytest
from emulated import MACHINES, OPERATIONS, Machine, cut, lora_linear

pytest.importorskip("safetensors", reason="files of vectors: the extra cli")

import lora_np as ln
from lora_np import cli
from lora_np.formats.files.atomic import write_tensors
from lora_np.testing import Mismatch, check
from lora_np.vectors.answers import answers, defined, error_ratio
from lora_np.vectors.cases import all_cases
from lora_np.vectors.files import read_vectors
from lora_np.vectors.mistakes import MISTAKES, WrongCase
from lora_np.vectors.narrow import narrowed
from lora_np.vectors.operations import OPERATIONS as OPERATION_OF

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


WHOLE = ("model-q-v", "pre-norm-rms-padded", "post-norm", "tied")


@cache
def wanted(precision):
    """Every case of a precision, with its answers; of whole models, whose take seconds, some."""
    cases = narrowed(all_cases(), precision)[0]
    return [(c, answers(c)) for c in cases if not OPERATION_OF[c.operation].whole or c.name in WHOLE]


def store(precision, a):
    """A result in float32 as the format has it."""
    return MACHINES[precision].store(np.asarray(a, dtype=np.float32))


@proves("P1")
@pytest.mark.parametrize("precision", ["tf32", "float16", "bfloat16"])
def test_planted_mistakes_are_caught(precision):
    """Those of planted.py, computed in float32 and stored, in the ids where they are in float32."""
    cases = [one for one in wanted(precision) if one[0].operation in planted.OPERATIONS]
    ids_there = {case.id for case, _ in cases} - ({"L5"} if precision != "tf32" else set())  # which it has in float32

    def seen(mistake):
        for case, answer in cases:
            t = {n: a.astype(np.float32) if a.dtype.kind == "f" else a for n, a in case.inputs.items()}
            outputs, grads = planted.OPERATIONS[case.operation](t, case.scalars, mistake)
            got = {f"out/{n}": a for n, a in outputs.items()} | {f"grad/{n}": a for n, a in grads.items()}
            if any(error_ratio(store(precision, a), *answer[n]) > 1 for n, a in got.items() if n in answer):
                yield case.id

    assert set(seen(None)) == set()
    assert {m: set(seen(m)) for m, _, _ in planted.MISTAKES} == {
        m: {*ids} & ids_there for m, ids, _ in planted.MISTAKES
    }


# What a narrow format does not show: roundings, and 1e-6 beside a norm of 2^-4.
UNSEEN = {
    "the update is subtracted from the merged weight; W0 was not kept": "it shows in roundings, which none are here",
    "1e-6 is added to the norm that divides": "it is lost in the norm",
}


@proves("P1")
@pytest.mark.parametrize(("precision", "made"), [("float16", 78), ("bfloat16", 78), ("tf32", 51)])
def test_known_mistakes_show(precision, made):
    """Exact but for the mistake, and stored: each shows in some case, of those that can be made there."""
    possible, shown = set(), set()
    for mistake in MISTAKES:
        for case, answer in wanted(precision):
            if case.operation in mistake.operations and mistake.text not in shown:
                try:
                    values = defined(case, mistake.wrong(OPERATION_OF[case.operation].definition))
                except WrongCase:
                    continue
                possible.add(mistake.text)
                if any(error_ratio(store(precision, x.value), *answer[n]) > 1 for n, x in values.items()):
                    shown.add(mistake.text)
    assert len(possible) >= made
    assert possible - shown == (UNSEEN.keys() if precision != "tf32" else set())


# --- testing.check ---------------------------------------------------------------------------------------------------


def callable_on(machine, *, wrong=False):
    """An adapted linear on a machine, and its merge, summed in float32."""

    def implementation(case):
        names = ("x", "W0", "A", "B", "dh", *(("b",) if case.b is not None else ()))
        t = {name: np.asarray(getattr(case, name), dtype=machine.dtype) for name in names}
        c = {"alpha": case.alpha, "r": case.r, "rslora": case.rslora}
        if case.mask is not None:
            t["keep"], c["p"] = case.mask > 0, 1 - 1 / max(float(case.mask.max()), 1.0)
        outputs, grads = lora_linear(machine, t, c, wrong)
        W = machine(t["W0"] + np.asarray(case.s, machine.dtype) * (t["B"] @ t["A"]))
        return {"h": outputs["h"], "dx": grads["x"], "dA": grads["A"], "dB": grads["B"], "W": W}

    return implementation


@proves("P1")
@pytest.mark.parametrize("precision", FORMATS)
def test_check_takes_what_is_right_in_a_format_and_names_what_is_not(precision):
    check(callable_on(MACHINES[precision]), dtype=precision, examples=20)
    with pytest.raises(Mismatch, match=r"^it looks like this mistake: s = alpha / r in a rank-stabilised case"):
        check(callable_on(MACHINES[precision], wrong=True), dtype=precision, examples=20)


@proves("P1")
@pytest.mark.parametrize(
    ("machine", "dtype"), [("tf32", "float32"), ("bfloat16", "tf32"), ("bfloat16", "float16"), ("float16", "float32")]
)
def test_check_tells_one_precision_from_another(machine, dtype):
    with pytest.raises(Mismatch, match="times its bound off"):
        check(callable_on(MACHINES[machine]), dtype=dtype, examples=20)


@proves("P1")
@pytest.mark.parametrize("dtype", ["tf32", "float16", "bfloat16"])
def test_the_lines_that_check_shows_compute_what_it_expected(dtype):
    """Of a large case with dropout, all of whose numbers are drawn in the format."""

    def late(case):
        found = callable_on(MACHINES[dtype])(case)
        return {"dA": found["dA"] * (1 if case.r < 4 or case.mask is None else 2)}

    with pytest.raises(Mismatch) as mismatch:
        check(late, dtype=dtype, examples=5)
    lines = [line for line in str(mismatch.value).splitlines() if not line.startswith(("dA", "it looks"))]
    scope = {}
    exec("\n".join(lines), scope)
    (shown,) = re.findall(r"# expected dA.* = (.*)", str(mismatch.value))
    (place,) = re.findall(r"# expected dA(.*) = ", str(mismatch.value))
    expected, got = np.array(eval(shown)), np.asarray(eval(f"dA{place}", {"dA": ln.asnumpy(scope["dA"])}))
    np.testing.assert_allclose(got.astype(float), expected, rtol=0, atol=2.0**-8 * np.abs(expected).max())


# --- PyTorch --------------------------------------------------------------------------------------------------------


@proves("P1")
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_pytorch_conforms_but_for_these(precision):
    """Its kernels on the CPU. PEFT rounds s B A, and then the sum with W0 (L5); to unmerge, it subtracts (L6). PyTorch
    sums the gradients of a row that is looked up often in the format itself: in bfloat16 3000 ones come to 256 (T1)."""
    torch = pytest.importorskip("torch", reason="a peer: the extra peers")
    pytest.importorskip("peft", reason="a peer: the extra peers")
    on_torch, with_peft = (importlib.import_module(name) for name in ("on_torch", "with_peft"))
    dtype, ratios = getattr(torch, precision), {}
    for case, answer in wanted(precision):
        t = {n: torch.tensor(a) for n, a in case.inputs.items()}
        t = {n: torch.nn.Parameter(a.to(dtype)) if a.is_floating_point() else a for n, a in t.items()}
        if case.operation not in with_peft.OPERATIONS:
            continue
        asked = {"operation": case.operation, "scalars": case.scalars, "expected": answer}
        for name, a in on_torch.computed(with_peft.OPERATIONS, asked, t).items():
            a = a.float().numpy() if a.is_floating_point() else a.numpy()
            ratios[case.id, case.name, name] = error_ratio(a, *answer[name])
    assert {name for name, ratio in ratios.items() if ratio > 1 and name[2] != "out/h"} == {
        *(("L5", f"{precision}-{name}", "out/W") for name in ("square", "wide")),
        *(("L6", f"times-{n}", "out/W0") for n in (1, 3)),
        *([("T1", "fine", "grad/types_table")] if precision == "bfloat16" else []),
    }
    table = torch.zeros(1, 1, dtype=dtype, requires_grad=True)
    (summed,) = torch.autograd.grad(table[torch.zeros(3000, dtype=torch.long)].sum(), table)
    assert summed.item() == (256 if precision == "bfloat16" else 2048)
    right = {name: ratio for name, ratio in ratios.items() if ratio <= 1}
    assert len({name[:2] for name in right}) > 110
    assert 0.9 < max(right.values()) <= 1  # one operation, one rounding: nothing is left over
    assert max(ratio for name, ratio in right.items() if "layers." in name[2]) < 0.75  # whole models


@proves("P1")
@pytest.mark.parametrize(("precision", "least"), [("bfloat16", 70), ("float16", 2.9)])
def test_pytorch_s_own_loss_and_layer_norm_are_not_wide_inside(precision, least):
    """In a narrow format its log-softmax is stored before the loss is taken, and a layer norm's mean and deviation are,
    for the backward, on the CPU: torch.autocast computes both in float32, as the runner does."""
    torch = pytest.importorskip("torch", reason="a peer: the extra peers")
    dtype = getattr(torch, precision)

    def ratios(id, operation, f, names):
        for case, answer in wanted(precision):
            if (case.id, case.operation) == (id, operation):
                t = {n: torch.tensor(a) for n, a in case.inputs.items()}
                t = {n: a.to(dtype).requires_grad_() if a.is_floating_point() else a for n, a in t.items()}
                y = f(t, case.scalars)
                grads = torch.autograd.grad(y, [t[n] for n in names], t.get("dy"))
                for n, g in zip(names, grads, strict=True):
                    yield error_ratio(g.float().numpy(), *answer[f"grad/{n}"])

    functional = torch.nn.functional
    loss = ratios("T15", "cross_entropy", lambda t, c: functional.cross_entropy(t["logits"], t["targets"]), ["logits"])
    norm = ratios("T3", "layer_norm", lambda t, c: functional.layer_norm(t["x"], (6,), t["w"], t["b"], c["eps"]), ["x"])
    assert max(loss) > least
    assert max(norm) > 2.5
