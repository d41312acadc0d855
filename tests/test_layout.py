"""Which tokens the rows of a state are: where each stands, and the way into heads and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_np.backend import asnumpy, xp
from lora_np.batch import Batch
from lora_np.layout import Places, Reading

proves = pytest.mark.proves
small = st.integers(1, 4)


@st.composite
def kept(draw):
    """N, T, and the places of some tokens of such a batch."""
    N, T = draw(small), draw(small)
    return N, T, np.array(sorted(draw(st.sets(st.integers(0, N * T - 1), min_size=1))))


@proves("T12")
@given(kept())
def test_each_row_knows_its_text_and_its_place(case):
    N, T, index = case
    n, t = (asnumpy(a) for a in Places(N, T, xp.asarray(index)).texts_and_places())
    assert list(zip(n.tolist(), t.tolist(), strict=True)) == [divmod(i, T) for i in index.tolist()]
    n, t = (asnumpy(a) for a in Places(N, T).texts_and_places())
    assert list(zip(n.tolist(), t.tolist(), strict=True)) == [(i, j) for i in range(N) for j in range(T)]


@proves("T12", "T14")
def test_the_token_that_is_read_keeps_its_place():
    n, t = Places(3, 1, t=xp.asarray([4, 0, 2])).texts_and_places()
    assert (asnumpy(n).tolist(), asnumpy(t).tolist()) == ([0, 1, 2], [4, 0, 2])


@proves("T9")
@given(kept(), small, small)
def test_rows_are_spread_over_the_batch_with_zeros_between_and_found_again(case, H, K):
    N, T, index = case
    x = np.arange(1.0, 1 + len(index) * H * K).reshape(len(index), H * K)
    places = Places(N, T, xp.asarray(index))
    expected = np.zeros((N * T, H, K))
    expected[index] = x.reshape(-1, H, K)
    expected = expected.reshape(N, T, H, K).transpose(0, 2, 1, 3)
    heads = places.split_heads(xp.asarray(x), H)
    assert (asnumpy(heads) == expected).all()
    assert (asnumpy(places.merge_heads(heads)) == x).all()


@proves("T9")
@given(small, small, small, small)
def test_all_tokens_are_their_own_places(N, T, H, K):
    x = xp.asarray(np.arange(float(N * T * H * K)).reshape(N, T, H * K))
    heads = Places(N, T).split_heads(x, H)
    assert heads.shape == (N, H, T, K)
    assert float(heads[N - 1, H - 1, T - 1, K - 1]) == N * T * H * K - 1
    assert (asnumpy(Places(N, T).merge_heads(heads)) == asnumpy(x)).all()


@proves("T14")
def test_reading_takes_rows_and_gives_their_gradient_back():
    """The backward is the transpose of the forward: <take(x), y> = <x, take_backward(y)>."""
    rng = np.random.default_rng(0)
    read = Reading(xp.asarray([1, 5, 3]), Places(3, 1), None)
    for shape in [(3, 2, 4), (7, 4)]:
        x, y = xp.asarray(rng.standard_normal(shape)), xp.asarray(rng.standard_normal((3, 1, 4)))
        assert read.take(x).shape == (3, 1, 4)
        back = read.take_backward(y, shape)
        assert float((read.take(x) * y).sum()) == pytest.approx(float((x * back).sum()), rel=1e-14)


@proves("T14")
def test_a_classifier_reads_the_first_true_token_or_the_last_if_causal():
    mask = np.array([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0]], dtype=bool)
    batch = Batch(np.zeros((3, 4), dtype=int), mask, None)
    assert batch.read_at(causal=False).tolist() == [1, 0, 2]
    assert batch.read_at(causal=True).tolist() == [3, 3, 2]
    assert batch.kept.tolist() == [1, 3, 4, 5, 6, 7, 10]
    whole = Batch(batch.tokens, None, None)
    assert (whole.read_at(causal=False).tolist(), whole.read_at(causal=True).tolist()) == ([0] * 3, [3] * 3)
    assert whole.kept is None
