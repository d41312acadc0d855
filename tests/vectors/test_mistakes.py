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


def wrong(mistake):
    """The cases in which a mistake shows, with what it gives for them."""
    found = []
    for case, right in ours().cases:
        # Of whole models, one: the mistakes are the same in all.
        if case.operation not in mistake.operations or (case.operation == "model" and case.name != "model-q-v"):
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


def test_what_is_no_known_mistake_has_no_name():
    case, right = next(one for one in of("L2") if one[0].name == "bias")
    assert explained([(case, {"out/h": right["out/h"].value.astype(np.float32) * 1.01})]) is None
