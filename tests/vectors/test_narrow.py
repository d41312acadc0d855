"""The cases in other precisions: their inputs are such as that has, and what is left out says why."""

from functools import cache

import numpy as np
import pytest

from lora_np.vectors.answers import defined, errors
from lora_np.vectors.cases import all_cases
from lora_np.vectors.narrow import PRODUCTS, in_precision, narrowed
from lora_np.vectors.operations import OPERATIONS
from lora_np.vectors.precision import PRECISIONS, rounded

proves = pytest.mark.proves
precisions = pytest.mark.parametrize("precision", ["tf32", "float16", "bfloat16"])


@cache
def cases(precision):
    return narrowed(all_cases(), precision)


def floats(some):
    """All inputs of them; NaN stands in places that are not to be read."""
    return [a[~np.isnan(a)] for case in some for a in case.inputs.values() if a.dtype == np.float64]


def test_in_float32_nothing_changes():
    kept, left_out = narrowed(all_cases(), "float32")
    assert left_out == {}
    assert [case[:5] for case in kept] == [case[:5] for case in all_cases()]


@precisions
def test_each_case_is_kept_or_left_out_with_a_reason(precision):
    kept, left_out = cases(precision)
    names = [f"{case.id}/{case.name}" for case in kept] + [name for some in left_out.values() for name in some]
    assert sorted(names) == sorted(f"{case.id}/{case.name}" for case in all_cases())
    assert {case.precision for case in kept} == {precision}
    assert all(left_out)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bfloat16", "bfloat16"), ("float16", "float16"), ("tf32", "float32")]
)
def test_every_input_is_exact_in_the_format(precision, dtype):
    assert all(np.array_equal(rounded(a, dtype), a, equal_nan=True) for a in floats(cases(precision)[0]))


def test_inputs_of_narrow_formats_are_float32_s_rounded():
    originals = {(case.id, case.name): case for case in all_cases()}
    for case in cases("float16")[0]:
        for name, a in originals[case.id, case.name].inputs.items():
            as_it_is = a.astype(np.float16) if a.dtype == np.float64 else a
            np.testing.assert_array_equal(case.inputs[name], as_it_is)


def test_inputs_of_tf32_have_bits_that_it_lacks():
    """A known answer, so that the generator stays what the manifest says it is: 0.75 and the low bits of two bytes."""
    bits = [a[(a != 0) & np.isfinite(a)] for a in floats(cases("tf32")[0])]
    lost = [(rounded(a, "float16") != a).mean() for a in bits if a.size > 10]
    assert min(lost) > 0.8
    case = all_cases()[0]._replace(id="L1", name="known", inputs={"A": np.array([[0.75, 0.0], [-0.75, 8.0]])})
    wanted = [[0.75 + 252 * 2.0**-24, 0.0], [-0.75 - 7313 * 2.0**-24, 8 + 5576 * 2.0**-20]]
    np.testing.assert_array_equal(in_precision(case, "tf32").inputs["A"], wanted)


@proves("P1")
def test_products_are_what_tf32_changes_the_bounds_of():
    """Of operations of which there is a case in float32."""
    changed, same = set(), set()
    for case in all_cases():
        if OPERATIONS[case.operation].whole or case.operation in changed or case.operation == "generate":
            continue
        bounds = [defined(case._replace(precision=precision)) for precision in ("float32", "tf32")]
        differ = any((bounds[0][n].error != bounds[1][n].error).any() for n in bounds[0])
        (changed if differ else same).add(case.operation)
    left_out = {"amplification", "subspace_similarity", "pissa", "nf4_linear"}  # by what they are
    assert changed - left_out == {name for name in PRODUCTS if not OPERATIONS[name].whole}


@proves("P1")
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize(("id", "name"), [("T8", "out/p"), ("T15", "out/loss"), ("L5", "out/W")])
def test_what_is_wide_inside_is_off_by_no_more_than_its_storing(precision, id, name):
    """And by float32's own roundings; a merge, which is compared as it is stored, by a step of its format at a tie."""
    how = PRECISIONS[precision]
    for case in cases(precision)[0]:
        if case.id == id and case.operation in ("softmax", "cross_entropy", "merge"):
            value, bound = errors(case)[name]
            size = np.abs(value)
            most = 2 * how.store * size if id == "L5" else how.storing(size) + how.store * 2.0**-4 * (size + 2.0**-20)
            assert (bound <= most).all(), case.name


@proves("P1")
@precisions
def test_no_bound_is_as_large_as_what_it_bounds(precision):
    """Of whole models, in which much may cancel, it may be larger than a gradient."""
    for case in cases(precision)[0]:
        if not OPERATIONS[case.operation].whole:
            for name, (value, bound) in errors(case).items():
                assert np.isfinite(bound).all(), (case.id, case.name, name)
                assert (bound <= 0.6 * np.abs(value).max(initial=0)).all() or np.abs(value).max() < 1e-6, (
                    case.id, case.name, name,
                )  # fmt: skip
