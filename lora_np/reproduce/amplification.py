"""Amplification (A2; paper 7.3, table 7): what an update does with W_q's own directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .. import analysis
from ..adapter import Adapter
from .section import Claim, Section, Table, graded, listed
from .study import QV, Setting, Study, Trainings, adapter_of

LOW = 4
PAPER = {4: 21.5, 64: 1.9}  # 6.91 / 0.32 and 3.57 / 1.90, GPT-3's layer 48
TWICE = 2.0  # "about 20" and "about 2", within a factor of two

ByLayer = Sequence[analysis.Amplification]


def wanted(high: int) -> list[Setting]:
    """The adapters that this needs."""
    return [Setting(QV, r, 0) for r in (LOW, high)]


def directions_claim(found: Mapping[int, ByLayer]) -> Claim:
    """The update's directions: W has more in them than in random ones, and less than in its own leading ones."""
    every = [one for of in found.values() for one in of]
    more = sum(one.in_update > one.in_random for one in every)
    less = sum(one.in_update < one.in_weight for one in every)
    n = len(every)
    return Claim(
        "the update amplifies directions that W has, but not those that it stresses: more than random ones, less than "
        "its own", "paper, 7.3, table 7",
        f"in {more} of {n} (each layer and rank) W has more in the update's directions than in random ones, in {less} "
        "less than in its own leading ones",
        graded(more == less == n, 2 * more > n and 2 * less > n),
    )  # fmt: skip


def factor_claim(found: Mapping[int, ByLayer]) -> Claim:
    """About 20 at r = 4, about 2 at r = 64."""
    low, high = min(found), max(found)
    means = {r: sum(one.factor for one in of) / len(of) for r, of in found.items()}
    near = [r for r, printed in ((low, PAPER[4]), (high, PAPER[64])) if 1 / TWICE <= means[r] / printed <= TWICE]
    return Claim(
        f"the factor is about 20 at r = {low}, about 2 at r = {high}", "paper, 7.3: GPT-3, layer 48",
        listed([f"{mean:.2f} at r = {r}, mean of the layers" for r, mean in sorted(means.items())]),
        graded(len(near) == 2, bool(near)),
    )  # fmt: skip


def falls_claim(found: Mapping[int, ByLayer]) -> Claim:
    """The factor is larger at a low rank."""
    low, high = (found[r] for r in (min(found), max(found)))
    larger = sum(one.factor > other.factor for one, other in zip(low, high, strict=True))
    return Claim(
        "the factor is larger at a low rank than at a high one", "paper, 7.3 and H.4",
        f"in {larger} of {len(low)} layers", graded(larger == len(low), 2 * larger > len(low)),
    )  # fmt: skip


def _by_layer(study: Study, adapter: Adapter) -> ByLayer:
    """A2 of W_q in each layer."""
    found = []
    for i in range(study.model.config.n_layer):
        name = f"layers.{i}.attn.q"
        A, B = adapter.params[f"{name}.A"], adapter.params[f"{name}.B"]
        found.append(analysis.amplification(study.model.weights[f"{name}.weight"], A, B, adapter.config.scale(name)))
    return found


def amplification(study: Study, trainings: Trainings, high: int) -> Section:
    """The section of one study."""
    found = {r: _by_layer(study, adapter_of(trainings[Setting(QV, r, 0)])) for r in (LOW, high)}
    rows = [
        [
            f"layer {i}, r = {r}", f"{one.in_update:.3f}", f"{one.in_weight:.3f}", f"{one.in_random:.3f}",
            f"{one.weight:.3f}", f"{one.update:.3f}", f"{one.factor:.2f}",
        ]
        for r, of in found.items()
        for i, one in enumerate(of)
    ]  # fmt: skip
    return Section(
        f"amplification-{study.id}", f"What an update amplifies: {study.name}",
        "Frobenius norms of U^T W_q V, with U and V the r leading singular directions of the update, of W_q itself, or "
        "random ones (the root of the mean square, exact), beside those of W_q and of its update; {q, v}, seed 0. The "
        "factor is the update's norm over the first column. The paper, at r = 4: 0.32, 21.67, 0.02 of 61.95, update "
        "6.91; at r = 64: 1.90, 37.71, 0.33 of 61.95, update 3.57.",
        [directions_claim(found), factor_claim(found), falls_claim(found)],
        tables=[
            Table(
                "U^T W_q V in three sets of directions",
                ["", "the update's", "W_q's own", "random", "W_q", "update", "factor"], rows,
            )
        ],
        data={f"r={r}": [{**one._asdict(), "factor": one.factor} for one in of] for r, of in found.items()},
    )  # fmt: skip
