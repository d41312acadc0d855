"""Loops in threads: every part once, results in order, errors and settings as without threads, and the same bits."""

import gc
import os
import platform
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    FLOAT64,
    cases,
    farthest,
    gradient_scale,
    in_bfloat16,
    in_fewer_bits,
    largest,
    random_model,
    same_bits,
    seeds,
)

import lora_np as ln
from lora_np import backend, ops, threads
from lora_np.backend import asnumpy, backend_name
from lora_np.cli.early import BLAS_THREADS
from lora_np.threads import for_each, in_threads, map_parts

proves = pytest.mark.proves
on_the_host = pytest.mark.skipif(backend_name == "cupy", reason="on a GPU parts are computed in turn")


@contextmanager
def everything_cut():
    """Blocks, pieces, tiles and parts of a few elements: a tiny model's loops have many parts."""
    tiny = {
        "backend.CACHE_ELEMENTS": 16, "threads.LEAST": 8, "threads.MOST": 256, "threads.SMALLEST": 1,
        "threads.FEW_ROWS": 1, "threads.PART_ROWS": 4, "ops.QUERY_ROWS": 1, "ops.TILE_LISTS": 2,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in tiny.items():
            patch.setattr(f"lora_np.{name}", value)
        yield patch


@proves("O4", "T9", "T13", "T16")
@given(case=cases(dropout=True, dtype="float32"), dropout_seed=seeds)
def test_the_number_of_threads_changes_no_bit_of_one_shard(case, dropout_seed):
    """Of logits, a loss, its gradients, and what is generated."""
    model, adapter, batch, _ = case
    inputs = {name: value for name, value in batch.items() if name not in ("tokens", "targets")}
    found = []
    for cores in (1, 2, 5):
        with everything_cut() as patch:
            patch.setattr("lora_np.threads.os.cpu_count", lambda cores=cores: cores)
            loss, grads = ln.loss_and_grads(model, adapter, **batch, dropout_seed=dropout_seed)
            results = {"logits": ln.forward(model, batch["tokens"], adapter, **inputs), **grads}
            if model.config.head == "lm" and model.config.causal and not any(v is not None for v in inputs.values()):
                few = np.repeat(batch["tokens"][:1, :2], 2, axis=0)  # one row alone runs on BLAS's own threads
                results["text"] = ln.generate(model, few, adapter, n=2)
            found.append((loss, ln.loss(model, batch["tokens"], batch["targets"], adapter, **inputs), results))
    for other in found[1:]:
        assert other[:2] == found[0][:2]
        assert same_bits(other[2], found[0][2])


@proves("O4", "T12", "T13")
@given(case=cases(dropout=True, **FLOAT64), dropout_seed=seeds)
def test_cuts_change_nothing_beyond_rounding(case, dropout_seed):
    """In parts of the rows, too, each row has its own dropout mask."""
    model, adapter, batch, _ = case
    loss, grads = ln.loss_and_grads(model, adapter, **batch, dropout_seed=dropout_seed)
    with everything_cut():
        cut_loss, cut_grads = ln.loss_and_grads(model, adapter, **batch, dropout_seed=dropout_seed)
    assert abs(loss - cut_loss) <= 1e-13 * (1 + abs(loss))
    # The base's gradients are not those of the adapted model, whose own may be larger by far.
    assert farthest(grads, cut_grads) <= 1e-12 * max(gradient_scale(model, batch), largest(grads))


@given(st.integers(0, 9), st.integers(1, 4))
def test_each_part_is_computed_once_and_results_come_in_order(n, cores):
    ran = []

    def f(i):
        time.sleep(0.0005 * (n - i))  # the last are the first that are done
        ran.append(i)
        return i * i

    with in_threads(cores):
        assert list(map_parts(f, range(n))) == [i * i for i in range(n)]
    assert sorted(ran) == list(range(n))


@on_the_host
@pytest.mark.parametrize("cores", [1, 2, 3])
def test_as_many_threads_as_are_given_and_the_caller_is_one(cores):
    """All of them at once: each waits for the others."""
    together, seen = threading.Barrier(cores), set()
    with in_threads(cores):

        @for_each([(i,) for i in range(cores)])
        def _(_):
            together.wait(10)
            seen.add(threading.current_thread())

    assert len(seen) == cores
    assert threading.current_thread() in seen


@on_the_host
def test_loops_within_a_part_have_the_threads_that_are_left():
    """Four threads and two parts: each part's loops have two; with as many parts as threads, one."""

    def inner(_):
        return threads._threads.get()

    assert list(map_parts(inner, range(2))) == [0, 0]
    with in_threads(4):
        assert list(map_parts(inner, range(2))) == [2, 2]
        assert list(map_parts(inner, range(4))) == [1] * 4
        assert inner(0) == 4
        with in_threads(3):
            assert inner(0) == 4
    assert inner(0) == 0


@pytest.mark.parametrize("cores", [1, 3])
def test_the_first_part_s_error_ends_the_loop_and_nothing_goes_on(cores):
    begun, before = [], sys.getswitchinterval()

    def f(i):
        begun.append(i)
        if i >= 2:
            raise ValueError(f"part {i}")
        return i

    found = []
    with in_threads(cores), pytest.raises(ValueError, match="part 2"):
        found.extend(iter(map_parts(f, range(1000))))
    so_far = len(begun)
    time.sleep(0.01)
    assert so_far == len(begun) < 1000
    assert sys.getswitchinterval() == before


@on_the_host
def test_a_loop_that_is_closed_waits_for_what_it_has_begun():
    ended = []

    def f(i):
        time.sleep(0.02)
        ended.append(i)
        return i

    with in_threads(3), closing(map_parts(f, range(100))) as found:
        assert next(found) == 0
    so_far = len(ended)
    time.sleep(0.05)
    assert so_far == len(ended) < 10


@on_the_host
def test_numpys_settings_of_the_caller_hold_in_every_thread():
    together = threading.Barrier(2)

    def f(_):
        together.wait(10)
        return np.geterr()["over"]

    with in_threads(2), np.errstate(over="raise"):
        assert list(map_parts(f, range(2))) == ["raise"] * 2


@on_the_host
def test_a_loop_that_is_done_holds_no_array():
    array = np.zeros(3)
    gone = weakref.ref(array)
    with in_threads(2):
        for _ in range(20):
            for_each([(0,), (1,)])(lambda i, array=array: array.sum() + i)
    del array
    gc.collect()
    assert gone() is None


@on_the_host
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:os.fork:RuntimeWarning")
def test_a_forked_process_has_threads_of_its_own():
    with in_threads(2):
        list(map_parts(str, range(4)))
        child = os.fork()
        if child == 0:
            os._exit(0 if list(map_parts(str, range(4))) == list("0123") else 1)
        assert os.waitpid(child, 0)[1] == 0


# --- What they need of the process ----------------------------------------------------------------------------------


@on_the_host
def test_the_last_gives_the_settings_back(two_blas_threads):
    """One BLAS thread, and switches of threads within 10 microseconds, not the 5 ms that are the default."""

    def now():
        return two_blas_threads(), sys.getswitchinterval()

    before, inside, leave = now(), threading.Event(), threading.Event()
    assert before[1] > 1e-4

    def other():
        with in_threads(2):
            inside.set()
            leave.wait(10)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(other)
        inside.wait(10)
        with in_threads(2):
            held = now()
        assert held == ([1] * len(before[0]), pytest.approx(1e-5))
        assert now() == held
        leave.set()
        done.result()
    assert now() == before


@on_the_host
@pytest.mark.parametrize(("limit", "warned"), [(None, True), ("4", True), ("1", False)])
def test_without_threadpoolctl_a_warning_says_what_it_costs(monkeypatch, limit, warned):
    """And loops run in one thread, unless BLAS has one: else each thread's products would start more."""
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(threads, "_blas", threads._blas.__wrapped__)  # asks anew
    for name in BLAS_THREADS:
        monkeypatch.delenv(name, raising=False)
    if limit:
        monkeypatch.setenv(BLAS_THREADS[0], limit)
    said = pytest.warns(match="threadpoolctl is not installed: .* OPENBLAS_NUM_THREADS=1")
    with said if warned else nullcontext(), in_threads():
        assert threads._threads.get() == (0 if warned else 8)


def test_a_product_has_one_blas_thread_meanwhile(monkeypatch):
    """What threadpoolctl is asked for, and for how long."""
    happened = []

    def blas():
        return SimpleNamespace(
            lib_controllers=[SimpleNamespace(clear_controlling_thread=lambda *, force: happened.append("unclaimed"))],
            limit=lambda *, limits: (
                happened.append(limits) or SimpleNamespace(restore_original_limits=lambda: happened.append("as before"))
            ),
        )

    monkeypatch.setattr(threads, "_blas", blas)
    with threads.one_blas_thread():
        happened.append("products")
    assert happened == ["unclaimed", 1, "products", "unclaimed", "as before", "unclaimed"]


FAULTS = """
import resource
import numpy as np
from lora_np.threads import in_threads

def step():
    arrays = [np.ones(2**20) for _ in range(20)]  # 8 MB each

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

with in_threads():
    step()
before = faults()
step()
print(faults() - before)
"""


@on_the_host
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_a_step_takes_the_memory_that_the_last_one_freed():
    """It would be cleared page by page: 160 MB are 40,960 pages of 4 KB."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 400


@pytest.mark.parametrize(("rows", "held", "expected"), [(1, False, False), (1, True, True), (2, False, True)])
def test_one_row_has_our_threads_where_its_weights_are_widened(rows, held, expected, monkeypatch):
    """Widening is cut by the shape alone, as everything is in our threads; BLAS's own are quicker for one wide row."""
    entered = []
    monkeypatch.setattr("lora_np.decode.in_threads", lambda: nullcontext(entered.append(1)))
    model = random_model(ln.Config(7, 10, 2, 2, 8, 6), seed=0, dtype="float32")
    if held:
        _, model = in_fewer_bits(model, in_bfloat16)
    ln.generate(model, np.ones((rows, 2), dtype=int), n=1)
    assert bool(entered) is expected


# --- How work is cut ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(backend_name == "cupy", reason="on a GPU there is one piece")
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 60000))
def test_pieces_cover_a_product_once_and_are_not_too_small(M, N, K):
    """At least LEAST multiplications each where there are several: products that share it are no faster. Of more than
    two, each has SMALLEST elements of the result: with long sums, too, a piece reads its rows of both factors."""
    covered = np.zeros((M, N), dtype=np.int8)
    pieces = list(threads.pieces(M, N, K))
    large = len(pieces) > 1 and min(M, N) >= threads.FEW_ROWS
    for rows, columns in pieces:
        covered[rows, columns] += 1
        assert not large or covered[rows, columns].size * K >= 0.9 * threads.LEAST
        assert len(pieces) <= 2 or covered[rows, columns].size >= 0.9 * threads.SMALLEST
    assert (covered == 1).all()
    assert len(pieces) & (len(pieces) - 1) == 0


def test_a_shard_of_several_has_whole_products():
    """They are for the threads that other shards have; the shard of a batch that has one is cut."""
    config = ln.Config(7, 8, 1, 1, 4, 4)
    model = ln.Model(config, ln.init_weights(config, seed=0))
    tokens, found = np.ones((2, 3), dtype=int), {}
    for shards in (1, 2):
        seen = found[shards] = []
        with everything_cut() as patch:
            cut = ops.pieces
            patch.setattr(ops, "pieces", lambda *sizes, cut=cut, seen=seen: seen.append([*cut(*sizes)]) or seen[-1])
            ln.sharded_loss_and_grads(model, None, tokens, tokens * 0, trainable="all", shards=shards)
    assert max(map(len, found[1])) == (1 if backend_name == "cupy" else 2)
    assert max(map(len, found[2])) == 1


@given(st.integers(1, 5000))
def test_parts_of_rows_cover_them_and_are_of_like_size(M):
    parts = list(threads.row_parts(M))
    assert [i for part in parts for i in range(M)[part]] == list(range(M))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert len(parts) == 1 or min(sizes) >= threads.PART_ROWS // 2


@proves("T2")
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), seeds)
def test_a_product_in_pieces_is_the_product(M, N, K, seed):
    """Of whole numbers, so that no order of sums matters."""
    rng = np.random.default_rng(seed)
    x, W = (rng.integers(-8, 8, shape).astype("float32") for shape in ((M, K), (N, K)))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LEAST", 8), ("MOST", 64), ("SMALLEST", 1)):
            patch.setattr(f"lora_np.threads.{name}", value)
        y = asnumpy(ops.linear(backend.xp.asarray(x), backend.xp.asarray(W)))
    assert (y == x.astype("int64") @ W.T.astype("int64")).all()
