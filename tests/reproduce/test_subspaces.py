"""Subspaces: verdicts on planted figures, and maps of adapters that are made for it."""

import numpy as np
import pytest
from strategies import device

import lora_np as ln
from lora_np.reproduce import subspaces

proves = pytest.mark.proves


def adapter(rows, n_in=6, n_layer=2):
    """Rank len(rows); A of each matrix of each layer has these unit vectors as its directions, the first leading."""
    A = np.eye(n_in)[list(rows)] * 0.5 ** np.arange(len(rows))[:, None]
    names = [f"layers.{i}.attn.{m}" for i in range(n_layer) for m in "qv"]
    params = {f"{name}.A": device(A) for name in names} | {f"{name}.B": device(np.ones((4, len(A)))) for name in names}
    return ln.Adapter(ln.LoRAConfig(r=len(rows)), params)


@proves("A1")
def test_maps_are_of_each_matrix_in_each_layer_beside_chance():
    found = subspaces.maps(adapter([0, 1]), adapter([0, 2, 1]), 2)
    assert found.at("q", 1, 1) == found.at("v", 1, 1) == pytest.approx([1.0, 1.0])
    assert found.at("q", 2, 2) == pytest.approx([0.5, 0.5])
    assert found.at("q", 2, 3) == pytest.approx([1.0, 1.0])
    np.testing.assert_allclose(found.chance, np.array([[1, 2, 3], [2, 2, 3]]) / 6)


@pytest.mark.parametrize(
    ("q", "v", "verdict"),
    [
        ([0.9, 0.6], [0.8, 0.7], "holds"),
        ([0.9, 0.1], [0.2, 0.3], "holds in part"),
        ([0.1, 0.5], [0.2, 0.3], "does not hold"),
    ],
)
def test_the_verdict_on_the_leading_direction(q, v, verdict):
    claim = subspaces.top_direction_claim(8, 64, {"q": q, "v": v}, 1 / 128)
    assert claim.verdict == verdict
    assert f"W_q {q[0]:.2f} {q[1]:.2f}" in claim.figure


@pytest.mark.parametrize(
    ("q", "v", "verdict"), [(0.4, 0.3, "holds"), (0.4, 0.11, "holds in part"), (0.1, 0.12, "does not hold")]
)
def test_the_verdict_on_two_seeds(q, v, verdict):
    assert subspaces.seeds_claim(8, {"q": [q, q], "v": [v, v]}, 0.1).verdict == verdict


@pytest.mark.parametrize(
    ("q", "v", "verdict"), [(0.4, 0.3, "holds"), (0.2, 0.3, "does not hold"), (0.08, 0.05, "does not hold")]
)
def test_the_verdict_on_the_intrinsic_rank(q, v, verdict):
    """More than the other and more than chance, 0.1."""
    claim = subspaces.intrinsic_rank_claim(8, {"q": [q, q], "v": [v, v]}, 0.1)
    assert claim.verdict == verdict
    assert f"{8 * (q - 0.1):.2f} of W_q's" in claim.figure


@pytest.mark.parametrize(("same", "other", "verdict"), [(0.4, 0.1, "holds"), (0.1, 0.4, "does not hold")])
def test_the_verdict_on_tasks(same, other, verdict):
    assert subspaces.tasks_claim([same] * 3, [other] * 3, 0.06).verdict == verdict


def test_a_mean_that_is_within_the_layers_spread_is_not_decided():
    """Differences of 0.3, -0.2 and 0.05, 0.05 on average: the standard error is 0.144."""
    low, high = [0.2, 0.5, 0.3], [0.5, 0.3, 0.35]
    assert subspaces.tasks_claim(high, low, 0.06).verdict == "not decided"
    assert subspaces.intrinsic_rank_claim(8, {"q": high, "v": low}, 0.1).verdict == "not decided"
    assert subspaces.tasks_claim([v + 0.4 for v in high], low, 0.06).verdict == "holds"


def test_adapters_that_are_compared_have_seeds_of_their_own():
    """With one seed A at r = 8 starts as the first rows of that at r = 64: an overlap that training did not make."""
    asked = {(s.r, s.seed) for s in subspaces.wanted(64)}
    assert asked == {(8, 0), (8, 1), (64, 0), (64, 1)}
    model = ln.Model(config := ln.Config(7, 4, 1, 1, 64, 8), ln.init_weights(config, seed=0))
    low, high = (ln.init_adapter(model, ln.LoRAConfig(r=r), seed=0).params["layers.0.attn.q.A"] for r in (8, 64))
    assert (low == high[:8]).all()
