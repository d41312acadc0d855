"""Fine-tuning, from a base and data to an adapter's folder; what was written is never lost or half-written."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from .adapter import count_parameters, init_adapter
from .backend import Array, asnumpy
from .checkpoint import load_checkpoint, save_checkpoint
from .formats.adapters.peft import save_adapter
from .formats.adapters.task import Task, save_task
from .formats.models.folder import model_hash
from .lora import Adapter, LoRAConfig
from .model import Model
from .ranks import ALONE, Ranks
from .tasks import Data
from .train import (
    Report,
    Score,
    Settings,
    State,
    TrainingError,
    evaluate,
    placed,
    start,
    train,
)

CHECKPOINT = "checkpoint.npz"


@dataclass(frozen=True)
class Job:
    """What to do: the task, the adapter, the training, and after how many steps to look and to save each time."""

    task: Task
    lora: LoRAConfig
    settings: Settings
    every: int

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every: expected at least 1, got {self.every}")


class Point(NamedTuple):
    """What the adapter is worth after a step, on what is held out."""

    step: int
    loss: float
    accuracy: float


Curve: TypeAlias = list[Point]


class Seen(NamedTuple):
    """A step, for a callback: its training loss, and the held-out score where it was measured."""

    step: int
    steps: int
    loss: float
    held_out: Score | None


class Result(NamedTuple):
    """The adapter, the held-out scores from before the first step on, and how many parameters were trained.

    bytes_a_step: of sums of gradients that all ranks together got from others, in one step
    """

    adapter: Adapter
    curve: Curve
    parameters: int
    bytes_a_step: int


def finetune(
    model: Model,
    data: Data,
    out: Path,
    job: Job,
    *,
    resume: bool,
    report: Callable[[Seen], None],
    ranks: Ranks = ALONE,
) -> Result:
    """Trains an adapter and writes it to the folder `out`, in PEFT's format, with task.json beside it.

    Meanwhile `out` holds a checkpoint, made anew every job.every steps; with resume, training goes on from it, to the
    same bits as without the break, on any number of ranks. All ranks compute; the first alone reads and writes `out`.
    A FileExistsError if out holds anything without resume; a ValueError if the checkpoint is of another job, or if the
    ranks have different jobs, or different bits, as machines of different kinds may; a TrainingError as of `train`.
    """
    adapter = init_adapter(model, job.lora, seed=job.settings.seed)
    about = _identity(model, data, job)
    for name, value in about.items():
        ranks.check_same(name, value)
    if resume:
        state, curve = ranks.of_first(lambda: _resume(out / CHECKPOINT, adapter, about))
    else:
        ranks.of_first(lambda: _refuse_used(out))
        state, curve = start(model, adapter), [Point(0, *evaluate(model, adapter, data.held_out, ranks))]
    ranks.of_first(lambda: out.mkdir(parents=True, exist_ok=True))
    steps = job.settings.steps - state.step

    def after_step(r: Report) -> None:
        measured = None
        if r.step % job.every == 0 or r.step == job.settings.steps:
            ranks.check_same(f"the parameters after step {r.step}", _digest(r.state.params))
            measured = evaluate(*placed(model, adapter, r.state), data.held_out, ranks)
            if not math.isfinite(measured.loss):
                raise TrainingError(
                    f"step {r.step}: the held-out loss is {measured.loss}: the learning rate is too high"
                )
            curve.append(Point(r.step, *measured))
            if ranks.is_first:
                save_checkpoint(out / CHECKPOINT, r.state, {**about, "curve": curve})
        report(Seen(r.step, job.settings.steps, r.loss, measured))

    state = train(model, adapter, data.batch, job.settings, state=state, report=after_step, ranks=ranks)
    _, trained = placed(model, adapter, state)
    assert trained is not None
    if ranks.is_first:
        save_task(out, job.task)
        save_adapter(out, trained, model)
        (out / CHECKPOINT).unlink()
    received = sum(ranks.gather([ranks.received])) // max(1, steps)
    return Result(trained, curve, count_parameters(model.config, job.lora), received)


def _refuse_used(out: Path) -> None:
    """A FileExistsError if the folder holds anything."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out}: the folder is not empty; name another, or go on with --resume")


def _digest(params: Mapping[str, Array]) -> str:
    """SHA-256 of the parameters' bytes."""
    digest = hashlib.sha256()
    for value in params.values():
        digest.update(asnumpy(value).tobytes())
    return digest.hexdigest()


def _identity(model: Model, data: Data, job: Job) -> dict[str, Any]:
    """What a checkpoint must share with the job that goes on from it: all that its bits depend on."""
    named = {"base": model_hash(model), **data.about, **asdict(job)}
    del named["settings"]["recompute"]  # so that what ran out of memory may go on with less
    return {name: _plain(value) for name, value in named.items()}


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _resume(path: Path, adapter: Adapter, about: dict[str, Any]) -> tuple[State, Curve]:
    """The state and the scores of a checkpoint; a ValueError names what differs from this job, or makes no sense."""
    state, found = load_checkpoint(path, adapter.params)
    for name, value in about.items():
        if found.get(name) != value:
            raise ValueError(f"{path}: {name} differs: the checkpoint has {found.get(name)!s:.400}, this job {value}")
    try:
        curve = [Point(*map(float, point)) for point in found["curve"]]  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: curve: expected [step, loss, accuracy] of each evaluation") from None
    steps = about["settings"]["steps"]
    if not curve or not curve[-1].step == state.step <= steps:
        raise ValueError(f"{path}: step {state.step!r:.60}: expected the last of its curve, and of {steps} at most")
    return state, [point._replace(step=int(point.step)) for point in curve]
