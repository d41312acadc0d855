"""Orthogonality (paper, abstract and appendix E): LoRA together with prefix tuning.

The prefix is Li and Liang's (2021): keys and values of its own in each layer, before those of the text (T9), trained
as they are, without the network that makes them there. The paper's two variants differ: its prefix-embedding trains
the embeddings of special tokens at the front of the text, its prefix-layer their states after each layer too; both
pass through W_q, W_k and W_v as tokens do, and ask as well as being asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..adapter import Adapter, LoRAConfig, init_adapter, merge
from ..backend import Array, asnumpy, xp
from ..binding import bind
from ..decode import new_cache, next_logits
from ..loss import forward
from ..model import Model
from ..training.loop import Progress, evaluate, train
from .rank import MAIN, PART, as_good
from .section import Claim, Section, Table, graded
from .study import ALPHA, QV, Spread, Study, Trainings, counted, losses, spread

P = 8  # keys and values a layer
LORA, PREFIX, BOTH = "LoRA", "prefix", "LoRA and prefix"
ROUNDING = 1e-12  # of the largest logit, in float64


def with_prefix(model: Model, tokens: Array) -> Model:
    """The model with a prefix in each layer: the keys and values of these tokens (P,), as a start.

    Li and Liang start from those of real words too (their 7.4); numbers at random would take attention from the text.
    """
    cache = new_cache(model.config, N=1, longest=len(tokens), dtype=model.dtype)
    next_logits(bind(model, None, rows=1), cache, tokens[None])
    prefix = {
        f"layers.{i}.attn.prefix.{part}": stored[i][0]
        for part, stored in (("k", cache.keys), ("v", cache.values))
        for i in range(model.config.n_layer)
    }
    return Model(replace(model.config, prefix=len(tokens)), {**model.weights, **prefix})


def start(model: Model, kind: str, seed: int) -> Adapter:
    """What is trained: the prefix, or A and B beside it."""
    lora = init_adapter(model, LoRAConfig(r=MAIN, alpha=ALPHA, targets=QV), seed=seed)
    prefix = {name: w for name, w in model.weights.items() if ".prefix." in name}
    return replace(lora, params={**lora.params, **prefix} if kind == BOTH else prefix)


def train_prefixes(
    study: Study, seeds: Sequence[int], report: Callable[[Progress], None]
) -> tuple[dict[str, Spread], Model, Adapter]:
    """The held-out losses of a prefix alone and of both, over seeds; and a model and an adapter that have both."""
    todo = [(kind, seed) for kind in (PREFIX, BOTH) for seed in seeds]
    found: dict[str, list[float]] = {PREFIX: [], BOTH: []}
    for done, (kind, seed) in enumerate(todo):
        model, adapter = _trained(study, kind, seed, counted(report, study, done, len(todo)))
        found[kind].append(evaluate(model, adapter, study.held_out).loss)
    return {kind: spread(of) for kind, of in found.items()}, model, adapter


def _trained(study: Study, kind: str, seed: int, report: Callable[[Progress], None]) -> tuple[Model, Adapter]:
    """One training, of a model with a prefix."""
    model = with_prefix(study.model, study.batch(0, seed)["tokens"][0, :P])
    adapter, settings = start(model, kind, seed), replace(study.settings, seed=seed)
    state = train(model, adapter, lambda step: study.batch(step, seed), settings, report=report)
    return model, replace(adapter, params=state.params)


def merged_apart(model: Model, adapter: Adapter, tokens: Array) -> float:
    """How far logits are from those with A and B merged, the prefix in its place, of the largest; in float64."""
    wide = replace(model, weights={name: w.astype(xp.float64) for name, w in model.weights.items()})
    update = replace(adapter, params={name: p.astype(xp.float64) for name, p in adapter.params.items()})
    y, merged = (asnumpy(y) for y in (forward(wide, tokens, update), forward(merge(wide, update), tokens)))
    return float(np.abs(y - merged).max() / np.abs(y).max())


def combined_claim(before: float, found: Mapping[str, Spread], apart: float, seeds: int) -> Claim:
    """They train together, and LoRA still merges."""
    good = as_good(before, found[PREFIX], found[BOTH], seeds)
    adds = None if good is None else not good
    return Claim(
        "LoRA and prefix tuning combine", "paper, abstract and appendix E",
        f"trained together, from one gradient: held-out loss {found[BOTH].mean:.4f}, the prefix alone "
        f"{found[PREFIX].mean:.4f}; merging A and B beside the prefix changes logits by {apart:.1e} of the largest, in "
        "float64",
        graded(adds and apart <= ROUNDING, adds or apart <= ROUNDING),
    )  # fmt: skip


def better_claim(before: float, found: Mapping[str, Spread], seeds: int) -> Claim:
    """Together they are better than LoRA alone."""
    more = (found[LORA].mean - found[BOTH].mean) / (before - found[LORA].mean)
    as_well = as_good(before, found[BOTH], found[LORA], seeds)
    better = as_good(before, found[LORA], found[BOTH], seeds) is False
    return Claim(
        "together they do better than LoRA alone", "paper, appendix E, on WikiSQL",
        f"{more:+.0%} of LoRA's gain; in part: as well, within {PART:.0%}",
        graded(as_well and better, as_well),
    )  # fmt: skip


def orthogonality(
    study: Study, trainings: Trainings, seeds: Sequence[int], report: Callable[[Progress], None]
) -> Section:
    """The section of one study, a language model's."""
    before = evaluate(study.model, None, study.held_out).loss
    found, model, adapter = train_prefixes(study, seeds, report)
    found = {LORA: losses(trainings, QV, MAIN), **found}
    apart = merged_apart(model, adapter, study.held_out[0]["tokens"][:2])
    numbers = {kind: sum(p.size for p in start(model, kind, 0).params.values()) for kind in (PREFIX, BOTH)}
    numbers[LORA] = numbers[BOTH] - numbers[PREFIX]
    rows = [[kind, f"{numbers[kind]:,}", f"{of.mean:.4f} ± {of.deviation:.4f}"] for kind, of in found.items()]
    return Section(
        "orthogonality", "Together with prefix tuning",
        f"A prefix of {P} keys and values in each layer, trained as they are (Li and Liang, 2021, make them by a "
        "network while they train); it starts as those of a real text. The paper's variants differ: they train special "
        "tokens, by their embeddings, or by their states after each layer too. LoRA is on q and v, r = "
        f"{MAIN}; one learning rate for all. Before training, without a prefix: {before:.4f}.",
        [combined_claim(before, found, apart, len(seeds)), better_claim(before, found, len(seeds))],
        tables=[Table(f"Held-out loss, {study.unit}: mean and standard deviation", ["", "trained", "loss"], rows)],
        data={"before": before, **{kind: of._asdict() for kind, of in found.items()}, "merged_apart": apart},
    )  # fmt: skip
