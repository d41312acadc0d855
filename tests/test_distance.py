"""T18, T19: the buckets of distances, beside whole numbers and the published code; what scores gain by them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import device, same_bits, seeds, whole_numbers

from lora_np.backend import asnumpy, xp
from lora_np.distance import PositionBias, deberta_buckets, t5_buckets
from lora_np.vectors.buckets import deberta_bucket, t5_bucket

proves = pytest.mark.proves
FAR = np.arange(-512, 513)
SIZES = [(4, 4), (4, 6), (8, 6), (32, 128), (64, 100), (256, 512)]  # buckets, and where the last begins


def ours(kind, n, last):
    """The bucket of each distance in FAR, of T5's two kinds or DeBERTa's."""
    if kind == "deberta":
        return asnumpy(deberta_buckets(device(FAR), n, last))
    return asnumpy(t5_buckets(device(FAR), n, last, causal=kind == "causal"))


KINDS = ["causal", "both", "deberta"]


@proves("T18", "T19")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "last"), SIZES)
def test_buckets_are_those_of_exact_arithmetic(kind, n, last):
    """Where logarithms are compared, whole powers are: no distance falls on the wrong side of an edge by rounding."""
    if kind == "deberta":
        expected = [deberta_bucket(int(d), n, last) for d in FAR]
    else:
        expected = [t5_bucket(int(d), n, last, causal=kind == "causal") for d in FAR]
    assert ours(kind, n, last).tolist() == expected


@proves("T18")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n", "last"), SIZES)
def test_t5_s_own_buckets(n, last, causal):
    """At every distance from -512 to 512."""
    torch = pytest.importorskip("torch", reason="a peer: the extra peers")
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5", reason="a peer: the extra peers")
    theirs = modeling.T5Attention._relative_position_bucket(
        torch.from_numpy(FAR), bidirectional=not causal, num_buckets=n, max_distance=last
    )
    assert ours("causal" if causal else "both", n, last).tolist() == theirs.tolist()


@proves("T19")
@pytest.mark.parametrize(("n", "last"), SIZES)
def test_deberta_s_own_buckets(n, last):
    """At every distance from -512 to 512: theirs count from a key to its query, and from 0."""
    torch = pytest.importorskip("torch", reason="a peer: the extra peers")
    modeling = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2", reason="the extra peers")
    theirs = modeling.make_log_bucket_position(torch.from_numpy(-FAR), n, last)
    assert ours("deberta", n, last).tolist() == torch.clamp(theirs + n, 0, 2 * n - 1).tolist()
    x = torch.zeros(1, 513, 4)
    of_last = modeling.build_relative_position(x, x, bucket_size=n, max_position=last)[0, -1]  # distances -512 to 0
    assert (
        asnumpy(deberta_buckets(device(np.arange(-512, 1)), n, last)).tolist()
        == torch.clamp(of_last + n, 0, 2 * n - 1).tolist()
    )


@proves("T18", "T19")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "last"), SIZES)
def test_near_distances_have_a_bucket_each_and_from_the_last_on_there_is_one(kind, n, last):
    """Behind the query buckets never fall as distance grows; ahead of it there are none, others, or the mirrored."""
    found = dict(zip(FAR.tolist(), ours(kind, n, last).tolist(), strict=True))
    behind, ahead = ([found[sign * d] for d in range(513)] for sign in (-1, 1))
    own, end, exact = {
        "causal": (0, n - 1, n // 2),
        "both": (0, n // 2 - 1, n // 4),
        "deberta": (n, 2 * n - 1, n // 2),
    }[kind]
    assert behind[:exact] == list(range(own, own + exact))
    assert (np.diff(behind) >= 0).all()
    assert set(behind[last:]) == {end}
    if kind == "causal":
        assert set(ahead) == {0}
    elif kind == "both":
        assert ahead[1:] == [n // 2 + b for b in behind[1:]]
    else:
        assert ahead[:last] == [2 * n - b for b in behind[:last]]
        assert set(ahead[last:]) == {0}


# --- What scores gain -------------------------------------------------------------------------------------------------


@st.composite
def biases(draw):
    """A PositionBias, and a dscores of all its scores: whole numbers, so sums are exact."""
    N, H, T, S, J = (draw(st.integers(1, most)) for most in (2, 3, 4, 4, 5))
    rng = np.random.default_rng(draw(seeds))
    bucket = device(rng.integers(0, J, S + T - 1))
    if draw(st.booleans()):
        bias = PositionBias(bucket, xp.broadcast_to(whole_numbers(rng, 1, H, 1, J), (N, H, T, J)))
    else:
        bias = PositionBias(bucket, whole_numbers(rng, N, H, T, J), whole_numbers(rng, N, H, S, J))
    return bias, whole_numbers(rng, N, H, T, S)


def all_scores(bias, S):
    """What the score of each query and key gains, one at a time. -> (N,H,T,S)."""
    bucket, c2p = asnumpy(bias.bucket), asnumpy(bias.c2p)
    T = c2p.shape[2]
    result = np.zeros((*c2p.shape[:3], S))
    for t in range(T):
        for s in range(S):
            result[..., t, s] = c2p[..., t, bucket[s - t + T - 1]]
            if bias.p2c is not None:
                result[..., t, s] += asnumpy(bias.p2c)[..., s, bucket[s - t + T - 1]]
    return result


@proves("T18", "T19")
@given(biases(), st.data())
def test_a_tile_s_scores_are_a_part_of_all(case, data):
    bias, dscores = case
    n, h, t, s = (slice(a, b) for a, b in (sorted(data.draw(st.sets(st.integers(0, size), min_size=2, max_size=2)))
                                           for size in dscores.shape))  # fmt: skip
    expected = all_scores(bias, dscores.shape[3])[n, h, t, s]
    assert same_bits(bias.tile(n, h, t, s).scores(), np.ascontiguousarray(expected))


@proves("T18", "T19")
@given(biases(), st.booleans())
def test_the_gradient_is_the_transpose_whatever_the_tiles(case, cut):
    """<scores(x), d> = <x, add(d)>, to the last bit: these are whole numbers."""
    bias, dscores = case
    N, H, T, S = dscores.shape
    grads = bias.zeros()
    assert not any(bool(xp.any(a)) for a in (grads.c2p, grads.p2c) if a is not None)
    for t in [slice(0, T)] if not cut else [slice(t, t + 1) for t in range(T)]:
        for s in [slice(0, S)] if not cut else [slice(s, s + 1) for s in range(S)]:
            grads.tile(slice(0, N), slice(0, H), t, s).add(dscores[:, :, t, s])
    along = float((grads.c2p * bias.c2p).sum())
    if bias.p2c is not None:
        along += float((grads.p2c * bias.p2c).sum())
    assert along == math.fsum((all_scores(bias, S) * asnumpy(dscores)).ravel())
