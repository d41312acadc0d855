"""One step over many shards: the same bits for any number of threads, the same result as without shards."""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    FLOAT64,
    cases,
    device,
    dtypes,
    farthest,
    gradient_scale,
    largest,
    random_model,
    same_bits,
    seeds,
    spy,
    trained_adapter,
)

import lora_np as ln
from lora_np import parallel, threads, transformer
from lora_np.backend import backend_name
from lora_np.parallel import Node, cut, joined, root, spans

proves = pytest.mark.proves


def sharded(case, *, cores=None, **options):
    """sharded_loss_and_grads of a Case, on a machine of so many cores."""
    with pytest.MonkeyPatch.context() as patch:
        if cores is not None:
            patch.setattr("lora_np.threads.os.cpu_count", lambda: cores)
        return ln.sharded_loss_and_grads(case.model, case.adapter, **case.batch, **options)


@proves("O4", "T12")
@given(cases(min_rows=2, dropout=True), seeds, st.data())
def test_the_number_of_threads_changes_no_bit(case, dropout_seed, data):
    shards = data.draw(st.integers(2, len(case.batch["tokens"])))
    one, two, many = (sharded(case, cores=n, shards=shards, dropout_seed=dropout_seed) for n in (1, 2, 5))
    assert one[0] == two[0] == many[0]
    assert same_bits(one[1], two[1])
    assert same_bits(one[1], many[1])


@proves("O4", "T12")
@given(cases(min_rows=2, dropout=True, **FLOAT64), seeds, st.data())
def test_shards_change_nothing_beyond_rounding(case, dropout_seed, data):
    """A row's dropout mask is the same in any shard, and the mean is over the whole batch's counted targets."""
    model, adapter, batch, _ = case
    shards = data.draw(st.integers(1, len(batch["tokens"])))
    loss, grads = ln.loss_and_grads(model, adapter, **batch, dropout_seed=dropout_seed)
    sharded_loss, sharded_grads = sharded(case, shards=shards, dropout_seed=dropout_seed)
    assert abs(loss - sharded_loss) <= 1e-13 * (1 + abs(loss))
    assert list(sharded_grads) == list(adapter.params)
    # The base's gradients are not those of the adapted model, whose own may be larger by far.
    assert farthest(grads, sharded_grads) <= 1e-12 * max(gradient_scale(model, batch), largest(grads))


@proves("O4", "T12", "T13")
@given(cases(min_rows=2, dropout=True, whole=False, targets=("q", "down")), seeds)
def test_shards_that_compute_again_have_the_same_bits(case, dropout_seed):
    """In each shard backward computes every sublayer again, with the masks of its own rows."""
    with pytest.MonkeyPatch.context() as patch:
        computed = spy(patch, transformer, "sublayer")
        loss, grads = sharded(case, shards=2, dropout_seed=dropout_seed)
        once = len(computed)
        again, grads_again = sharded(case, shards=2, dropout_seed=dropout_seed, recompute=True)
    assert len(computed) == 3 * once
    assert loss == again
    assert same_bits(grads, grads_again)


@proves("O4")
@given(cases(min_rows=2, **FLOAT64))
def test_shards_of_full_fine_tuning(case):
    model, _, batch, _ = case
    loss, grads = ln.loss_and_grads(model, None, **batch, trainable="all")
    sharded_loss, sharded_grads = sharded(case._replace(adapter=None), shards=2, trainable="all")
    assert abs(loss - sharded_loss) <= 1e-13 * (1 + abs(loss))
    assert farthest(grads, sharded_grads) <= 1e-12 * gradient_scale(model, batch)


@proves("O4", "T15")
def test_a_shard_without_a_counted_target():
    config = ln.Config(7, 8, 1, 1, 4, 4)
    model = random_model(config, seed=0)
    adapter = trained_adapter(model, ln.LoRAConfig(r=2, targets=("q", "v", "head")), seed=0)
    tokens = np.arange(6).reshape(2, 3)
    targets = np.array([[-100] * 3, [1, 2, 3]])
    loss, grads = ln.sharded_loss_and_grads(model, adapter, tokens, targets, shards=2)
    alone, alone_grads = ln.loss_and_grads(model, adapter, tokens[1:], targets[1:])
    assert loss == pytest.approx(alone, rel=1e-14)
    assert farthest(grads, alone_grads) <= 1e-15


@proves("O4")
@pytest.mark.parametrize(
    ("N", "T", "shards"), [(1, 1024, 1), (4, 256, 4), (4, 255, 2), (8, 64, 2), (3, 10, 1), (64, 1024, 64)]
)
def test_the_default_number_of_shards_comes_from_the_shape(N, T, shards, monkeypatch):
    """A power of two that leaves each 256 tokens and a row, on any machine; on a GPU the batch stays whole."""
    for cores in (1, 96):
        monkeypatch.setattr("lora_np.threads.os.cpu_count", lambda cores=cores: cores)
        assert parallel.default_shards(N, T) == (1 if backend_name == "cupy" else shards)


@proves("O4")
@pytest.mark.skipif(backend_name == "cupy", reason="on a GPU parts are computed in turn")
def test_many_callers_at_once_get_the_bits_of_one_alone(two_blas_threads):
    """Batches of one shard, whose loops have the threads, among batches of several; then all is as it was."""
    model = random_model(ln.Config(50, 96, 1, 2, 192, 192), seed=0, dtype="float32")
    adapter = trained_adapter(model, ln.LoRAConfig(r=2), seed=0)
    tokens = np.random.default_rng(0).integers(0, 50, (16, 96))
    before = (two_blas_threads(), sys.getswitchinterval())
    calls = [(4, 4), (4, 1), (16, 4), (2, 1)]

    def step(rows, shards):
        return ln.sharded_loss_and_grads(model, adapter, tokens[:rows], tokens[:rows, ::-1], shards=shards)

    alone = [step(*call) for call in calls]
    assert not same_bits(alone[0][1], alone[1][1])  # else nothing is seen here
    with ThreadPoolExecutor(6) as pool:
        for n, (loss, grads) in enumerate(pool.map(lambda call: step(*call), calls * 12)):
            assert loss == alone[n % 4][0]
            assert same_bits(grads, alone[n % 4][1])
    assert (two_blas_threads(), sys.getswitchinterval()) == before


@proves("O4")
@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_that_fails_gives_the_settings_back(rows, monkeypatch):
    """In a shard, and in the sum of what the shards gave; the error, and with it its frames, is kept."""
    model = random_model(ln.Config(7, 8, 1, 1, 4, 4), seed=0)
    adapter = trained_adapter(model, ln.LoRAConfig(r=2), seed=0)
    tokens, kept = np.ones((rows, 3), dtype=int), []
    for broken in ("batch_loss_and_grads", "Node"):
        with monkeypatch.context() as patch:
            patch.setattr(parallel, broken, lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError) as error:
                ln.sharded_loss_and_grads(model, adapter, tokens, tokens[:, ::-1], shards=rows)
            kept.append(error)
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "joined", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError) as error:
            ln.sharded_loss_and_grads(model, adapter, tokens, tokens[:, ::-1], shards=rows)
    assert threads._users == 0


@proves("O4")
def test_the_default_is_used():
    config = ln.Config(7, 300, 1, 1, 4, 4)
    model = random_model(config, seed=0)
    adapter = trained_adapter(model, ln.LoRAConfig(r=2), seed=0)
    tokens = np.random.default_rng(0).integers(0, 7, (2, 300))
    loss, grads = ln.sharded_loss_and_grads(model, adapter, tokens, tokens[:, ::-1])
    expected = ln.sharded_loss_and_grads(
        model, adapter, tokens, tokens[:, ::-1], shards=parallel.default_shards(2, 300)
    )
    assert loss == expected[0]
    assert same_bits(grads, expected[1])


@proves("O4")
def test_shards_need_no_threadpoolctl(monkeypatch):
    """Without it all runs on BLAS's own threads; the sums differ by rounding at the most."""
    config = ln.Config(7, 8, 1, 1, 4, 4)
    model = random_model(config, seed=0)
    adapter = trained_adapter(model, ln.LoRAConfig(r=2), seed=0)
    tokens = np.random.default_rng(0).integers(0, 7, (4, 5))
    _, grads = ln.sharded_loss_and_grads(model, adapter, tokens, tokens[:, ::-1], shards=2)
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    monkeypatch.setattr(threads, "_blas", threads._blas.__wrapped__)  # asks anew
    warned = backend_name != "cupy" and not threads._has_one_blas_thread()
    with pytest.warns(match="threadpoolctl is not installed") if warned else nullcontext():
        _, others = ln.sharded_loss_and_grads(model, adapter, tokens, tokens[:, ::-1], shards=2)
    assert farthest(grads, others) <= 1e-14


@pytest.mark.parametrize("shards", [0, 3, -1])
def test_a_wrong_number_of_shards_is_refused(shards):
    config = replace(ln.PRESETS["gpt2"], vocab_size=7, n_layer=1, n_head=1, d_model=4, d_ff=4)
    model = random_model(config, seed=0)
    adapter = trained_adapter(model, ln.LoRAConfig(r=2), seed=0)
    with pytest.raises(ValueError, match=f"shards: expected 1 to 2, the rows of the batch, got {shards}"):
        ln.sharded_loss_and_grads(model, adapter, [[1, 2], [3, 4]], [[1, 2], [3, 4]], shards=shards)


# --- O4: the order of the sums --------------------------------------------------------------------------------------


def leaves(n, seed, dtype):
    """n shards' sums, of sizes so unlike that the order of additions shows in the bits."""
    rng = np.random.default_rng(seed)
    values = [(rng.standard_normal(3) * 10.0 ** rng.integers(-6, 7, 3)).astype(dtype) for _ in range(n)]
    return [Node(i, 1, device(v[0]), {"a": device(v[1:])}) for i, v in enumerate(values)]


def halves(part):
    """The tree, written down from above: a run of 2^k is the sum of its halves, and what is left over joins last."""
    if len(part) == 1:
        return part[0]
    half = 1 << (len(part) - 1).bit_length() - 1
    return halves(part[:half]) + halves(part[half:])


def runs(data, n):
    """0..n cut into neighbouring runs, some of them empty."""
    edges = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))
    return [slice(start, end) for start, end in zip([0, *edges], [*edges, n], strict=True)]


def put_together(data, parts):
    """The nodes of neighbouring runs, joined in any order of the joins."""
    while len(parts) > 1:
        i = data.draw(st.integers(0, len(parts) - 2))
        parts = [*parts[:i], joined(parts[i], parts[i + 1]), *parts[i + 2 :]]
    return parts[0]


def one_by_one(nodes):
    """The nodes of a run, from its shards' own."""
    run = []
    for node in nodes:
        run = joined(run, [node])
    return run


@proves("O4")
@given(st.integers(1, 20), seeds, dtypes, st.data())
def test_however_runs_are_cut_and_joined_the_sum_has_the_same_bits(n, seed, dtype, data):
    given_leaves = leaves(n, seed, dtype)
    total = root(put_together(data, [one_by_one(given_leaves[run]) for run in runs(data, n)]))
    assert same_bits(total.loss, halves([leaf.loss for leaf in given_leaves]))
    assert same_bits(total.grads["a"], halves([leaf.grads["a"] for leaf in given_leaves]))
    assert (total.first, total.width) == (0, n)


@proves("O4")
@given(st.integers(0, 20), st.integers(0, 20), seeds, st.data())
def test_a_run_is_held_as_its_widest_nodes(start, length, seed, data):
    """What `spans` says of a run is what its joins leave; each node stands in the tree, and no two make up one."""
    n = start + length
    parts = [run for run in runs(data, n) if run.start >= start]
    parts = [slice(start, min([run.start for run in parts], default=n)), *parts]
    nodes = put_together(data, [one_by_one(leaves(n, seed, "float64")[run]) for run in parts])
    found = [(node.first, node.width) for node in nodes]
    assert found == list(spans(slice(start, n)))
    assert [shard for first, width in found for shard in range(first, first + width)] == list(range(start, n))
    assert all(width & (width - 1) == 0 and first % width == 0 for first, width in found)
    assert not any(one[1] == other[1] and one[0] % (2 * one[1]) == 0 for one, other in pairwise(found))


@proves("O4")
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_that_divide_the_shards_have_a_node_each(ranks):
    """As powers of two: what travels is one node a rank."""
    assert [len(list(spans(run))) for run in cut(8, ranks)] == [1] * ranks


@proves("O4")
@given(st.integers(0, 40), st.integers(1, 50))
def test_a_cut_has_all_things_in_order_and_in_equal_parts(n, parts):
    runs = cut(n, parts)
    assert [i for run in runs for i in range(n)[run]] == list(range(n))
    assert len(runs) == parts
    sizes = [run.stop - run.start for run in runs]
    assert max(sizes) - min(sizes) <= 1
