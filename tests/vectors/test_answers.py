"""Every case: the package and the definition agree, in float64 to its last bits, in float32 within the bounds."""

import numpy as np
import pytest
from our_vectors import of

from lora_np.vectors.answers import FLOAT64, answers, computed, defined, error_ratio
from lora_np.vectors.cases import all_cases
from lora_np.vectors.definitions import scale
from lora_np.vectors.operations import OPERATIONS
from lora_np.vectors.precision import U, rounded
from lora_np.vectors.statements import STATEMENTS

CASES = all_cases()
IDS = sorted({case.id for case in CASES})
of_id = pytest.mark.parametrize("id", IDS)
EXACT = {"L6", "L8"}  # ids whose every answer must be met exactly


def test_every_id_has_a_case():
    assert {*IDS} == {*STATEMENTS} - {"P1"}  # which judges the others' cases


def test_names_are_unique_within_an_id_and_fit_a_tensor_s_name():
    names = [(case.id, case.name) for case in CASES]
    assert len(set(names)) == len(names)
    assert all("/" not in name for _, name in names)


def test_every_operation_has_a_case():
    assert {case.operation for case in CASES} == set(OPERATIONS)


def test_every_input_is_exact_in_float32():
    for case in CASES:
        for name, a in case.inputs.items():
            assert a.dtype.name in ("float64", "int64", "bool"), (case.id, case.name, name)
            if a.dtype == np.float64:
                assert np.array_equal(a.astype(np.float32), a, equal_nan=True), (case.id, case.name, name)
                assert (a * 1024 == np.rint(a * 1024)).all() or case.since != "v1", (case.id, case.name, name)


@of_id
def test_the_package_gives_what_the_definition_gives(id):
    """Two computations that share no code: hand-written backwards, and the chain rule on the plain formula."""
    for case, expected in of(id):
        by_definition = defined(case)
        assert expected.keys() == by_definition.keys()
        for name, (value, bound) in expected.items():
            other = by_definition[name].value
            assert other.shape == value.shape, (case.name, name)
            assert error_ratio(other, value, bound) <= 1, (case.name, name)


@of_id
def test_the_package_in_float32_stays_within_the_bounds(id):
    for case, expected in of(id):
        got = computed(case, "float32")
        for name, answer in expected.items():
            assert error_ratio(got[name], *answer) <= (0 if id in EXACT else 1), (case.name, name)


@pytest.mark.parametrize("id", ["L1", "L2", "L3", "L4", "L5", "L7", "L9", "T1", "T2", "T7", "T9"])
def test_float32_that_is_said_to_be_float64_is_seen(id):
    """Where inputs have 11 bits, T1's sums and T2's products are the same in both."""
    case, expected = next(one for one in of(id) if one[0].name.endswith("fine"))
    got = computed(case, "float32")
    assert max(error_ratio(got[name].astype(np.float64), *answer) for name, answer in expected.items()) > 1e6


@of_id
def test_no_bound_would_let_a_wrong_result_pass(id):
    """Far below the size of what it bounds: an error of a percent of the largest element is seen."""
    for case, expected in of(id):
        for name, (value, bound) in expected.items():
            largest = np.abs(value).max(initial=0)
            noise = 1e-9 * max(np.abs(a).max(initial=0) for a in case.inputs.values())
            assert (bound <= max(largest, noise) * 1e-2).all() or largest < 1e-12, (case.name, name)


@pytest.mark.parametrize(
    ("got", "ratio"),
    [
        (np.float32([1.0, 2.0]), 0.0),
        (np.float32([1.5, 2.0]), 2.0),
        (np.float64([1.5, 2.0]), 2.0 / FLOAT64),
        (np.float32([1.0, 2.5]), np.inf),
        (np.float32([np.nan, 2.0]), np.inf),
        (np.float32([np.inf, 2.0]), np.inf),
        (np.int64([1, 2]), 0.0),
    ],
)
def test_the_error_as_a_multiple_of_the_bound(got, ratio):
    assert error_ratio(got, np.array([1.0, 2.0]), np.float32([0.25, 0.0])) == ratio


def test_an_infinite_result_fails_though_its_bound_is_large():
    assert error_ratio(np.float32([np.inf]), np.array([1.0]), np.float32([3e38])) == np.inf


@pytest.mark.parametrize(("dtype", "name"), [("float16", "float16"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_rounding_to_a_dtype_is_that_of_others(dtype, name):
    """NumPy's, and ml_dtypes' where no double rounding can show: in numbers that float32 has exactly."""
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes", reason="bfloat16 in NumPy: the extra models").bfloat16
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32).astype(np.float64)
    x[:2] = 1 + 2.0**-8, 1 + 3 * 2.0**-8  # ties of bfloat16
    np.testing.assert_array_equal(rounded(x, name), x.astype(dtype).astype(np.float64))


def test_directions_found_in_float32_stay_within_the_bounds():
    """The package finds them in float64 always. Here NumPy does in float32: of B A itself, or by way of QR."""
    for case, expected in of("A1"):
        V, other = (np.linalg.svd(case.inputs[name].astype("float32"))[2] for name in ("A", "other"))
        got = np.zeros(expected["out/phi"].shape, dtype="float32")
        for i, j in np.ndindex(got.shape):
            got[i, j] = np.linalg.norm(V[: i + 1] @ other[: j + 1].T) ** 2 / (min(i, j) + 1)
        assert error_ratio(got, *expected["out/phi"]) <= 1, case.name
    for case, expected in of("A2"):
        W, A, B = (case.inputs[name].astype("float32") for name in ("W0", "A", "B"))
        r = len(A)
        U, _, Vt = np.linalg.svd(B @ A)
        for left, right in ((U[:, :r], Vt[:r].T), (np.linalg.qr(B)[0], np.linalg.qr(A.T)[0])):
            got = np.linalg.norm(left.T @ W @ right)
            assert 0 < error_ratio(np.float32(got), *expected["out/in_update"]) <= 1, case.name


def similarity(A, other):
    """A1, as the paper has it."""
    U, V = (np.linalg.svd(X)[2][: len(X)] for X in (A, other))
    square = np.cumsum(np.cumsum((U @ V.T) ** 2, axis=0), axis=1)
    return square / np.minimum(*np.ogrid[1 : len(U) + 1, 1 : len(V) + 1])


def cut(X, k):
    """L9: the nearest matrix of rank k."""
    P, S, Qt = np.linalg.svd(X)
    return (P[:, :k] * S[:k]) @ Qt[:k]


def seen_by(X, W, r):
    """A2: norm_F(U^T W V)."""
    P, _, Qt = np.linalg.svd(X)
    return np.linalg.norm(P[:, :r].T @ W @ Qt[:r].T)


def decompositions():
    """What is decomposed of each case, what is made of it, and the bound on that: (name, matrices, f, bound)."""
    few = [(case, answers(case)) for case in CASES if case.id in ("A1", "A2", "L9")]
    for case, expected in (one for one in few if one[0].id == "A1"):
        yield case.name, [case.inputs["A"], case.inputs["other"]], similarity, expected["out/phi"].bound
    for case, expected in (one for one in few if one[0].id == "L9"):
        if k := case.scalars["rank"]:
            dW = defined(case._replace(scalars={**case.scalars, "rank": None}))["out/dW"].value
            yield case.name, [dW], lambda X, k=k: cut(X, k), expected["out/dW"].bound
    for case, expected in (one for one in few if one[0].id == "A2"):
        dW, W, r = case.inputs["B"] @ case.inputs["A"] * scale(case.scalars), case.inputs["W0"], case.scalars["r"]
        yield f"A2-{case.name}", [dW], lambda X, W=W, r=r: seen_by(X, W, r), expected["out/in_update"].bound


@pytest.mark.parametrize(
    ("name", "matrices", "f", "bound"), [pytest.param(*one, id=one[0]) for one in decompositions()]
)
def test_a_decomposition_as_exact_as_is_asked_stays_within_the_bounds_in_its_worst_direction(name, matrices, f, bound):
    """The gradient's, by differences. There the bounds are not far off: they hide no more than they must."""
    right, nearest = f(*matrices), 0.0
    slopes = [np.zeros((*right.shape, *X.shape)) for X in matrices]
    for i, X in enumerate(matrices):
        for place in np.ndindex(X.shape):
            step = np.zeros(X.shape)
            step[place] = 1e-6
            ends = (f(*matrices[:i], X + sign * step, *matrices[i + 1 :]) for sign in (1, -1))
            slopes[i][(..., *place)] = np.subtract(*ends) / 2e-6
    for place in np.ndindex(right.shape):
        moved = []
        for X, slope in zip(matrices, slopes, strict=True):
            size = np.linalg.norm(slope[place])
            allowed = 8 * max(X.shape) * U * np.linalg.norm(X, 2)
            moved.append(X + slope[place] * (allowed / size if size > 1e-5 else 0))
        ratio = np.abs(f(*moved) - right)[place] / bound[place]
        assert ratio <= 1, place
        nearest = max(nearest, ratio)
    to_second_order = ("itself", "first-shared", "nothing-shared")
    assert nearest > 0.25 or name in to_second_order


def test_a_merge_that_rounds_once_is_exact_but_at_a_tie():
    """The bound of a float16 element is 0, or one step where float32 cannot tell which way it rounds."""
    for case, expected in of("L5"):
        if case.operation == "merge" and case.scalars["dtype"] == "float16":
            value, bound = expected["out/W"]
            step = np.spacing(np.abs(value).astype(np.float16)).astype(np.float64)
            assert ((bound == 0) | (np.abs(bound - step) <= step * 4 * U + 2.0**-126)).all()
            assert (bound == 0).mean() > 0.9
