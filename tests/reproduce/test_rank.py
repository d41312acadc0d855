"""Rank: each verdict on planted losses, and which trainings are asked for."""

import pytest

import lora_np as ln
from lora_np.reproduce import rank
from lora_np.reproduce.section import Claim
from lora_np.reproduce.study import FULL, QKVO, QV, Q, Setting, Spread, losses, spread
from lora_np.training.loop import Score

BEFORE = 3.0


def exactly(mean, deviation=0.0):
    return Spread(mean, deviation, mean - deviation, mean + deviation)


def by_rank(*means):
    return {r: exactly(mean) for r, mean in zip((1, 2, 4, 8, 64), means, strict=True)}


def test_spread_over_seeds():
    assert spread([1.0, 2.0, 6.0]) == pytest.approx((3.0, 7.0**0.5, 1.0, 6.0))
    assert spread([2.0]) == (2.0, 0.0, 2.0, 2.0)


def test_losses_are_of_one_choice_over_its_seeds():
    made = {
        Setting(targets, r, seed): type("T", (), {"score": Score(r + seed + 10 * len(targets), 0.0)})
        for targets in (Q, QV)
        for r in (1, 8)
        for seed in (0, 1)
    }
    assert losses(made, QV, 8).mean == 28.5
    assert losses(made, Q, 1).least == 11


@pytest.mark.parametrize(
    ("means", "verdict", "figure"),
    [
        ((2.0, 2.0, 2.0, 2.0, 2.0), "holds", "enough from r = 1 on"),
        ((2.04, 2.0, 2.0, 2.0, 2.0), "holds", "96% at r = 1"),
        ((2.1, 2.0, 2.0, 2.0, 2.0), "holds in part", "enough from r = 2 on"),
        ((2.5, 2.4, 2.3, 2.2, 2.0), "does not hold", "enough from r = 64 on"),
    ],
)
def test_the_verdict_on_a_low_rank(means, verdict, figure):
    claim = rank.low_rank_claim(BEFORE, by_rank(*means), 3)
    assert claim.verdict == verdict
    assert figure in claim.figure


def test_a_difference_within_the_seeds_spread_is_not_decided():
    """Of 3 seeds each with a deviation of 0.3, two standard errors of the difference are 2 x 0.3 sqrt(2/3) = 0.49."""
    assert rank.as_good(BEFORE, exactly(2.48, 0.3), exactly(2.0, 0.3), 3) is None
    assert rank.as_good(BEFORE, exactly(2.01, 0.3), exactly(2.0, 0.3), 3) is None
    assert rank.as_good(BEFORE, exactly(2.50, 0.3), exactly(2.0, 0.3), 3) is False
    assert rank.as_good(BEFORE, exactly(2.48, 0.0), exactly(2.0, 0.0), 3) is False
    assert rank.as_good(BEFORE, exactly(2.04, 0.0), exactly(2.0, 0.0), 3) is True
    assert rank.as_good(BEFORE, exactly(2.0, 0.3), exactly(2.0, 0.3), 3) is True  # the best itself


NOISY = 0.3  # a deviation beside which gains of 1 and differences of 0.1 say nothing


def test_every_verdict_on_differences_within_the_noise_is_not_decided():
    noisy = {r: exactly(mean, NOISY) for r, mean in zip((1, 2, 4, 8, 64), (2.1, 2.1, 2.05, 2.05, 2.0), strict=True)}
    other = {r: exactly(found.mean + 0.1, NOISY) for r, found in noisy.items()}
    choices = {t: exactly(2.1 if t != rank.QV else 2.0, NOISY) for t in rank.BUDGET}
    claims = [
        rank.low_rank_claim(BEFORE, noisy, 3),
        rank.single_needs_more_claim(BEFORE, other, noisy, 3),
        rank.pair_claim(BEFORE, {**choices, rank.Q: exactly(1.9, NOISY)}, 3),
        rank.lone_claim(BEFORE, choices, 3),
        rank.all_matrices_claim(BEFORE, exactly(2.0, NOISY), exactly(1.9, NOISY), 3),
        rank.full_claim(BEFORE, exactly(2.1, NOISY), exactly(2.0, NOISY), 3),
    ]
    assert [claim.verdict for claim in claims] == ["not decided"] * 6
    assert "not told from the best: r = 1, 2, 4 and 8" in claims[0].figure


def test_the_verdict_on_w_q_alone():
    q, qv = by_rank(2.8, 2.7, 2.6, 2.5, 2.5), by_rank(2.1, 2.0, 2.0, 2.0, 2.0)
    claim = rank.single_needs_more_claim(BEFORE, q, qv, 3)
    assert claim.verdict == "holds"
    assert "40% of the best rank's gain with {q}, 90% with {q, v}" in claim.figure
    assert rank.single_needs_more_claim(BEFORE, qv, q, 3).verdict == "does not hold"
    nearly = by_rank(2.52, 2.5, 2.0, 2.0, 2.0)
    assert rank.single_needs_more_claim(BEFORE, nearly, by_rank(2.5, 2.5, 2.0, 2.0, 2.0), 3).verdict == "does not hold"


def budget(**changed):
    """All choices at 2.5, but for those named, by their letters."""
    return {targets: exactly(changed.get("".join(targets), 2.5)) for targets in rank.BUDGET}


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({"qv": 2.0}, "holds"),
        ({"qv": 2.04, "qkvo": 2.0}, "holds"),
        ({"qv": 2.3, "qkvo": 2.0}, "holds in part"),
        ({"qv": 2.9}, "does not hold"),
    ],
)
def test_the_verdict_on_the_best_pair(changed, verdict):
    assert rank.pair_claim(BEFORE, budget(**changed), 3).verdict == verdict


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({"qv": 2.0}, "holds"),
        ({"qv": 2.0, "k": 2.0}, "holds in part"),
        ({"q": 2.0, "k": 2.0, "qv": 2.0}, "does not hold"),
    ],
)
def test_the_verdict_on_one_matrix_alone(changed, verdict):
    assert rank.lone_claim(BEFORE, budget(**changed), 3).verdict == verdict


@pytest.mark.parametrize(("every", "verdict"), [(1.95, "holds"), (2.2, "holds"), (1.5, "does not hold")])
def test_the_verdict_on_all_matrices(every, verdict):
    assert rank.all_matrices_claim(BEFORE, exactly(2.0), exactly(every), 3).verdict == verdict


@pytest.mark.parametrize(("lora", "verdict"), [(2.0, "holds"), (1.9, "holds"), (2.04, "holds"), (2.3, "does not hold")])
def test_the_verdict_on_full_fine_tuning(lora, verdict):
    claim = rank.full_claim(BEFORE, exactly(lora), exactly(2.0), 3)
    assert claim.verdict == verdict
    assert f"{BEFORE - lora:.0%}" in claim.figure


def test_where_nothing_is_learned_nothing_is_judged():
    claims = [Claim("a", "b", "c", "holds")]
    assert rank.if_learned(claims, BEFORE, [exactly(2.9)]) == claims
    (claim,) = rank.if_learned(claims, BEFORE, [exactly(2.9), exactly(3.1)])
    assert claim.verdict == "not checked"


def test_an_equal_budget_is_equal():
    config = ln.PRESETS["gpt2"]
    counted = {ln.count_parameters(config, ln.LoRAConfig(r=r, targets=targets)) for targets, r in rank.BUDGET.items()}
    assert len(rank.BUDGET) == 7
    assert len(counted) == 1


def test_each_choice_is_asked_for_with_each_seed():
    asked = set(rank.wanted((1, 64), (0, 1, 2)))
    assert {(s.targets, s.r) for s in asked} >= {(t, r) for t in (Q, QV, QKVO) for r in (1, 8, 64)} | {(FULL, 0)}
    assert {(s.targets, s.r) for s in asked} >= set(rank.BUDGET.items())
    assert len(asked) == 3 * len({(s.targets, s.r) for s in asked})
