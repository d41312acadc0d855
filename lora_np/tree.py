"""What a batch is cut into, and the one order in which the parts' sums meet again (O4).

Floating-point addition depends on its order. Here neighbours are added, then the sums of neighbours, and so on: a tree
over the shards alone. A run of shards is held as its nodes, each the sum over as many shards as a power of two, as
wide as the run allows. Two neighbouring runs join into the nodes of both: whichever threads or processes computed
which runs, and however these were joined, the sum has the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from .backend import Array


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
    """The nodes of a run and of the one behind it, as those of one run: whatever two make up a wider one are added."""
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
