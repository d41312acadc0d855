"""Known mistakes: each shows in some case, and is told apart from all others. Planted ones are in tests/conformance."""

import numpy as np
import pytest
from our_vectors import of, ours

from lora_np.vectors.answers import defined, error_ratio
from lora_np.vectors.mistakes import MISTAKES, Mistake, WrongCase, explained
from lora_np.vectors.operations import OPERATIONS


@pytest.fixture(scope="module", autouse=True)
def once():
    """What a mistake gives for a case is computed once for all the mistakes that it is compared with."""
    gives, kept = Mistake.gives, {}

    def kept_or_computed(mistake, case):
        key = mistake.text, case.id, case.name
        if key not in kept:
            kept[key] = gives(mistake, case)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mistake, "gives", kept_or_computed)
        yield


# Of whole models three: the mistakes are the same in all.
MODELS = ("model-q-v", "model-fused-qkv", "tied")


def wrong(mistake):
    """The cases in which a mistake shows, with what it gives for them."""
    found = []
    for case, right in ours().cases:
        if case.operation not in mistake.operations or (case.operation == "model" and case.name not in MODELS):
            continue
        try:
            values = defined(case, mistake.wrong(OPERATIONS[case.operation].definition))
        except WrongCase:
            continue
        assert values.keys() == right.keys(), (mistake.text, case.id, case.name)
        got = {name: x.value.astype(np.float32) for name, x in values.items()}
        if any(error_ratio(a, *right[name]) > 1 for name, a in got.items()):
            found.append((case, got))
    return found


# An update that is subtracted shows in roundings alone: the runners of tests/conformance have it in earnest.
SHOWN = [mistake for mistake in MISTAKES if mistake.operations != ("unmerge",)]


@pytest.mark.parametrize("mistake", SHOWN, ids=[mistake.text for mistake in SHOWN])
def test_a_mistake_shows_and_is_told_from_all_others(mistake):
    failing = wrong(mistake)
    shown = {case.operation for case, _ in failing}
    assert shown
    for operation in shown:
        of_operation = [one for one in failing if one[0].operation == operation]
        assert explained(of_operation) == (mistake.text, len(of_operation)), operation


@pytest.mark.parametrize("change", [lambda h: h * 1.01, lambda h: h + 1e-3, lambda h: h * 3])
def test_what_is_no_known_mistake_has_no_name(change):
    """Nor is what is off in one direction a precision."""
    case, right = next(one for one in of("L2") if one[0].name == "bias")
    assert explained([(case, {"out/h": change(right["out/h"].value).astype(np.float32)})]) is None


def test_a_mistake_that_explains_the_lesser_part_is_not_named():
    failing = wrong(next(mistake for mistake in MISTAKES if mistake.text == "the update is subtracted"))
    failing = [one for one in failing if one[0].operation == "lora_linear"][:5]
    other = [(case, {name: a + np.float32(0.5) for name, a in got.items()}) for case, got in failing]
    assert explained([*failing[:3], *other[3:]]) == ("the update is subtracted", 3)
    assert explained([*failing[:2], *other[2:4]]) is None


@pytest.mark.parametrize(("bits", "text"), [(11, "TF32 or float16"), (8, "bfloat16")])
def test_factors_with_few_bits_are_named(bits, text):
    """What is computed with each factor of a product rounded to them."""
    failing = []
    for case, right in of("L2"):
        x, W0, A, B = (fewer(case.inputs[name], bits) for name in ("x", "W0", "A", "B"))
        m = case.inputs["keep"] / (1 - case.scalars["p"]) if "keep" in case.inputs else 1.0
        s = case.scalars["alpha"] / (case.scalars["r"] ** (0.5 if case.scalars["rslora"] else 1))
        h = x @ W0.T + s * fewer(fewer(x * m, bits) @ A.T, bits) @ B.T + case.inputs.get("b", 0.0)
        got = {"out/h": h.astype(np.float32)}
        if error_ratio(got["out/h"], *right["out/h"]) > 1:
            failing.append((case, got))
    found = explained(failing)
    assert found is not None
    assert found[0] == f"the factors of products are rounded to {bits} bits, as if in {text}"
    assert found[1] == len(failing) > 3


def fewer(x, bits):
    """x rounded to so many bits."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)
