"""One step over many shards of a batch, in threads; and the one order in which their sums meet (O4).

Each shard runs its whole forward and backward alone, in a thread of its own; NumPy lets go of the interpreter's lock in
products and elementwise steps. Only the gradients of what is trained meet.

Floating-point addition depends on its order. Here it is pairwise: neighbours are added, then the sums of neighbours,
and so on, a tree over the shards alone. A run of shards is held as its nodes, each the sum over as many shards as a
power of two, as wide as the run allows. Two neighbouring runs join into the nodes of both: whichever threads or
processes computed which runs, and however these were joined, the sum has the same bits.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from functools import reduce
from itertools import pairwise
from typing import Any, NamedTuple

from .adapter import Adapter
from .backend import Array, backend_name
from .batch import Batch
from .binding import AdaptedModel, Trainable
from .loss import batch_loss_and_grads, step_of
from .model import Model
from .threads import in_threads, map_parts, whole_products
from .transformer import Grads

SHARD_TOKENS = 256  # a shard has at least so many tokens: smaller products are slower


def default_shards(N: int, T: int) -> int:
    """The shards of a batch (N,T): from its shape alone, so that the same batch gives the same bits on any machine.

    A power of two, so that as many cores have as much to do each; on a GPU one.
    """
    most = max(1, min(N, N * T // SHARD_TOKENS))
    return 1 if backend_name == "cupy" else 1 << (most.bit_length() - 1)


def sharded_loss_and_grads(
    model: Model,
    adapter: Adapter | None,
    tokens: Any,
    targets: Any,
    *,
    mask: Any = None,
    token_types: Any = None,
    source: Any = None,
    source_mask: Any = None,
    dropout_seed: int | None = None,
    trainable: Trainable = "adapter",
    recompute: bool = False,
    shards: int | None = None,
) -> tuple[float, Grads]:
    """O4: `loss_and_grads`, the rows of the batch cut into shards that run in threads.

    The loss is the mean over the counted targets of the whole batch, and a row's dropout mask is the same, however the
    batch is cut. shards: at most N; None: from tokens.shape alone. -> as loss_and_grads.
    """
    adapted, batch = step_of(
        model, adapter, tokens, targets, mask=mask, token_types=token_types, source=source, source_mask=source_mask,
        dropout_seed=dropout_seed, trainable=trainable, recompute=recompute,
    )  # fmt: skip
    shards = default_shards(*batch.tokens.shape) if shards is None else shards
    with in_threads(), closing(nodes(adapted, batch, shards)) as found:
        sums = root(reduce(joined, ([node] for node in found), list[Node]()))
    return sums.loss.item(), sums.grads


def nodes(model: AdaptedModel, batch: Batch, shards: int, *, mine: slice = slice(None)) -> Generator[Node, None, None]:
    """O4: the loss (a 0-d array) and the gradients of each shard of a batch, or of a rank's own shards, in order.

    Close what is not read to its end.
    """
    N = len(batch.tokens)
    if not (isinstance(shards, int) and 1 <= shards <= N):
        raise ValueError(f"shards: expected 1 to {N}, the rows of the batch, got {shards!r}")
    rows, count = cut(N, shards), len(batch.counted)

    def one(shard: int) -> Node:
        with whole_products() if shards > 1 else nullcontext():
            return Node(shard, 1, *batch_loss_and_grads(model, batch.rows(rows[shard]), count=count))

    return map_parts(one, range(shards)[mine])


# --- O4: the order of the sums ---------------------------------------------------------------------------------------


class Node(NamedTuple):
    """The sums over `width` shards from `first` on: a power of two, and first is a multiple of it."""

    first: int
    width: int
    loss: Array  # 0-d
    grads: dict[str, Array]


def cut(n: int, parts: int) -> list[slice]:
    """n things in `parts` runs whose sizes differ by one at the most; with fewer things than parts, some are empty."""
    edges = [n * i // parts for i in range(parts + 1)]
    return [slice(start, end) for start, end in pairwise(edges)]


def spans(run: slice) -> Iterator[tuple[int, int]]:
    """The first shard and the width of each node of a run."""
    first = run.start
    while first < run.stop:
        longest = 1 << (run.stop - first).bit_length() - 1
        width = min(first & -first, longest) if first else longest
        yield first, width
        first += width


def joined(left: list[Node], right: list[Node]) -> list[Node]:
    """Pairwise reduction: the nodes of a run of shards and of the run behind it, as those of one run."""
    nodes = list(left)
    for node in right:
        nodes.append(node)
        while len(nodes) > 1 and _siblings(*nodes[-2:]):
            nodes[-2:] = [_added(*nodes[-2:])]
    return nodes


def _siblings(one: Node, other: Node) -> bool:
    """Whether two neighbours are the halves of a node."""
    return one.width == other.width and one.first % (2 * one.width) == 0


def root(nodes: list[Node]) -> Node:
    """O4: the sum over all shards. Where their number is no power of two, what is left over joins last."""
    total = nodes[-1]
    for node in reversed(nodes[:-1]):
        total = _added(node, total)
    return total


def _added(one: Node, other: Node) -> Node:
    """The sums over both nodes' shards; the other's are behind the one's."""
    grads = {name: g + other.grads[name] for name, g in one.grads.items()}
    return Node(one.first, one.width + other.width, one.loss + other.loss, grads)
