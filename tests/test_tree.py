"""The tree of the sums over shards: the same order of additions, whichever runs were summed apart."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import device, dtypes, same_bits, seeds

from lora_np.parallel import Node, cut, joined, root, spans

proves = pytest.mark.proves


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
