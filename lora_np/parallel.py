"""One step over many shards of a batch: in threads, and over MPI's ranks (O4).

Each shard runs its whole forward and backward alone, in a thread of its own; NumPy lets go of the interpreter's lock in
products and elementwise steps. Only the gradients of what is trained meet, summed along one fixed tree: the result
depends on the shards, never on how many threads or ranks ran them or which was done first.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

from .backend import Array, backend_name
from .batch import Batch, check_batch
from .lora import Adapter
from .model import Model
from .ranks import ALONE, Ranks
from .run import Run, Trainable
from .transformer import Grads, batch_loss_and_grads, trained_grads, training_run
from .tree import Node, cut

S = TypeVar("S")
R = TypeVar("R")

SHARD_TOKENS = 256  # a shard has at least so many tokens: smaller products are slower


def default_shards(N: int, T: int) -> int:
    """The shards of a batch (N,T): from its shape alone, so that the same batch gives the same bits on any machine.

    A power of two, so that as many cores have as much to do each; on a GPU one.
    """
    most = max(1, min(N, N * T // SHARD_TOKENS))
    return 1 if backend_name == "cupy" else 1 << (most.bit_length() - 1)


@cache
def _blas() -> Any:
    """threadpoolctl's hold on NumPy's BLAS, which takes a while to find; None where it is not installed."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController().select(user_api="blas")


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """One BLAS thread for each product meanwhile, where threadpoolctl is installed: the shards are the parallelism."""
    blas = _blas()
    if blas is None:
        yield
        return
    _unclaim(blas)
    limit = blas.limit(limits=1)
    try:
        yield
    finally:
        _unclaim(blas)
        limit.restore_original_limits()
        _unclaim(blas)


def _unclaim(blas: Any) -> None:
    """Lets this thread change the limit: newer versions of threadpoolctl ignore all but the one that did so first."""
    for library in blas.lib_controllers:
        if hasattr(library, "clear_controlling_thread"):
            library.clear_controlling_thread(force=True)


@contextmanager
def quick_switches() -> Iterator[None]:
    """Threads that come back from NumPy wait for the interpreter's lock 10 microseconds at most, not 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


_turn, _changed = threading.Lock(), threading.Condition()
_users = {True: 0, False: 0}  # the threads of this process that are within `process_settings`, by what they asked for
_set = ExitStack()


@contextmanager
def process_settings(shards: bool) -> Iterator[None]:
    """What shards need of the process meanwhile, one BLAS thread and quick switches; or all as it is, if not `shards`.

    Both are the whole process's, and bits depend on them. So the first of the threads that want shards sets them and
    the last gives them back; those that want the other wait for these, and these for them, in the order they came.
    """
    with _turn, _changed:  # who waits keeps the turn: nobody overtakes it
        _changed.wait_for(lambda: not _users[not shards])
        if shards and not _users[shards]:
            _set.enter_context(one_blas_thread())
            _set.enter_context(quick_switches())
        _users[shards] += 1
    try:
        yield
    finally:
        with _changed:
            _users[shards] -= 1
            if not _users[shards]:
                _set.close()
                _changed.notify_all()


def threaded(f: Callable[[S], R], parts: Iterable[S], ranks: Ranks = ALONE) -> Generator[R, None, None]:
    """f of each of this rank's share of the parts, in order, as they are done.

    Each in a thread, with one BLAS thread; where there is one part in all, as it is. On a GPU, in turn. Close what is
    not read to its end: until then it holds `process_settings`.
    """
    parts = list(parts)
    mine = parts[ranks.share(len(parts))]
    if backend_name == "cupy":
        yield from map(f, mine)
    elif len(parts) <= 1:
        with process_settings(shards=False):
            yield from map(f, mine)
    else:
        threads = max(1, min(len(mine), ranks.threads or os.cpu_count() or 1))
        with process_settings(shards=True), ThreadPoolExecutor(threads) as pool:
            yield from pool.map(f, mine)


def sharded_loss_and_grads(
    model: Model,
    adapter: Adapter | None,
    tokens: Any,
    targets: Any,
    *,
    mask: Any = None,
    token_types: Any = None,
    dropout_seed: int | None = None,
    trainable: Trainable = "adapter",
    recompute: bool = False,
    shards: int | None = None,
) -> tuple[float, Grads]:
    """O4: `loss_and_grads`, the rows of the batch cut into shards that run in threads.

    The loss is the mean over the counted targets of the whole batch, and a row's dropout mask is the same, however the
    batch is cut. shards: at most N; None: from tokens.shape alone. -> as loss_and_grads.
    """
    batch = check_batch(model.config, tokens, targets, mask, token_types)
    run = training_run(
        model, adapter, trainable=trainable, rows=len(batch.tokens), dropout_seed=dropout_seed, recompute=recompute
    )
    total, grads = sharded_sums(run, model, adapter, batch, shards=shards)
    return total.item(), grads


def sharded_sums(
    run: Run, model: Model, adapter: Adapter | None, batch: Batch, *, shards: int | None, ranks: Ranks = ALONE
) -> tuple[Array, Grads]:
    """O4: the loss of a checked batch (a 0-d array) and its gradients, each rank computing its share of the shards."""
    N, T = batch.tokens.shape
    shards = default_shards(N, T) if shards is None else shards
    if not 1 <= shards <= N:
        raise ValueError(f"shards: expected 1 to {N}, the rows of the batch, got {shards}")
    rows, count = cut(N, shards), len(batch.counted)

    def one(shard: int) -> Node:
        n = rows[shard]
        loss, grads = batch_loss_and_grads(replace(run, first_row=n.start), batch.rows(n), count=count)
        return Node(shard, 1, loss, trained_grads(model, adapter, grads))

    like = model.weights if adapter is None else adapter.params
    with closing(threaded(one, range(shards), ranks)) as nodes:
        return ranks.sum(nodes, shards, like)
