"""The loop: batches in, an adapter out; evaluation. It reports to a callback and prints nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..adapter import Adapter
from ..backend import Array, xp
from ..batch import BatchDict, check_batch
from ..binding import bind, frozen
from ..checks import expect
from ..loss import batch_score, step_of
from ..model import Model, check_model
from ..optim import AdamWState, adamw, clip, learning_rates, warmup_cosine
from ..parallel import default_shards, nodes
from ..threads import in_threads, map_parts
from .ranks import ALONE, Ranks


@dataclass(frozen=True)
class Settings:
    """How to train. The batch of a step is the caller's; what is left is here.

    steps         of the optimizer
    lr            the highest learning rate (O1); warmed up over `warmup` steps, then down a cosine (O2)
    b_ratio       B's rate over A's (LoRA+)
    weight_decay  decoupled (O1)
    clip          the joint norm that gradients are cut to (O3)
    seed          of the dropout masks
    recompute     whether backward computes each half block again rather than keep it: less memory, the same bits
    shards        parts of a step's batch that are computed alone (O4): in threads and on ranks, and on a GPU in turn;
                  fewer where a batch has fewer rows; None: from its shape
    """

    steps: int
    lr: float
    b_ratio: float = 1.0
    weight_decay: float = 0.0
    warmup: int = 0
    clip: float = 1.0
    seed: int = 0
    recompute: bool = False
    shards: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup", 0), ("seed", 0), ("shards", 1)):
            value = getattr(self, name)
            if name == "shards" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Settings.{name}: expected an integer of at least {least}, got {value!r}")
        for name in ("lr", "b_ratio", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"Settings.{name}: expected a finite number above 0, got {getattr(self, name)!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"Settings.weight_decay: expected 0 or more, got {self.weight_decay!r}")
        if self.warmup > self.steps:
            raise ValueError(f"Settings.warmup: expected at most steps = {self.steps}, got {self.warmup}")


class State(NamedTuple):
    """Where training stands after `step` steps: all that is needed to go on as if nothing had happened."""

    step: int
    params: Mapping[str, Array]
    optimizer: AdamWState | None

    def __repr__(self) -> str:
        return f"State(step {self.step}, {sum(p.size for p in self.params.values()):,} parameters)"


class Score(NamedTuple):
    """The mean loss, in nats, over all counted targets, and the part of them whose logit is the largest."""

    loss: float
    accuracy: float


class Progress(NamedTuple):
    """Where training stands after a step, for a callback.

    loss is the batch's before the update, norm the gradients' before clipping, lr the learning rate. stage: what is
    trained, where a piece of work has several trainings; held_out: the score on held-out data, where it was measured.
    """

    step: int
    steps: int
    loss: float
    norm: float
    lr: float
    state: State
    stage: str = ""
    held_out: Score | None = None


class TrainingError(ArithmeticError):
    """A loss or a gradient is no finite number."""


def start(model: Model, adapter: Adapter | None) -> State:
    """The state before the first step: of the adapter, or without one of every weight of the model."""
    return State(0, dict(model.weights) if adapter is None else adapter.params, None)


def placed(model: Model, adapter: Adapter | None, state: State) -> tuple[Model, Adapter | None]:
    """The model and adapter with the state's parameters in their place."""
    if adapter is None:
        return replace(model, weights=state.params), None
    return model, replace(adapter, params=state.params)


def train(
    model: Model,
    adapter: Adapter | None,
    batches: Callable[[int], BatchDict],
    settings: Settings,
    *,
    state: State | None = None,
    report: Callable[[Progress], None] = lambda _: None,
    ranks: Ranks = ALONE,
) -> State:
    """Trains the adapter, or without one every weight (O1 to O4). -> the state after the last step.

    batches(step) gives the batch of a step, from 0: as it depends on the step alone, k steps, and then the rest from
    the state after them, end in the same bits as all at once. report is called after each step. On several ranks each
    has the same arguments, computes its rows of each batch, and ends in the same bits as one alone would.
    The trained adapter is Adapter(adapter.config, state.params). A TypeError if batches or settings are something else.
    A TrainingError says at which step the numbers ceased to be finite, and why that may be; ValueErrors as of `loss`.
    """
    check_model(model)
    expect("train: batches", batches, Callable, "a function that gives the batch of a step")  # type: ignore[arg-type]
    expect("train: settings", settings, Settings, "Settings(steps=..., lr=...)")
    state = start(model, adapter) if state is None else state
    while state.step < settings.steps:
        state, seen = _step(model, adapter, batches(state.step), settings, state, ranks)
        report(seen)
    return state


def inputs_of(given: BatchDict) -> dict[str, Any]:
    """What a batch may have beside tokens and targets: None where it is missing."""
    return {name: given.get(name) for name in ("mask", "token_types", "source", "source_mask")}


def _step(
    model: Model, adapter: Adapter | None, given: BatchDict, settings: Settings, state: State, ranks: Ranks
) -> tuple[State, Progress]:
    """One step: the gradients of the whole batch, clipped, and AdamW."""
    model, adapter = placed(model, adapter, state)
    adapted, batch = step_of(
        model, adapter, given["tokens"], given["targets"], **inputs_of(given),
        dropout_seed=(settings.seed << 32) + state.step, trainable="all" if adapter is None else "adapter",
        recompute=settings.recompute,
    )  # fmt: skip
    N, T = batch.tokens.shape
    shards = default_shards(N, T) if settings.shards is None else min(settings.shards, N)
    with in_threads(ranks.threads), closing(nodes(adapted, batch, shards, mine=ranks.share(shards))) as mine:
        total, sums = ranks.sum(mine, shards, state.params)
    grads, norm_before = clip(sums, settings.clip)
    loss, norm = float(total), float(norm_before)
    lr = settings.lr * warmup_cosine(state.step, warmup=settings.warmup, total=settings.steps)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(_why(state, loss, norm, lr))
    rates = learning_rates(state.params, lr, b_ratio=settings.b_ratio)
    params, optimizer = adamw(state.params, grads, state.optimizer, lr=rates, weight_decay=settings.weight_decay)
    finite = xp.ones((), dtype=bool)
    for p in params.values():
        finite = finite & xp.isfinite(p).all()
    if not bool(finite):  # or a state that cannot be gone on from would be kept as a good one
        raise TrainingError(f"step {state.step + 1}: the update overflows: the learning rate, {lr:.3g}, is too high")
    after = State(state.step + 1, params, optimizer)
    return after, Progress(after.step, settings.steps, loss, norm, lr, after)


def _why(state: State, loss: float, norm: float, lr: float) -> str:
    """The step at which training stopped, and the likely cause."""
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the loss is {loss:.4g} but the gradient is {norm}"
    if state.step == 0:
        cause = "before any update, so the base's weights, or the adapter's, are not finite or overflow in this dtype"
    else:
        cause = (
            f"the learning rate, {lr:.3g} here, is likely too high; the parameters after step {state.step} were finite"
        )
    return f"step {state.step + 1}: {what}: {cause}"


def evaluate(model: Model, adapter: Adapter | None, batches: Iterable[BatchDict], ranks: Ranks = ALONE) -> Score:
    """T15: what a model is worth on batches; no dropout. Each batch is run in a thread of its own, on one of the ranks;
    the batches' sums are added in their order on each rank. A TrainingError if the loss is no finite number."""

    def one(given: BatchDict) -> tuple[float, int, int]:
        batch = check_batch(model.config, given["tokens"], given["targets"], **inputs_of(given))
        loss, hits = batch_score(frozen(bind(model, adapter, rows=len(batch.tokens))), batch)
        return float(loss), int(hits), len(batch.counted)

    check_model(model)
    batches = list(batches)
    part = batches[ranks.share(len(batches))]
    with in_threads(ranks.threads), closing(map_parts(one, part)) as mine:
        scores = ranks.gather(mine)
    count = sum(counted for _, _, counted in scores)
    if count == 0:
        raise ValueError("evaluate: expected at least one batch")
    loss = sum(loss for loss, _, _ in scores) / count
    if not math.isfinite(loss):
        whose = "the base's weights" if adapter is None else "the base's weights, or the adapter's,"
        raise TrainingError(f"the held-out loss is {loss}: {whose} overflow in {model.dtype}")
    return Score(loss, sum(hits for _, hits, _ in scores) / count)
