"""One step over many shards of a batch (O4).

Each shard runs its whole forward and backward alone, in a thread of its own; NumPy lets go of the interpreter's lock in
products and elementwise steps. Only the gradients of what is trained meet, summed along one fixed tree: the result
depends on the shards, never on how many threads ran them or which was done first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

from .backend import Array, backend_name
from .batch import Batch, check_batch
from .lora import Adapter
from .model import Model
from .run import Run, Trainable
from .transformer import Grads, batch_loss_and_grads, trained_grads, training_run

S = TypeVar("S")
R = TypeVar("R")

SHARD_TOKENS = 256  # a shard has at least so many tokens: smaller products are slower


def default_shards(N: int, T: int) -> int:
    """The shards of a batch (N,T): from its shape alone, so that the same batch gives the same bits on any machine.

    A power of two, so that as many cores have as much to do each; on a GPU one.
    """
    most = max(1, min(N, N * T // SHARD_TOKENS))
    return 1 if backend_name == "cupy" else 1 << (most.bit_length() - 1)


def shard_rows(N: int, shards: int) -> list[slice]:
    """N rows in `shards` parts whose sizes differ by one at the most."""
    edges = [N * i // shards for i in range(shards + 1)]
    return [slice(start, end) for start, end in pairwise(edges)]


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """One BLAS thread for each product meanwhile, where threadpoolctl is installed: the shards are the parallelism."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        yield
        return
    with threadpool_limits(1, user_api="blas"):
        yield


@contextmanager
def quick_switches() -> Iterator[None]:
    """Threads that come back from NumPy wait for the interpreter's lock 10 microseconds at most, not 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def threaded(f: Callable[[S], R], parts: Iterable[S]) -> list[R]:
    """f of each part, in order: each in a thread, with one BLAS thread; one part alone as it is. On a GPU, in turn."""
    parts = list(parts)
    if len(parts) <= 1 or backend_name == "cupy":
        return [f(part) for part in parts]
    with one_blas_thread(), quick_switches(), ThreadPoolExecutor(min(len(parts), os.cpu_count() or 1)) as pool:
        return list(pool.map(f, parts))


def tree_sum(parts: list[tuple[Array, Grads]]) -> tuple[Array, Grads]:
    """O4: neighbours are added, then the sums of neighbours, and so on: one fixed order for any number of threads."""
    while len(parts) > 1:
        pairs = [_add(parts[i], parts[i + 1]) for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[len(pairs) * 2 :]
    return parts[0]


def _add(one: tuple[Array, Grads], other: tuple[Array, Grads]) -> tuple[Array, Grads]:
    return one[0] + other[0], {name: one[1][name] + other[1][name] for name in one[1]}


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
    total, grads = sharded_sums(run, batch, count=len(batch.counted), shards=shards)
    return total.item(), trained_grads(model, adapter, grads)


def sharded_sums(
    run: Run, batch: Batch, *, count: int, first_row: int = 0, shards: int | None = None
) -> tuple[Array, Grads]:
    """O4: the sums of loss and gradients over a batch's rows, over `count`.

    The batch may be a part of the whole: then count is the whole's, and first_row is its first row there, by which
    dropout masks are numbered. shards: at most N; None: from the batch's shape alone.
    """
    N, T = batch.tokens.shape
    shards = default_shards(N, T) if shards is None else shards
    if not 1 <= shards <= N:
        raise ValueError(f"shards: expected 1 to {N}, the rows of the batch, got {shards}")

    def one(n: slice) -> tuple[Array, Grads]:
        return batch_loss_and_grads(replace(run, first_row=first_row + n.start), batch.rows(n), count=count)

    return tree_sum(threaded(one, shard_rows(N, shards)))
