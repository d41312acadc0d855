"""Rank, and which matrices (paper 7.1, 7.2): held-out loss against r, and at an equal budget of parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..adapter import LoRAConfig, count_parameters
from ..model import Config
from ..training.loop import Score
from .section import Claim, Picture, Section, Table, every, graded, listed, some, told
from .study import ERRORS, FULL, QKVO, QV, Q, Setting, Spread, Study, Targets, Trainings, losses, spread

PART = 0.05  # of what training gains: less than this is no difference
LIMITED = 0.1  # an improvement of at most this part is limited
K = ("k",)
BUDGET: Mapping[Targets, int] = {
    Q: 8,
    K: 8,
    ("v",): 8,
    ("o",): 8,
    ("q", "k"): 4,
    QV: 4,
    QKVO: 2,
}  # r: all train as many
MAIN = 8  # the rank at which others are compared

ByRank = Mapping[int, Spread]


def wanted(ranks: Sequence[int], seeds: Sequence[int]) -> list[Setting]:
    """The adapters that this needs: the grid, the equal budget, and every weight."""
    grid = [Setting(targets, r, seed) for targets in (Q, QV, QKVO) for r in (*ranks, MAIN) for seed in seeds]
    budget = [Setting(targets, r, seed) for targets, r in BUDGET.items() for seed in seeds]
    return [*grid, *budget, *(Setting(FULL, 0, seed) for seed in seeds)]


def shown(targets: Targets) -> str:
    """{q, v}."""
    return "{" + ", ".join(targets) + "}"


def shares(before: float, by_rank: ByRank) -> dict[int, float]:
    """What each rank gains over the loss before training, as a part of what the best rank gains."""
    best = min(found.mean for found in by_rank.values())
    return {r: (before - found.mean) / (before - best) for r, found in by_rank.items()}


def error(one: Spread, other: Spread, seeds: int) -> float:
    """ERRORS standard errors of the difference of two means over seeds."""
    return ERRORS * math.sqrt((one.deviation**2 + other.deviation**2) / seeds)


def as_good(before: float, one: Spread, best: Spread, seeds: int) -> bool | None:
    """Whether a loss is as good as a better one, within PART of the gain; None where the seeds' spread hides it."""
    if one == best:
        return True
    worse = told(one.mean - best.mean, PART * (before - best.mean), error(one, best, seeds))
    return None if worse is None else not worse


def low_rank_claim(before: float, by_rank: ByRank, seeds: int) -> Claim:
    """r = 1 is enough for {q, v}."""
    best = min(by_rank.values(), key=lambda found: found.mean)
    good = {r: as_good(before, found, best, seeds) for r, found in sorted(by_rank.items())}
    enough, unknown = ([r for r, is_good in good.items() if is_good is wanted] for wanted in (True, None))
    hidden = f"; not told from the best: r = {listed([str(r) for r in unknown])}" if unknown else ""
    parts = listed([f"{share:.0%} at r = {r}" for r, share in sorted(shares(before, by_rank).items())])
    return Claim(
        "a very low rank is enough: with {q, v}, r = 1 does as well as any", "paper, 7.2, table 6",
        f"of the best rank's gain: {parts}; enough from r = {enough[0]} on{hidden}",
        graded(good[1], some([is_good for r, is_good in good.items() if r <= MAIN])),
    )  # fmt: skip


def single_needs_more_claim(before: float, q: ByRank, qv: ByRank, seeds: int) -> Claim:
    """W_q alone needs a larger rank."""
    least = min(q)
    one, two = shares(before, q)[least], shares(before, qv)[least]
    gain = min(before - min(found.mean for found in of.values()) for of in (q, qv))
    return Claim(
        "W_q alone needs a larger rank than W_q and W_v together", "paper, 7.2, table 6",
        f"r = {least} gives {one:.0%} of the best rank's gain with {{q}}, {two:.0%} with {{q, v}}",
        graded(told(two - one, PART, error(q[least], qv[least], seeds) / gain), False),
    )  # fmt: skip


def pair_claim(before: float, budget: Mapping[Targets, Spread], seeds: int) -> Claim:
    """{q, v} is the best choice, for as many parameters."""
    order = sorted(budget, key=lambda targets: budget[targets].mean)
    best = order[0]
    good = as_good(before, budget[QV], budget[best], seeds)
    gap = budget[QV].mean - budget[best].mean
    return Claim(
        "for as many parameters, adapting W_q and W_v is best", "paper, 7.1, table 5",
        f"best: {shown(best)}; {shown(QV)} is number {order.index(QV) + 1} of {len(order)}"
        + (f", {gap / (before - budget[best].mean):.0%} of the gain behind" if gap else ""),
        graded(good, order.index(QV) < len(order) / 2),
    )  # fmt: skip


def lone_claim(before: float, budget: Mapping[Targets, Spread], seeds: int) -> Claim:
    """All parameters in W_q or W_k is worse than {q, v}."""
    good = [as_good(before, budget[t], budget[QV], seeds) for t in (Q, K)]
    worse = [None if is_good is None else not is_good for is_good in good]
    gains = {t: (before - budget[t].mean) / (before - budget[QV].mean) for t in (Q, K)}
    return Claim(
        "all parameters in W_q, or in W_k, are much worse than shared between W_q and W_v", "paper, 7.1, table 5",
        f"{listed([f'{shown(t)} gains {share:.0%}' for t, share in gains.items()])} of what {shown(QV)} gains",
        graded(every(worse), some(worse)),
    )  # fmt: skip


def all_matrices_claim(before: float, pair: Spread, four: Spread, seeds: int) -> Claim:
    """{q, k, v, o} improves little on {q, v} at the same rank."""
    gain = before - pair.mean
    more = (pair.mean - four.mean) / gain
    much = told(more, LIMITED, error(pair, four, seeds) / gain)
    return Claim(
        f"adapting all four matrices improves little on W_q and W_v, at the same r = {MAIN}", "often said of LoRA",
        f"{more:+.0%} of the gain, for twice the parameters", graded(None if much is None else not much, False),
    )  # fmt: skip


def full_claim(before: float, lora: Spread, full: Spread, seeds: int) -> Claim:
    """LoRA does as well as full fine-tuning."""
    share = (before - lora.mean) / (before - full.mean)
    return Claim(
        "LoRA does as well as full fine-tuning, or better", "paper, abstract and 5",
        f"{shown(QV)} with r = {MAIN} gains {share:.0%} of what training every weight gains, in as many steps",
        graded(as_good(before, lora, full, seeds), False),
    )  # fmt: skip


def if_learned(claims: Sequence[Claim], before: float, found: Sequence[Spread]) -> list[Claim]:
    """The claims as they are, if every choice lowers the held-out loss; else there is nothing to compare."""
    if all(of.mean < before for of in found):
        return list(claims)
    return [
        claim._replace(figure="not every choice lowers the held-out loss here", verdict="not checked")
        for claim in claims
    ]


def rank(study: Study, trainings: Trainings, ranks: Sequence[int], before: Score) -> Section:
    """The section of one study."""
    seeds = len({setting.seed for setting in trainings})
    grid: dict[Targets, ByRank] = {
        targets: {r: losses(trainings, targets, r) for r in ranks} for targets in (Q, QV, QKVO)
    }
    budget = {targets: losses(trainings, targets, r) for targets, r in BUDGET.items()}
    pair, four = (losses(trainings, targets, MAIN) for targets in (QV, QKVO))
    full = losses(trainings, FULL, 0)
    claims = [
        low_rank_claim(before.loss, grid[QV], seeds),
        single_needs_more_claim(before.loss, grid[Q], grid[QV], seeds),
        pair_claim(before.loss, budget, seeds),
        lone_claim(before.loss, budget, seeds),
        all_matrices_claim(before.loss, pair, four, seeds),
        full_claim(before.loss, pair, full, seeds),
    ]
    return Section(
        f"rank-{study.id}", f"Which rank, which matrices: {study.name}",
        f"Held-out loss, {study.unit}, after {study.settings.steps} steps, over {seeds} seeds of A's start and of the "
        f"order of the data; alpha = 16 and one learning rate for all. \"As well\" is within {PART:.0%} of what "
        f"training gains; what lies within {ERRORS:.0f} standard errors, where these are more, is not decided. Before "
        f"training: {_scored(study, before)}.",
        if_learned(claims, before.loss, [full, *budget.values(), *(of for by in grid.values() for of in by.values())]),
        tables=[
            _grid_table(study, grid, full, before), _budget_table(study, budget), *_accuracies(study, trainings, ranks),
        ],
        pictures=_pictures(study, grid, budget, full, before.loss),
        data=_data(trainings, before),
    )  # fmt: skip


def _scored(study: Study, score: Score) -> str:
    return f"{score.loss:.4f}" + (f", accuracy {score.accuracy:.1%}" if _labels(study) else "")


def _labels(study: Study) -> bool:
    return study.model.config.head == "classify"


def _cell(found: Spread) -> str:
    return f"{found.mean:.4f} ± {found.deviation:.4f}"


def _grid_table(study: Study, grid: Mapping[Targets, ByRank], full: Spread, before: Score) -> Table:
    rows = [[shown(targets), *(_cell(found) for found in by_rank.values())] for targets, by_rank in grid.items()]
    head = ["matrices", *(f"r = {r}" for r in next(iter(grid.values())))]
    filler = [""] * (len(head) - 2)
    rows += [["every weight", _cell(full), *filler], ["before training", f"{before.loss:.4f}", *filler]]
    return Table(f"Held-out loss, {study.unit}: mean and standard deviation", head, rows)


def _trained(config: Config, targets: Targets, r: int) -> int:
    return count_parameters(config, LoRAConfig(r=r, targets=targets))


def _budget_table(study: Study, budget: Mapping[Targets, Spread]) -> Table:
    rows = [
        [shown(targets), f"{r}", f"{_trained(study.model.config, targets, r):,}", _cell(budget[targets])]
        for targets, r in BUDGET.items()
    ]
    return Table("For as many parameters", ["matrices", "r", "parameters", "held-out loss"], rows)


def _accuracies(study: Study, trainings: Trainings, ranks: Sequence[int]) -> list[Table]:
    """The accuracies beside the losses, where labels are learned."""
    if not _labels(study):
        return []

    def cell(targets: Targets, r: int) -> str:
        found = spread([t.score.accuracy for s, t in trainings.items() if (s.targets, s.r) == (targets, r)])
        return f"{found.mean:.2%} ± {found.deviation:.2%}"

    rows = [[shown(targets), *(cell(targets, r) for r in ranks)] for targets in (Q, QV, QKVO)]
    rows.append(["every weight", cell(FULL, 0), *[""] * (len(ranks) - 1)])
    return [Table("Accuracy: mean and standard deviation", ["matrices", *(f"r = {r}" for r in ranks)], rows)]


def _pictures(
    study: Study, grid: Mapping[Targets, ByRank], budget: Mapping[Targets, Spread], full: Spread, before: float
) -> list[Picture]:
    curves = {
        shown(targets): [(r, found.mean, found.least, found.most) for r, found in by_rank.items()]
        for targets, by_rank in grid.items()
    }
    loss = f"held-out loss ({study.unit})"
    bars = {f"{shown(t)}, r = {BUDGET[t]}": (found.mean, found.least, found.most) for t, found in budget.items()}
    return [
        Picture(
            "Held-out loss against the rank; bars from the least seed to the most.",
            "spread_curves",
            [curves, {"before": before, "every weight": full.mean}, "rank r", loss],
        ),
        Picture("For as many parameters: held-out loss of each choice.", "spread_points", [bars, loss]),
    ]


def _data(trainings: Trainings, before: Score) -> dict[str, Any]:
    runs = [
        {"targets": list(s.targets) or "all weights", "r": s.r, "seed": s.seed, **t.score._asdict()}
        for s, t in trainings.items()
    ]
    return {"before": before._asdict(), "runs": runs}
