"""Fine-tuning, from a base and data to an adapter's folder; what was written is never lost or half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ..adapter import Adapter, LoRAConfig, count_parameters, init_adapter
from ..formats.adapters.contents import WEIGHTS
from ..formats.adapters.peft import save_adapter
from ..formats.adapters.peft_config import CONFIG
from ..formats.adapters.task import Task, save_task
from ..formats.files.json_file import to_json
from ..formats.files.lock import occupied
from ..formats.files.messages import shown
from ..formats.models.folder import model_hash, weights_hash
from ..model import Model
from .checkpoint import load_checkpoint, save_checkpoint
from .loop import Progress, Score, Settings, State, TrainingError, evaluate, placed, start, train
from .ranks import ALONE, Ranks
from .tasks import Data

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


Curve: TypeAlias = dict[int, Score]  # what the adapter is worth on held-out data, after some steps


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
    report: Callable[[Progress], None],
    ranks: Ranks = ALONE,
) -> Result:
    """Trains an adapter and writes it to the folder `out`, in PEFT's format, with task.json beside it.

    Meanwhile `out` holds a checkpoint, made anew every job.every steps; with resume, training goes on from it, to the
    same bits as without the break, on any number of ranks; where there is none yet, from the start. All ranks compute;
    the first alone reads and writes `out`. A FileExistsError if out holds anything else; a BlockingIOError if another
    process is writing there; a ValueError if the checkpoint is of another job, or if the ranks have different jobs, or
    different bits, as machines of different kinds may; a TrainingError as of `train`.
    """
    adapter = init_adapter(model, job.lora, seed=job.settings.seed)
    about = _identity(model, data, job)
    for name, value in about.items():
        ranks.check_same(name, value)
    holding: AbstractContextManager[list[str]] = occupied(out) if ranks.is_first else nullcontext([])
    with holding as found:
        if ranks.of_first(lambda: _resumes(out, found, resume)):
            state, curve = ranks.of_first(lambda: _resume(out / CHECKPOINT, adapter, about, job.settings.steps))
        else:
            state, curve = start(model, adapter), {0: evaluate(model, adapter, data.held_out, ranks)}
        steps = job.settings.steps - state.step

        def after_step(r: Progress) -> None:
            measured = None
            if r.step % job.every == 0 or r.step == job.settings.steps:
                ranks.check_same(f"the parameters after step {r.step}", weights_hash(r.state.params))
                try:
                    measured = evaluate(*placed(model, adapter, r.state), data.held_out, ranks)
                except TrainingError as error:
                    raise TrainingError(f"step {r.step}: {error}: the learning rate is too high") from None
                curve[r.step] = measured
                if ranks.is_first:
                    save_checkpoint(out / CHECKPOINT, r.state, {**about, "curve": [[k, *v] for k, v in curve.items()]})
            report(r._replace(held_out=measured))

        state = train(model, adapter, data.batch, job.settings, state=state, report=after_step, ranks=ranks)
        _, trained = placed(model, adapter, state)
        assert trained is not None
        if ranks.is_first:
            save_task(out, job.task)
            save_adapter(out, trained, model)
            (out / CHECKPOINT).unlink()
        received = sum(ranks.gather([ranks.received])) // max(1, steps)
        return Result(trained, curve, count_parameters(model.config, job.lora), received)


def _resumes(out: Path, found: list[str], resume: bool) -> bool:
    """Whether there is a checkpoint to go on from; a FileExistsError if there is anything else, or is not to resume."""
    if found and not (resume and CHECKPOINT in found):
        if resume and {CONFIG, WEIGHTS}.issubset(found):
            raise FileExistsError(
                f"{out}: training is finished: there is no checkpoint to go on from; to train anew, name another folder"
            )
        hint = "there is no checkpoint to go on from" if resume else "or go on with --resume"
        raise FileExistsError(f"{out}: the folder is not empty; name another, {hint}")
    return bool(found)


def _identity(model: Model, data: Data, job: Job) -> dict[str, Any]:
    """What a checkpoint must share with the job that goes on from it: all that its bits depend on."""
    named = {"base": model_hash(model), **data.about, **asdict(job)}
    del named["settings"]["recompute"]  # so that what ran out of memory may go on with less
    return json.loads(to_json(named))  # as a checkpoint gives it back


def _resume(path: Path, adapter: Adapter, about: dict[str, Any], steps: int) -> tuple[State, Curve]:
    """The state and the scores of a checkpoint; a ValueError names what differs from this job, or is not of one."""
    state, found = load_checkpoint(path, adapter.params)
    for name, value in about.items():
        if found.get(name) != value:
            other = shown(str(found.get(name)))
            raise ValueError(f"{path}: {name} differs: the checkpoint has {other}, this job {value}")
    if state.step > steps:
        raise ValueError(f"{path}: expected at most this job's {steps} steps, got {state.step!r:.60}")
    try:
        curve = {int(step): Score(float(loss), float(accuracy)) for step, loss, accuracy in found.get("curve", ())}
    except (TypeError, ValueError, OverflowError):
        curve = {}
    if list(curve) != sorted({0, *curve, state.step}) or not np.isfinite(list(curve.values())).all():
        raise ValueError(f"{path}: curve: expected step, loss and accuracy of each score up to step {state.step}")
    return state, curve
