"""What is trained for the report: adapters of one base on one task, for each choice of matrices, rank and seed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ..adapter import Adapter, LoRAConfig, init_adapter
from ..backend import Array
from ..batch import BatchDict
from ..model import Model
from ..training.loop import Progress, Score, Settings, evaluate, placed, train
from .kept import Kept

Targets: TypeAlias = tuple[str, ...]
Q, QV, QKVO = ("q",), ("q", "v"), ("q", "k", "v", "o")
ALPHA = 16  # the same for every rank, as in the paper (4.1)
ERRORS = 2.0  # a difference of fewer standard errors is none that is told


class Setting(NamedTuple):
    """What an adapter is trained with; FULL stands for every weight."""

    targets: Targets
    r: int
    seed: int


FULL: Targets = ()


class Trained(NamedTuple):
    """An adapter, None where every weight was trained, and its score on what is held out."""

    adapter: Adapter | None
    score: Score


Trainings: TypeAlias = Mapping[Setting, Trained]


@dataclass(frozen=True)
class Study:
    """A base and a task.

    id        a word for both, among the report's anchors
    name      what they are called in the report
    unit      of a held-out loss
    batch     the batch of a step, for a seed
    held_out  batches that are not trained on
    settings  of every adapter's training; full_lr is the rate where every weight is trained
    lora      what all adapters' configurations share, beside r, alpha and targets
    """

    id: str
    name: str
    unit: str
    model: Model
    batch: Callable[[int, int], BatchDict]
    held_out: Sequence[BatchDict]
    settings: Settings
    full_lr: float
    lora: Mapping[str, Any] = field(default_factory=dict)


def train_all(
    study: Study, wanted: Iterable[Setting], report: Callable[[Progress], None], kept: Kept | None = None
) -> dict[Setting, Trained]:
    """Trains one adapter for each setting, each setting once. kept: where those of before are, and new ones go."""
    settings = list(dict.fromkeys(wanted))
    found = {} if kept is None else {s: kept.training(_name(study, s)) for s in settings}
    there = {s: _trained(study, s, *training) for s, training in found.items() if training is not None}
    todo = [setting for setting in settings if setting not in there]
    for done, setting in enumerate(todo):
        there[setting] = trained = _train(study, setting, counted(report, study, done, len(todo)))
        if kept is not None:
            params = {} if trained.adapter is None else trained.adapter.params
            kept.keep_training(_name(study, setting), params, trained.score)
    return {setting: there[setting] for setting in settings}


def _name(study: Study, setting: Setting) -> str:
    """What a training's file is called."""
    name = f"{study.name} {'-'.join(setting.targets) or 'all'} r{setting.r} seed{setting.seed}"
    return re.sub(r"[^\w-]+", "_", name)


def _trained(study: Study, setting: Setting, params: Mapping[str, Array], score: Score) -> Trained:
    """A training as it was kept."""
    return Trained(Adapter(_lora(study, setting), params) if setting.targets != FULL else None, score)


def _lora(study: Study, setting: Setting) -> LoRAConfig:
    return LoRAConfig(r=setting.r, alpha=ALPHA, targets=setting.targets, **study.lora)


def counted(report: Callable[[Progress], None], study: Study, done: int, trainings: int) -> Callable[[Progress], None]:
    """A training's steps, reported as steps of all trainings."""
    steps = study.settings.steps
    return lambda r: report(r._replace(stage=study.name, step=done * steps + r.step, steps=trainings * steps))


def _train(study: Study, setting: Setting, report: Callable[[Progress], None]) -> Trained:
    settings = replace(study.settings, seed=setting.seed)
    adapter = None
    if setting.targets == FULL:
        settings = replace(settings, lr=study.full_lr)
    else:
        adapter = init_adapter(study.model, _lora(study, setting), seed=setting.seed)
    state = train(study.model, adapter, lambda step: study.batch(step, setting.seed), settings, report=report)
    model, adapter = placed(study.model, adapter, state)
    return Trained(adapter, evaluate(model, adapter, study.held_out))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of some values; of one alone 0."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0


class Spread(NamedTuple):
    """A figure over seeds: its mean, the standard deviation of one, and the least and the most."""

    mean: float
    deviation: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """The spread of one figure over seeds; of one seed alone the deviation is 0."""
    of = np.array(values)
    return Spread(float(of.mean()), float(of.std(ddof=1)) if len(of) > 1 else 0.0, float(of.min()), float(of.max()))


def losses(trainings: Trainings, targets: Targets, r: int) -> Spread:
    """The held-out loss of one choice of matrices and rank, over the seeds that it was trained with."""
    return spread([t.score.loss for s, t in trainings.items() if (s.targets, s.r) == (targets, r)])


def adapter_of(trained: Trained) -> Adapter:
    """The adapter of a training that trained one."""
    if trained.adapter is None:
        raise ValueError("expected a trained adapter, got one of every weight")
    return trained.adapter
