"""Two adapters beside each other: what each has alone, what differs, and how alike their updates are."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...analysis import random_similarity, subspace_similarity
from ...backend import Array, asnumpy, xp
from ...lora import Update, singular_directions, sum_updates
from ..adapters.contents import Pair
from ..adapters.peft_config import NEUTRAL, READ
from ..adapters.prefix import change_of_prefix, moved
from ..files.messages import shown
from .survey import Read, read_any, scaled

ABSENT = "absent"
SCALED = "DoRA: what is compared are s B A and A, without magnitudes"
MOST_KINDS = 20  # of modules, one of which is looked for under another prefix


class Likeness(NamedTuple):
    """One module of both: their ranks and scales (L1), and how alike dW_1 and dW_2 are.

    cosine    <dW_1, dW_2> / (|dW_1| |dW_2|); None where one of them is zero
    distance  |dW_1 - dW_2| / |dW_1|; None where dW_1 is zero
    phi       A1 of the whole subspaces of the two A, phi(r_1, r_2); None where an A is zero, or r more than in
    chance    what random subspaces have
    Of experts: norms and products of all together, and the mean phi.
    """

    name: str
    ranks: tuple[int, int]
    scales: tuple[float, float]
    cosine: float | None
    distance: float | None
    phi: float | None
    chance: float | None


class Beside(NamedTuple):
    """Two adapters.

    only_first, only_second   modules, and tensors that are trained whole, that one of them has alone
    other_shapes              modules of both whose matrices are of other shapes
    config                    keys of the configurations that differ, with both values
    prefix                    what the second's names begin with, and the first's, where that differs
    """

    modules: list[Likeness]
    only_first: list[str]
    only_second: list[str]
    other_shapes: list[str]
    config: dict[str, tuple[Any, Any]]
    prefix: tuple[str, str] | None
    remarks: list[str]


def beside(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> Beside:
    """Compares two adapters by their modules' names; names that differ in one prefix alone are the same.

    From the factors alone: no dW is formed. Errors as in `survey`; a ValueError too if they have no module in common.
    """
    paths = Path(first), Path(second)
    one, other = (read_any(path) for path in paths)
    ours, theirs = _by_name(one), _by_name(other)
    prefix = None
    if not ours.keys() & theirs.keys():
        prefix = _prefix(ours, theirs)
    if prefix is not None:
        theirs = {moved(name, *prefix) or name: pair for name, pair in theirs.items()}
    common = [name for name in ours if name in theirs]
    if not common:
        raise ValueError(
            f"{paths[1]}: expected modules of {paths[0]}, which has {shown(next(iter(ours)))}; got "
            f"{shown(next(iter(theirs)))}, and none of the same name"
        )
    fitting = dict.fromkeys(name for name in common if _shapes(ours[name]) == _shapes(theirs[name]))
    ours_whole, theirs_whole = (dict.fromkeys(read.whole) for read in (one, other))
    return Beside(
        [_likeness(name, ours[name], theirs[name], f"{paths[0]} and {paths[1]}") for name in fitting],
        [name for name in (*ours, *ours_whole) if name not in theirs and name not in theirs_whole],
        [name for name in (*theirs, *theirs_whole) if name not in ours and name not in ours_whole],
        [name for name in common if name not in fitting],
        _differing(one.config, other.config),
        prefix,
        [SCALED for read in (one, other) if read.config.get("use_dora") is True][:1]
        + [f"{path}: {line}" for path, read in zip(paths, (one, other), strict=True) for line in read.remarks],
    )


def _prefix(ours: Mapping[str, Pair], theirs: Mapping[str, Pair]) -> tuple[str, str] | None:
    """The prefix in which all names differ, by one name of each kind: each may have kinds that the other has not."""
    kinds = {name.rpartition(".")[2]: name for name in theirs}
    found = (change_of_prefix([name], ours.keys()) for name in islice(kinds.values(), MOST_KINDS))
    return next((pair for pair in found if pair is not None), None)


def _by_name(read: Read) -> dict[str, Pair]:
    """The pairs by their modules' names; of several of one module, with their numbers."""
    several, seen = Counter(name for name, _ in read.pairs), Counter[str]()
    found: dict[str, Pair] = {}
    for name, pair in read.pairs:
        found[f"{name} [{seen[name]}]" if several[name] > 1 else name] = pair
        seen[name] += 1
    return found


def _shapes(pair: Pair) -> tuple[int, int, int]:
    return pair.A.shape[1], len(pair.B), len(pair.A) // pair.r


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ; an absent one has its default, or any that says nothing."""
    found = {}
    for key in dict.fromkeys((*one, *other)):
        a, b = (raw.get(key, READ.get(key)) for raw in (one, other))
        both_neutral = all(any(value is n or value == n for n in NEUTRAL) for value in (a, b))
        as_sets = [set(map(str, value)) if isinstance(value, list) else value for value in (a, b)]
        if as_sets[0] != as_sets[1] and not both_neutral:
            found[key] = one.get(key, ABSENT), other.get(key, ABSENT)
    return found


def _likeness(name: str, one: Pair, other: Pair, where: str) -> Likeness:
    # Of A and B of size 1, as squares of numbers that a file may hold overflow; sizes come back as one ratio.
    (a, A), (b, B) = scaled(one.A), scaled(one.B)
    (c, C), (d, D) = scaled(other.A), scaled(other.B)
    firsts = one._replace(A=xp.asarray(A), B=xp.asarray(B), s=1.0).updates
    seconds = other._replace(A=xp.asarray(C), B=xp.asarray(D), s=1.0).updates
    sizes = _norm(firsts), _norm(seconds)
    cosine = distance = None
    signs = math.copysign(1, one.s) * math.copysign(1, other.s)
    if all(sizes) and one.s and other.s:
        product = sum(_product(u, v) for u, v in zip(firsts, seconds, strict=True))
        cosine = float(np.clip(signs * product / sizes[0] / sizes[1], -1, 1))
    if sizes[0] and one.s:
        ratio = (other.s / one.s) * (c / a) * (d / b)
        if not math.isfinite(ratio):
            raise ValueError(f"{where}: {shown(name)}: the ratio of the two updates is too large for a number")
        differences = [sum_updates([u, v._replace(s=-ratio)])[0] for u, v in zip(firsts, seconds, strict=True)]
        distance = _norm(differences) / sizes[0]
    phi = chance = None
    if A.any() and C.any() and max(one.r, other.r) <= A.shape[1]:
        phi = float(np.mean([subspace_similarity(u.A, v.A)[-1, -1] for u, v in zip(firsts, seconds, strict=True)]))
        chance = float(random_similarity(A.shape[1], one.r, other.r)[-1, -1])
    return Likeness(name, (one.r, other.r), (one.s, other.s), cosine, distance, phi, chance)


def _product(u: Update, v: Update) -> float:
    """<B_u A_u, B_v A_v> = sum((B_u^T B_v) * (A_u A_v^T)): matrices of r x r alone."""
    return float(((u.B.T @ v.B) * (u.A @ v.A.T)).sum())


def _norm(updates: list[Update]) -> float:
    """The Frobenius norm of all B A together, whose s is 1, to the last bits also where they nearly cancel."""
    sigmas: list[Array] = [asnumpy(singular_directions(u.A, u.B)[1]) for u in updates]
    return float(np.linalg.norm(np.concatenate(sigmas)))
