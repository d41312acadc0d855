"""Which tokens the rows of a state are: where each stands, and the way into heads and back."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import same_bits

import lora_np as ln
from lora_np.backend import asnumpy, xp
from lora_np.batch import Batch
from lora_np.layout import Cache, Layout, lay_out

proves = pytest.mark.proves
small = st.integers(1, 4)
GPT2 = ln.Config(7, 9, 1, 1, 4, 4)


@st.composite
def kept(draw):
    """N, T, and the places of some tokens of such a batch."""
    N, T = draw(small), draw(small)
    return N, T, np.array(sorted(draw(st.sets(st.integers(0, N * T - 1), min_size=1))))


@proves("T12")
@given(kept())
def test_each_row_knows_its_sequence_and_its_place(case):
    N, T, index = case
    n, t = (asnumpy(a) for a in Layout(N, T, xp.asarray(index)).sequence_and_place())
    assert list(zip(n.tolist(), t.tolist(), strict=True)) == [divmod(i, T) for i in index.tolist()]
    n, t = (asnumpy(a) for a in Layout(N, T).sequence_and_place())
    assert list(zip(n.tolist(), t.tolist(), strict=True)) == [(i, j) for i in range(N) for j in range(T)]


@proves("T12", "T14")
def test_a_selected_token_keeps_its_place():
    n, t = Layout(3, 1, t=xp.asarray([4, 0, 2])).sequence_and_place()
    assert (asnumpy(n).tolist(), asnumpy(t).tolist()) == ([0, 1, 2], [4, 0, 2])


@proves("T9")
@given(kept(), small, small)
def test_rows_are_unpacked_with_zeros_at_padding_and_packed_again(case, H, K):
    N, T, index = case
    x = np.arange(1.0, 1 + len(index) * H * K).reshape(len(index), H * K)
    at = Layout(N, T, xp.asarray(index))
    expected = np.zeros((N * T, H, K))
    expected[index] = x.reshape(-1, H, K)
    expected = expected.reshape(N, T, H, K).transpose(0, 2, 1, 3)
    heads = at.heads(xp.asarray(x), K)
    assert (asnumpy(heads) == expected).all()
    assert (asnumpy(at.rows(heads)) == x).all()


@proves("T9")
@given(small, small, small, small)
def test_without_padding_all_tokens_are_rows(N, T, H, K):
    x = xp.asarray(np.arange(float(N * T * H * K)).reshape(N, T, H * K))
    heads = Layout(N, T).heads(x, K)
    assert heads.shape == (N, H, T, K)
    assert float(heads[N - 1, H - 1, T - 1, K - 1]) == N * T * H * K - 1
    assert (asnumpy(Layout(N, T).rows(heads)) == asnumpy(x)).all()


@proves("T14")
def test_selected_rows_and_their_gradient():
    """The backward is the transpose of the forward: <select(x), y> = <x, select_backward(y)>."""
    rng = np.random.default_rng(0)
    selected = xp.asarray([1, 5, 3])
    for at, shape in [(Layout(3, 2), (3, 2, 4)), (Layout(4, 3, xp.asarray([0, 1, 3, 5, 7, 8, 10])), (7, 4))]:
        after = Layout(3, 1, selected=selected)
        x, y = xp.asarray(rng.standard_normal(shape)), xp.asarray(rng.standard_normal((3, 1, 4)))
        assert same_bits(at.select(x, after)[:, 0], asnumpy(x).reshape(-1, 4)[[1, 5, 3]])
        back = at.select_backward(y, after)
        assert back.shape == shape
        assert float((at.select(x, after) * y).sum()) == pytest.approx(float((x * back).sum()), rel=1e-14)
        assert at.select(x, at) is x
        assert at.select_backward(x, at) is x


@proves("T9", "T14", "L7")
def test_the_rows_of_a_padded_batch():
    """Packed, row 2 is sequence 1's first true token; with an adapter for each row, all places are rows."""
    mask = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]], dtype=bool)
    batch = Batch(np.arange(12).reshape(3, 4) % 7, mask, None, first=5)
    config = ln.Config(7, 9, 1, 1, 4, 4, position_offset=2)
    packed, last = lay_out(config, batch, "float64", packed=True, read=np.array([1, 2, 3]))
    assert asnumpy(packed.pack(xp.asarray(batch.tokens))).tolist() == [0, 1, 5, 6, 4]
    assert asnumpy(packed.positions).tolist() == [2, 3, 2, 3, 2]
    assert packed.angles is None
    assert all(asnumpy(at.mask).tolist() == mask.tolist() for at in (packed, last))
    assert [asnumpy(a).tolist() for a in packed.sequence_and_place()] == [[5, 5, 6, 6, 7], [0, 1, 1, 2, 3]]
    assert asnumpy(packed.row_of(xp.asarray([1, 6, 11]))).tolist() == [1, 3, 4]
    assert asnumpy(last.selected).tolist() == [1, 3, 4]
    assert [asnumpy(a).tolist() for a in last.sequence_and_place()] == [[5, 6, 7], [1, 2, 3]]
    whole, last = lay_out(config, batch, "float64", packed=False, read=np.array([1, 2, 3]))
    assert whole.index is None
    assert asnumpy(whole.mask).tolist() == mask.tolist()
    assert asnumpy(whole.positions)[mask].tolist() == [2, 3, 2, 3, 2]
    assert asnumpy(whole.row_of(xp.asarray([1, 6, 11]))).tolist() == [1, 6, 11]
    assert asnumpy(last.selected).tolist() == [1, 6, 11]
    assert [asnumpy(a).tolist() for a in whole.part(xp.asarray([6])).sequence_and_place()] == [[6], [2]]
    assert [asnumpy(a).tolist() for a in packed.part(xp.asarray([3])).sequence_and_place()] == [[6], [2]]
    assert [asnumpy(a).tolist() for a in last.part(xp.asarray([2])).sequence_and_place()] == [[7], [3]]


@proves("T11")
@pytest.mark.parametrize("read", [None, [1, 2, 3]], ids=["every token", "one of each sequence"])
@pytest.mark.parametrize("past", [0, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_heads_are_turned_by_each_tokens_own_position(padded, past, read):
    """Positions count true tokens, a cache's included; backward turns back. In pairs, as complex numbers."""
    mask = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 0, 1, 0, 1, 1]], dtype=bool)
    mask = mask[:, : past + 4] if padded else np.ones((3, past + 4), dtype=bool)
    batch = Batch(np.zeros((3, 4), dtype=int), mask if padded else None, None)
    config = ln.Config(7, 9, 1, 2, 8, 4, positions="rotary", rope_theta=50.0)
    cache = Cache([], [], past) if past else None
    at, last = lay_out(
        config, batch, "float64", packed=True, read=None if read is None else np.array(read), cache=cache
    )
    if padded:
        assert asnumpy(at.index).tolist() == np.flatnonzero(mask[:, past:]).tolist()  # of the new tokens alone
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, past:]
    if read is not None:
        at, positions = last, np.take_along_axis(positions, np.array(read)[:, None], axis=1)
    x = np.random.default_rng(0).standard_normal((3, 2, positions.shape[1], 4))
    turn = np.exp(1j * positions[:, None, :, None] * 50.0 ** (-np.arange(2) / 2))
    for got, z in [
        (at.rotate(xp.asarray(x), 0), (x[..., :2] + 1j * x[..., 2:]) * turn),
        (at.rotate_backward(xp.asarray(x), 0), (x[..., :2] + 1j * x[..., 2:]) / turn),
    ]:
        assert np.abs(asnumpy(got) - np.concatenate([z.real, z.imag], axis=-1)).max() <= 1e-14


@proves("T11", "T9")
@pytest.mark.parametrize("theta", [None, 7.0])
def test_each_layer_has_its_own_angles(theta):
    """The first p of K; factors; where layers have a window and a base for it, that one, and no factors."""
    config = ln.Config(
        7, 9, 3, 1, 6, 4, positions="rotary", rope_theta=50.0, rope_width=4, rope_factors=(2.0, 5.0), window=2,
        full_layers=(1,), window_theta=theta,
    )  # fmt: skip
    at, last = lay_out(config, Batch(np.zeros((2, 4), dtype=int), None, None), "float64", packed=True,
                       read=np.array([3, 1]))  # fmt: skip
    x = np.random.default_rng(0).standard_normal((2, 1, 4, 6))
    for i in range(3):
        base, factors = (theta, (1.0, 1.0)) if theta is not None and i != 1 else (50.0, (2.0, 5.0))
        turn = np.exp(1j * np.arange(4)[:, None] * base ** (-np.arange(2) / 2) / factors)
        z = (x[..., :2] + 1j * x[..., 2:4]) * turn
        expected = np.concatenate([z.real, z.imag, x[..., 4:]], axis=-1)
        assert np.abs(asnumpy(at.rotate(xp.asarray(x), i)) - expected).max() <= 1e-14
        one = np.stack([x[0, :, 3:4], x[1, :, 1:2]])
        assert np.abs(asnumpy(last.rotate(xp.asarray(one), i))[:, 0, 0] - expected[[0, 1], 0, [3, 1]]).max() <= 1e-14


@proves("T1", "T11", "T18")
def test_no_positions_are_none():
    at, _ = lay_out(replace(GPT2, positions="none"), Batch(np.zeros((2, 2), int), None, None), "float64", packed=True,
                    read=None)  # fmt: skip
    assert (at.positions, at.angles) == (None, None)


@proves("T11")
def test_learned_positions_turn_nothing():
    x = xp.ones((1, 2, 4, 4))
    at = Layout(1, 4)
    assert at.rotate(x, 0) is x
    assert at.rotate_backward(x, 0) is x


@proves("T16")
def test_a_cache_holds_the_tokens_before_and_then_the_new_ones():
    """Two tokens, then three: a view of all five, whose order is theirs; the other layer's are its own."""
    k, v = np.random.default_rng(0).standard_normal((2, 1, 2, 5, 3))
    cache = Cache(*([xp.zeros((1, 2, 7, 3)) for _ in range(2)] for _ in "kv"))
    for start, end in ((0, 2), (2, 5)):
        parts = [cache.extend(1, *(xp.asarray(a[:, :, start:end]) for a in (k, v))) for _ in range(2)][-1]
        assert same_bits(parts[0], k[:, :, :end])
        assert same_bits(parts[1], v[:, :, :end])
        cache.length = end
    assert not asnumpy(cache.keys[0]).any()
    assert same_bits(cache.keys[1][:, :, :5], k)
    assert not asnumpy(cache.values[1][:, :, 5:]).any()


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


@proves("T14")
def test_where_every_token_is_read_nothing_is_selected():
    """The layouts of all states and of the last are one object, so that `select` has nothing to do."""
    for mask in (None, np.array([[True, False], [True, True]])):
        at, last = lay_out(GPT2, Batch(np.zeros((2, 2), dtype=int), mask, None), "float64", packed=True, read=None)
        assert last is at
