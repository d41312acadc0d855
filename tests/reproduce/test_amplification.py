"""Amplification: verdicts on planted figures."""

import pytest

from lora_np.analysis import Amplification
from lora_np.reproduce import amplification

PAPER = {4: [Amplification(61.95, 6.91, 0.32, 21.67, 0.02)], 64: [Amplification(61.95, 3.57, 1.90, 37.71, 0.33)]}


def changed(r, **fields):
    return {**PAPER, r: [PAPER[r][0]._replace(**fields)]}


def test_the_papers_own_table_holds():
    assert amplification.directions_claim(PAPER).verdict == "holds"
    assert amplification.factor_claim(PAPER).verdict == "holds"
    assert amplification.falls_claim(PAPER).verdict == "holds"
    assert "21.59 at r = 4" in amplification.factor_claim(PAPER).figure
    assert "1.88 at r = 64" in amplification.factor_claim(PAPER).figure


def test_directions_of_no_more_weight_than_random_ones_are_not_amplified():
    found = changed(4, in_update=0.01)
    assert amplification.directions_claim(found).verdict == "does not hold"
    assert amplification.directions_claim({4: PAPER[4] * 3, 64: found[4]}).verdict == "holds in part"


def test_directions_that_w_stresses_itself_are_no_news():
    assert amplification.directions_claim(changed(64, in_update=38.0)).verdict == "does not hold"


@pytest.mark.parametrize(("update", "verdict"), [(3.57, "holds"), (6.0, "holds"), (20.0, "holds in part")])
def test_the_verdict_on_the_factor(update, verdict):
    assert amplification.factor_claim(changed(64, update=update)).verdict == verdict


def test_other_factors_do_not_hold():
    found = {4: [PAPER[4][0]._replace(update=0.5)], 64: [PAPER[64][0]._replace(update=0.5)]}
    assert amplification.factor_claim(found).verdict == "does not hold"
    assert amplification.falls_claim(changed(64, update=100.0)).verdict == "does not hold"
