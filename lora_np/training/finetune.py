"""Fine-tuning, from a base and data to an adapter's folder; what was written is never lost or half-written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..adapter import Adapter, init_adapter
from ..formats.adapters.peft import check_saves, save_adapter
from ..formats.adapters.peft_config import CONFIG, WEIGHTS
from ..formats.adapters.task import save_task
from ..formats.adapters.unfinished import CHECKPOINT
from ..formats.files.lock import occupied
from ..formats.files.safetensors_file import import_safetensors
from ..formats.models.folder import weights_hash
from ..model import Model
from .checkpoint import load_checkpoint, save_checkpoint, saved_step
from .curve import Curve
from .job import Job, differences, identity
from .loop import Progress, Score, State, TrainingError, evaluate, placed, train
from .ranks import ALONE, Ranks
from .tasks import Data


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
    start: Adapter | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Result:
    """Trains an adapter and writes it to the folder `out`, in PEFT's format, with task.json beside it.

    start: the adapter that training starts from, whose configuration is job.lora; None: a new one, from the seed.
    report: told each step; note: told from which checkpoint training goes on.

    Meanwhile `out` holds a checkpoint, made anew every job.every steps; with resume, training goes on from it, to the
    same bits as without the break, on any number of ranks; where there is none yet, from the start. The job may then
    have more steps than the checkpoint's. All ranks compute; the first alone reads and writes `out`. A FileExistsError
    if out holds anything else; a BlockingIOError if another process is writing there; a ValueError if the checkpoint is
    of another job, or if the ranks have different jobs, or different bits, as machines of different kinds may; a
    TrainingError as of `train`. That and a KeyboardInterrupt say at which step the checkpoint is.
    """
    import_safetensors()  # which writes the adapter: before the work, not after it
    adapter = init_adapter(model, job.lora, seed=job.settings.seed) if start is None else start
    if adapter.config != job.lora:
        raise ValueError(f"start: expected an adapter of job.lora, {job.lora}, got one of {adapter.config}")
    check_saves(adapter, model)  # likewise
    about = identity(model, data, job, start)
    for name, value in about.items():
        ranks.check_same(name, value)
    holding: AbstractContextManager[list[str]] = occupied(out) if ranks.is_first else nullcontext([])
    with holding as found:
        state, curve = State(0, adapter.params, None), Curve()
        reached = _Reached()
        if ranks.of_first(lambda: _resumes(out, found, resume)):
            state, curve, before = ranks.of_first(lambda: _resume(out / CHECKPOINT, adapter, about, job.settings.steps))
            reached = _Reached(state.step, state.step)
            note(_going_on(out, state.step, before, job.settings.steps))
        steps = job.settings.steps - state.step

        def after_step(r: Progress) -> None:
            reached.step, measured = r.step, None
            if r.step % job.every == 0 or r.step == job.settings.steps:
                ranks.check_same(f"the parameters after step {r.step}", weights_hash(r.state.params))
                try:
                    measured = evaluate(*placed(model, adapter, r.state), data.held_out, ranks)
                except TrainingError as error:
                    raise TrainingError(f"step {r.step}: {error}: the learning rate is too high") from None
                curve[r.step] = measured
                if ranks.is_first:
                    save_checkpoint(out / CHECKPOINT, r.state, {**about, "curve": [[k, *v] for k, v in curve.items()]})
                reached.saved = r.step
            report(r._replace(held_out=measured))

        with _telling(out, job, reached, ranks):
            if reached.saved is None:
                curve[0] = evaluate(model, adapter, data.held_out, ranks)
            state = train(model, adapter, data.batch, job.settings, state=state, report=after_step, ranks=ranks)
            _, trained = placed(model, adapter, state)
            assert trained is not None
            if ranks.is_first:
                save_task(out, job.task)
                save_adapter(out, trained, model)
                (out / CHECKPOINT).unlink()
        received = sum(ranks.gather([ranks.received])) // max(1, steps)
        return Result(trained, curve, sum(p.size for p in trained.params.values()), received)


def check_out(out: Path, *, resume: bool) -> None:
    """Before any work: the errors of `finetune` where `out` is a folder that it will not write into."""
    with occupied(out) as found:
        _resumes(out, found, resume)


@dataclass
class _Reached:
    """How far a run has come, and the step of its checkpoint, if there is one."""

    step: int = 0
    saved: int | None = None


@contextmanager
def _telling(out: Path, job: Job, reached: _Reached, ranks: Ranks) -> Iterator[None]:
    """What ends a run before it is done then says of which step the checkpoint is, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if ranks.is_first:  # it may have come while one was written
            reached.saved = saved_step(out / CHECKPOINT)
        if reached.saved is None:
            first = min(job.every, job.settings.steps)
            there = f"there is no checkpoint yet, as the first is of step {first}: the same line starts anew"
        else:
            there = f"the checkpoint is of step {reached.saved}: go on with the same line and --resume"
        raise KeyboardInterrupt(f"interrupted at step {reached.step}; {there}") from None
    except TrainingError as error:
        if reached.saved is None:
            raise
        raise TrainingError(
            f"{error}; {out} keeps the checkpoint of step {reached.saved}, from which the same line would end here "
            "again: take a lower --lr, and another --out"
        ) from None


def _resumes(out: Path, found: list[str], resume: bool) -> bool:
    """Whether there is a checkpoint to go on from; a FileExistsError if there is anything else, or is not to resume."""
    if not found or (resume and CHECKPOINT in found):
        return bool(found)
    what = "the folder is not empty; name another"
    if CHECKPOINT in found:
        what += ", or go on with --resume"
    elif {CONFIG, WEIGHTS}.issubset(found):
        finished = "training is finished: there is no checkpoint to go on from"
        what = f"{finished if resume else what}; to go on from its adapter: finetune --adapter {out} --out OTHER"
    elif resume:
        what += ", there is no checkpoint to go on from"
    raise FileExistsError(f"{out}: {what}")


def _going_on(out: Path, step: int, before: int, steps: int) -> str:
    line = f"{out}: goes on from its checkpoint, of step {step}"
    return line if before == steps else f"{line} of {before}; the learning rate is the one for {steps} steps from here"


def _resume(path: Path, adapter: Adapter, about: dict[str, Any], steps: int) -> tuple[State, Curve, int]:
    """The state and the scores of a checkpoint, and its job's steps, which may be fewer than this job's.

    A ValueError names what differs from this job, or is not of one.
    """

    def check(found: Mapping[str, Any]) -> None:
        differing = differences(found, about)
        if differing:
            raise ValueError(f"{path}: of another job (the checkpoint's -> this one's): {', '.join(differing)}")

    state, found = load_checkpoint(path, adapter.params, check)
    if state.step > steps:
        raise ValueError(f"{path}: expected at most this job's {steps} steps, got {state.step!r:.60}")
    try:
        curve = {int(step): Score(float(loss), float(accuracy)) for step, loss, accuracy in found.get("curve", ())}
    except (TypeError, ValueError, OverflowError):
        curve = {}
    if list(curve) != sorted({0, *curve, state.step}) or not np.isfinite(list(curve.values())).all():
        raise ValueError(f"{path}: curve: expected step, loss and accuracy of each score up to step {state.step}")
    return state, curve, found["settings"]["steps"]
