"""What an update does to a model's outputs, by the probabilities written out."""

import numpy as np
import pytest
from hypothesis import given
from strategies import seeds

import lora_np as ln
from lora_np.formats.merged.effect import effect

GPT2 = ln.Config(5, 8, 1, 1, 4, 4)
HEADLESS = ln.Config(5, 8, 1, 1, 4, 4, head="none")


@given(seeds)
def test_the_effect_is_that_of_the_probabilities(seed):
    rng = np.random.default_rng(seed)
    one, other = rng.standard_normal((2, 2, 3, 5))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (one, other))
    got = effect(GPT2, one, other)
    assert got.change == np.abs(one - other).max()
    assert got.kl == pytest.approx((p * np.log(p / q)).sum(-1).max(), rel=1e-9)
    assert got.flipped == (p.argmax(-1) != q.argmax(-1)).sum()
    assert got.places == 6


def test_two_equal_outputs_have_no_effect():
    logits = np.array([[1.0, 2.0], [3.0, 0.0], [0.5, 0.5]], "float32")
    assert effect(GPT2, logits, logits.copy()) == (0.0, 0.0, 0, 3)


def test_each_place_counts_and_the_farthest_is_told():
    """Three places: as it was; likelihoods 3/4 and 1/4 turned about, which flips; moved, but in the same order."""
    before = np.log([[[0.5, 0.5], [0.75, 0.25], [0.75, 0.25]]])
    after = np.log([[[0.5, 0.5], [0.25, 0.75], [0.6, 0.4]]])
    got = effect(GPT2, before, after)
    assert got.change == pytest.approx(np.log(3), rel=1e-15)
    assert got.kl == pytest.approx(0.5 * np.log(3), rel=1e-14)  # 3/4 log 3 + 1/4 log(1/3)
    assert (got.flipped, got.places) == (1, 3)


def test_the_divergence_is_of_the_second_from_the_first():
    """It is not symmetric: p log(p / q), by the probabilities of `before`."""
    p, q = np.array([[0.9, 0.1]]), np.array([[0.5, 0.5]])
    there, back = effect(GPT2, np.log(p), np.log(q)).kl, effect(GPT2, np.log(q), np.log(p)).kl
    assert there == pytest.approx(0.9 * np.log(1.8) + 0.1 * np.log(0.2), rel=1e-14)
    assert back == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(5), rel=1e-14)


def test_logits_far_apart_do_not_overflow():
    got = effect(GPT2, np.array([[1e4, 0.0]], "float32"), np.array([[0.0, 1e4]], "float32"))
    assert got == (1e4, 1e4, 1, 1)


def test_states_have_a_change_alone():
    before = np.zeros((2, 3, 4), "float32")
    after = before.copy()
    after[1, 2, 3] = -2
    assert effect(HEADLESS, before, after) == (2.0, None, None, 6)
