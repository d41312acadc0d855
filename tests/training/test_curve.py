"""Held-out scores over a training: the lowest is named, and an end that is worse is told, small rises excepted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_np.training.curve import best, worse
from lora_np.training.loop import Score


def curve_of(*losses):
    return {10 * i: Score(loss, 0.5) for i, loss in enumerate(losses)}


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((3.0, 2.0, 1.0), None),
        ((3.0, 2.0, 2.09), None),  # less than a tenth of what was gained
        ((3.0, 2.9, 2.92), None),  # more than that, and less than a hundredth of the loss
        ((3.0,), None),
        ((3.0, 3.0), None),
        (
            (3.0, 2.0, 2.2),
            "the run ends worse than it was: held-out loss 2.2000 after step 20, 3.0000 before; the lowest is 2.0000, "
            "after step 10",
        ),
        (
            (3.0, 2.0, 3.5),
            "the run ends worse than it began: held-out loss 3.5000 after step 20, 3.0000 before; the lowest is "
            "2.0000, after step 10",
        ),
        (
            (3.0, 3.0001),
            "the run ends worse than it began: held-out loss 3.0001 after step 10, 3.0000 before; the lowest is "
            "3.0000, before",
        ),
    ],
)
def test_a_run_that_ends_worse_says_how_much_and_when_it_was_best(losses, expected):
    assert worse(curve_of(*losses)) == expected


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8))
def test_an_end_above_the_start_is_always_told_and_one_that_is_the_lowest_never(losses):
    curve = curve_of(*losses)
    assert curve[best(curve)].loss == min(losses)
    if losses[-1] > losses[0]:
        assert "worse than it began" in worse(curve)
    if losses[-1] == min(losses):
        assert worse(curve) is None
