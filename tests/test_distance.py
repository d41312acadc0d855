"""T18, T19: the buckets of distances, beside whole numbers and the published code; what scores gain by them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import device, same_bits, seeds, whole_numbers

from lora_np.backend import asnumpy, xp
from lora_np.distance import ByDistance, deberta_buckets, t5_buckets
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
def parts(draw):
    """A ByDistance with the heads of each group apart, and a dscores of its whole: whole numbers, so sums are exact."""
    N, G, R, T, S, B = (draw(st.integers(1, most)) for most in (2, 2, 2, 4, 4, 5))
    rng = np.random.default_rng(draw(seeds))
    bucket = device(rng.integers(0, B, S + T - 1))
    if draw(st.booleans()):
        near = ByDistance(bucket, whole_numbers(rng, 1, G, R, 1, B))
    else:
        near = ByDistance(bucket, whole_numbers(rng, N, G, R, T, B), whole_numbers(rng, N, G, R, S, B))
    return near, whole_numbers(rng, N, G, R, T, S)


def all_scores(near, N, T, S):
    """What the score of each query and key gains, one at a time. -> (N,G,R,T,S)."""
    bucket, by_query = (
        asnumpy(near.bucket),
        np.broadcast_to(asnumpy(near.by_query), (N, *near.by_query.shape[1:3], T, near.by_query.shape[-1])),
    )
    result = np.zeros((*by_query.shape[:3], T, S))
    for t in range(T):
        for s in range(S):
            result[..., t, s] = by_query[..., t, bucket[s - t + T - 1]]
            if near.by_key is not None:
                result[..., t, s] += asnumpy(near.by_key)[..., s, bucket[s - t + T - 1]]
    return result


@proves("T18", "T19")
@given(parts(), st.data())
def test_a_tile_s_scores_are_a_part_of_all(case, data):
    near, dscores = case
    N, G, _, T, S = dscores.shape
    n, g, t, s = (slice(a, b) for a, b in (sorted(data.draw(st.sets(st.integers(0, size), min_size=2, max_size=2)))
                                           for size in (N, G, T, S)))  # fmt: skip
    part, bucket = near.of(n, g, t, s, T)
    assert same_bits(part.scores(bucket), np.ascontiguousarray(all_scores(near, N, T, S)[n, g, :, t, s]))


@proves("T18", "T19")
@given(parts(), st.booleans())
def test_the_gradient_is_the_transpose_whatever_the_tiles(case, cut):
    """<scores(x), d> = <x, add_grads(d)>, to the last bit: these are whole numbers."""
    near, dscores = case
    N, G, _, T, S = dscores.shape
    grads = near.zeros()
    for t in [slice(0, T)] if not cut else [slice(t, t + 1) for t in range(T)]:
        for s in [slice(0, S)] if not cut else [slice(s, s + 1) for s in range(S)]:
            part, bucket = grads.of(slice(0, N), slice(0, G), t, s, T)
            part.add_grads(dscores[:, :, :, t, s], bucket)
    along = float((grads.by_query * near.by_query).sum())
    if near.by_key is not None:
        along += float((grads.by_key * near.by_key).sum())
    assert along == math.fsum((all_scores(near, N, T, S) * asnumpy(dscores)).ravel())


@proves("T18", "T19")
@given(parts())
def test_heads_are_grouped_and_ungrouped(case):
    near, _ = case
    G = near.by_query.shape[1]
    flat = near.ungrouped()
    assert flat.by_query.ndim == 4
    again = flat.grouped(G)
    for one, other in zip(near[1:], again[1:], strict=True):
        assert (one is None and other is None) or same_bits(one, other)
    assert not any(bool(xp.any(a)) for a in near.zeros()[1:] if a is not None)
