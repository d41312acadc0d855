"""What the paper measures of updates, against algebra on matrices that are made for it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import device, dtypes, seeds

from lora_np.analysis import amplification, random_similarity, subspace_similarity
from lora_np.storage import narrowed

proves = pytest.mark.proves


def orthogonal(rng, n):
    """A random rotation (n, n), uniform over all of them."""
    Q, R = np.linalg.qr(rng.standard_normal((n, n)))
    return Q * np.sign(np.diag(R))


def with_directions(rng, V):
    """A (r, in) with the rows of V as its right-singular directions, in that order: its singular values fall by 0.7."""
    r = len(V)
    return orthogonal(rng, r) @ (0.7 ** np.arange(r)[:, None] * V)


@st.composite
def apart(draw):
    """A (r, in) and another (q, in) whose directions are well determined: their singular values lie apart."""
    n_in = draw(st.integers(2, 10))
    rng = np.random.default_rng(draw(seeds))
    A, other = (with_directions(rng, orthogonal(rng, n_in)[: draw(st.integers(1, min(n_in, 6)))]) for _ in range(2))
    return A, other, rng


@st.composite
def pairs(draw):
    """A (r, in) and another (q, in), random."""
    n_in = draw(st.integers(1, 12))
    r, q = draw(st.integers(1, n_in)), draw(st.integers(1, n_in))
    rng = np.random.default_rng(draw(seeds))
    return rng.standard_normal((r, n_in)), rng.standard_normal((q, n_in)), rng


# --- A1: subspaces -------------------------------------------------------------------------------------------------


def by_projectors(A, other, i, j):
    """phi(i, j) as the paper states it, from projectors made of eigenvectors of A^T A: no SVD, no cumulative sums."""
    projectors = []
    for factor, n in ((A, i), (other, j)):
        _, vectors = np.linalg.eigh(factor.T @ factor)  # rising
        leading = vectors[:, ::-1][:, :n]
        projectors.append(leading @ leading.T)
    return np.trace(projectors[0] @ projectors[1]) / min(i, j)


@proves("A1")
@given(apart())
def test_phi_is_the_papers(case):
    """Against projectors."""
    A, other, _ = case
    (r, q), phi = (len(A), len(other)), subspace_similarity(device(A), device(other))
    assert phi.shape == (r, q)
    for i in range(1, r + 1):
        for j in range(1, q + 1):
            assert abs(phi[i - 1, j - 1] - by_projectors(A, other, i, j)) <= 1e-9


@proves("A1")
@given(pairs(), dtypes)
def test_phi_lies_between_0_and_1_and_is_symmetric(case, dtype):
    A, other, _ = case
    A, other = device(A, dtype), device(other, dtype)
    phi = subspace_similarity(A, other)
    assert (phi >= 0).all()
    assert (phi <= 1 + 1e-13).all()
    np.testing.assert_allclose(subspace_similarity(other, A), phi.T, rtol=0, atol=1e-13)


@proves("A1")
@given(pairs())
def test_phi_of_an_adapter_with_itself_is_1(case):
    """The smaller of two of its leading subspaces lies in the larger one, so it is 1 everywhere."""
    A, _, _ = case
    np.testing.assert_allclose(subspace_similarity(device(A), device(A)), 1, rtol=0, atol=1e-12)


@proves("A1")
@given(apart())
def test_phi_is_of_directions_alone(case):
    """Nothing changes when A is scaled, its rows are mixed by a rotation, or both sides are turned together."""
    A, other, rng = case
    (r, n_in), phi = A.shape, subspace_similarity(device(A), device(other))
    turn = orthogonal(rng, n_in)
    for one, another in ((3 * A, other), (orthogonal(rng, r) @ A, other), (A @ turn, other @ turn)):
        np.testing.assert_allclose(subspace_similarity(device(one), device(another)), phi, rtol=0, atol=1e-10)


@proves("A1")
@given(st.data(), seeds, st.integers(1, 10))
def test_phi_of_whole_subspaces_survives_any_invertible_mixing(data, seed, n_in):
    """The row space of G A is that of A for every invertible G, here one with singular values from 1 to 4."""
    rng = np.random.default_rng(seed)
    r, q = data.draw(st.integers(1, n_in)), data.draw(st.integers(1, n_in))
    A, other = orthogonal(rng, n_in)[:r], orthogonal(rng, n_in)[:q]
    G = orthogonal(rng, r) @ np.diag(np.linspace(1, 4, r)) @ orthogonal(rng, r)
    whole, mixed = (subspace_similarity(device(X), device(other))[-1, -1] for X in (A, G @ A))
    assert abs(whole - mixed) <= 1e-12


@proves("A1")
@given(st.data(), seeds, st.integers(2, 12))
def test_phi_counts_the_directions_that_are_shared(data, seed, n_in):
    """The same c leading directions, the others orthogonal: phi(i, j) = min(i, j, c) / min(i, j)."""
    rng = np.random.default_rng(seed)
    c = data.draw(st.integers(0, n_in // 2))
    own = data.draw(st.integers(0 if c else 1, (n_in - c) // 2))
    V = orthogonal(rng, n_in)
    A = with_directions(rng, V[: c + own])
    other = with_directions(rng, np.concatenate([V[:c], V[c + own : c + 2 * own]]))
    i, j = np.arange(1, c + own + 1)[:, None], np.arange(1, c + own + 1)
    expected = np.minimum(np.minimum(i, j), c) / np.minimum(i, j)
    np.testing.assert_allclose(subspace_similarity(device(A), device(other)), expected, rtol=0, atol=1e-10)


@proves("A1")
def test_random_subspaces_share_what_is_expected_of_them():
    """The mean of 4,000 pairs, within five standard errors: the chance that one of these 24 fails is 1e-5."""
    n_in, r, q, n = 12, 4, 6, 4000
    rng = np.random.default_rng(0)
    drawn = np.array(
        [
            subspace_similarity(device(rng.standard_normal((r, n_in))), device(rng.standard_normal((q, n_in))))
            for _ in range(n)
        ]
    )
    expected = random_similarity(n_in, r, q)
    i, j = np.arange(1, r + 1)[:, None], np.arange(1, q + 1)
    np.testing.assert_allclose(expected, i * j / n_in / np.minimum(i, j), rtol=1e-15)
    assert (np.abs(drawn.mean(axis=0) - expected) <= 5 * drawn.std(axis=0) / math.sqrt(n)).all()


@pytest.mark.parametrize(
    ("shape", "other", "message"),
    [
        ((2, 3), (2, 4), r"expected \(r, in\) and \(q, in\), got \(2, 3\) and \(2, 4\)"),
        ((3,), (2, 3), r"got \(3,\) and \(2, 3\)"),
        ((4, 3), (2, 3), r"expected r of at most in, got \(4, 3\)"),
        ((2, 3), (4, 3), r"expected r of at most in, got \(4, 3\)"),
    ],
)
def test_factors_that_do_not_fit_are_refused(shape, other, message):
    with pytest.raises(ValueError, match=message):
        subspace_similarity(device(np.ones(shape)), device(np.ones(other)))


# --- A2: amplification ---------------------------------------------------------------------------------------------


@st.composite
def updates(draw):
    """W = U diag(w) V^T (out, in), and an update of r of its directions: s B A = U_P diag(d) V_P^T."""
    n_out, n_in = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    k = min(n_out, n_in)
    r = draw(st.integers(1, k))
    rng = np.random.default_rng(draw(seeds))
    U, V = orthogonal(rng, n_out)[:, :k], orthogonal(rng, n_in)[:, :k]
    w, d = rng.uniform(0.5, 2, k), rng.uniform(0.5, 2, r)
    P = rng.permutation(k)[:r]
    s = draw(st.sampled_from([-2.0, 0.25, 3.0]))
    mix = orthogonal(rng, r) * 2.0  # the factors themselves are in no special form
    A = np.linalg.inv(mix) @ V[:, P].T
    B = (U[:, P] * d / s) @ mix
    return (U * w) @ V.T, A, B, s, w, d, P


@proves("A2")
@given(updates())
def test_amplification_of_known_directions(case):
    """W has w_P in the update's directions, and the update itself d: the factor is norm(d) / norm(w_P)."""
    W, A, B, s, w, d, P = case
    got = amplification(device(W), device(A), device(B), s)
    norm = np.linalg.norm
    np.testing.assert_allclose(got.weight, norm(w), rtol=1e-12)
    np.testing.assert_allclose(got.update, norm(d), rtol=1e-12)
    np.testing.assert_allclose(got.in_update, norm(w[P]), rtol=1e-9)
    np.testing.assert_allclose(got.in_weight, norm(np.sort(w)[::-1][: len(P)]), rtol=1e-12)
    np.testing.assert_allclose(got.factor, norm(d) / norm(w[P]), rtol=1e-9)


@proves("A2")
@given(updates(), seeds)
def test_no_directions_have_more_of_w_than_its_own(case, seed):
    W, A, B, s, *_ = case
    rng = np.random.default_rng(seed)
    got = amplification(device(W), device(rng.standard_normal(A.shape)), device(rng.standard_normal(B.shape)), s)
    assert 0 <= got.in_update <= got.in_weight * (1 + 1e-12)
    assert got.in_weight <= got.weight * (1 + 1e-12)


@proves("A2")
def test_random_directions_have_of_w_what_is_expected_of_them():
    """The mean square over 4,000 random updates, within five standard errors."""
    rng = np.random.default_rng(1)
    W, n = rng.standard_normal((6, 9)) * np.linspace(0.1, 3, 9), 4000
    drawn = [
        amplification(device(W), device(rng.standard_normal((3, 9))), device(rng.standard_normal((6, 3))), 1.0)
        for _ in range(n)
    ]
    squares = np.array([one.in_update for one in drawn]) ** 2
    assert abs(squares.mean() - drawn[0].in_random ** 2) <= 5 * squares.std() / math.sqrt(n)


@proves("A2")
@pytest.mark.parametrize(("r", "printed"), [(4, 0.02), (64, 0.33)])
def test_the_papers_random_column_is_what_random_directions_have(r, printed):
    """Table 7, one draw where norm_F(W_q) = 61.95 in 12,288 dimensions, against the same part of it by ours in 64."""
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((r, 64)), rng.standard_normal((64, r))
    got = amplification(device(rng.standard_normal((64, 64))), device(A), device(B), 1.0)
    assert abs(61.95 * got.in_random / got.weight * 64 / 12288 - printed) <= 0.01


@proves("A2")
def test_a_base_held_in_bfloat16_is_the_same_base():
    rng = np.random.default_rng(0)
    W = device(rng.integers(-8, 9, (5, 6)), "float32")
    A, B = device(rng.standard_normal((2, 6))), device(rng.standard_normal((5, 2)))
    assert amplification(narrowed(W), A, B, 1.0) == amplification(W, A, B, 1.0)


@proves("A2")
def test_a_direction_that_w_lacks_is_amplified_without_bound():
    W, A, B = np.diag([1.0, 0.0]), np.array([[0.0, 1.0]]), np.array([[0.0], [1.0]])
    assert amplification(device(W), device(A), device(B), 2.0).factor == math.inf


@pytest.mark.parametrize(
    ("W", "A", "B", "message"),
    [
        ((3, 4), (2, 5), (3, 2), r"got \(3, 4\), \(2, 5\), \(3, 2\)"),
        ((3, 4), (2, 4), (4, 2), r"got \(3, 4\), \(2, 4\), \(4, 2\)"),
        ((3,), (2, 4), (3, 2), r"got \(3,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(W, A, B, message):
    with pytest.raises(ValueError, match=message):
        amplification(device(np.ones(W)), device(np.ones(A)), device(np.ones(B)), 1.0)


def test_an_update_of_zero_has_no_directions_and_is_refused():
    with pytest.raises(ValueError, match="expected a trained update"):
        amplification(device(np.ones((3, 3))), device(np.ones((1, 3))), device(np.zeros((3, 1))), 1.0)
