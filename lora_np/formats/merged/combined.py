"""A weighted sum of adapters as one adapter (L9), from their files, without a base."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...adapter import check_weights
from ...backend import asnumpy, xp
from ...lora import Update, singular_directions, sum_updates
from ..adapters.contents import Contents, Pair, read_contents
from ..adapters.peft_writer import config_of, write_peft
from ..files.atomic import expect_new
from ..files.messages import shown
from .extract import Lost


class Combined(NamedTuple):
    """What was combined: each module, and what is wrong with the adapters though they can be."""

    modules: list[Lost]
    remarks: list[str]


def combine_files(
    adapters: Sequence[str | os.PathLike[str]],
    weights: Sequence[float],
    out: str | os.PathLike[str],
    rank: int | None = None,
) -> Combined:
    """L9: writes sum_i w_i s_i B_i A_i as PEFT's folder, s = 1; or the nearest of at most `rank`, module by module.

    A and B are float64 where one of a module's is, else float32: w_i s_i B_i is computed in float64 and rounded once. A
    module that one adapter has alone keeps its rank. A ValueError names what cannot be summed so: what is trained
    whole, look-ups, biases of B, experts, matrices of other shapes.
    """
    paths, target = [Path(path) for path in adapters], Path(out)
    check_weights(paths, weights, "combine")
    if rank is not None and rank < 1:
        raise ValueError(f"--rank: expected at least 1, got {rank}")
    expect_new(target)
    found = [read_contents(path) for path in paths]
    for one in found:
        _check(one)
    pairs: dict[str, Pair] = {}
    modules = []
    for name in dict.fromkeys(name for one in found for name in one.pairs):
        parts = [(w, one.pairs[name][0], one.path) for w, one in zip(weights, found, strict=True) if name in one.pairs]
        shapes = {(len(pair.B), pair.A.shape[1]) for _, pair, _ in parts}
        if len(shapes) > 1:
            raise ValueError(f"{parts[-1][2]}: {shown(name)}: expected the shape that the others have, got several")
        pairs[name], lost = _sum(name, [(w, pair) for w, pair, _ in parts], rank, target)
        modules.append(lost)
    conv1d = {one.raw.get("fan_in_fan_out") is True for one in found}
    if len(conv1d) > 1:
        raise ValueError(f"{paths[-1]}: fan_in_fan_out: expected all adapters to have the same")
    names = list(dict.fromkeys(str(one.raw.get("base_model_name_or_path") or "") for one in found))
    more = {
        "fan_in_fan_out": conv1d.pop(), "task_type": found[0].raw.get("task_type"),
        "base_model_name_or_path": names[0] or None,
    }  # fmt: skip
    write_peft(target, config_of(pairs, **more), {name: [pair] for name, pair in pairs.items()}, {}, {})
    said = " and ".join(shown(name) or "none" for name in names)
    other = [f"the adapters name different bases: {said}"] if len(names) > 1 else []
    if len(found) > 1 and not set.intersection(*(set(one.pairs) for one in found)):
        other.append("no module is adapted by all of them: their names may differ in a prefix")
    return Combined(modules, [*other, *(f"{one.path}: {line}" for one in found for line in one.remarks)])


def _check(one: Contents) -> None:
    """A ValueError names what cannot be summed by stacking A and B."""
    if one.has_dora:
        raise ValueError(f"{one.path}: DoRA scales the rows of W0 + s B A, which is no sum of updates (L10): merge it")
    for name in (*one.whole, *one.rows):
        raise ValueError(f"{one.path}: {shown(name)}: trained whole, which cannot be combined; expected A and B alone")
    for name, several in one.pairs.items():
        what = (
            "experts" if len(several) > 1 or len(several[0].updates) > 1 else
            "a look-up" if several[0].is_look_up else
            "a bias of B (lora_bias)" if several[0].bias is not None else None
        )  # fmt: skip
        if what is not None:
            raise ValueError(f"{one.path}: {shown(name)}: {what}: not supported in a combination")


def _sum(name: str, parts: Sequence[tuple[float, Pair]], rank: int | None, target: Path) -> tuple[Pair, Lost]:
    dtype = np.float64 if any(v.dtype == np.float64 for _, pair in parts for v in (pair.A, pair.B)) else np.float32
    updates = [
        Update(xp.asarray(pair.A.astype(np.float64)), xp.asarray(pair.B.astype(np.float64)), w * pair.s)
        for w, pair in parts
    ]
    total, S = sum_updates(updates, rank=rank)
    if rank is None:
        S = singular_directions(total.A, total.B)[1]
    with np.errstate(over="ignore"):
        A, B = (asnumpy(factor).astype(dtype) for factor in (total.A, total.B))
    lost = Lost(
        name, len(B), A.shape[1], len(A), float(np.linalg.norm(asnumpy(S))),
        0.0 if rank is None else float(np.linalg.norm(asnumpy(S[rank:]))),
    )  # fmt: skip
    if not (np.isfinite(A).all() and np.isfinite(B).all() and math.isfinite(lost.norm)):
        raise ValueError(f"{target}: {shown(name)}: the sum is too large for {np.dtype(dtype).name}")
    return Pair(A, B, 1.0, len(A)), lost
