"""Fine-tuning on a text file, from a base to an adapter folder; what was written is never lost or half-written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from .adapter import count_parameters, init_adapter
from .backend import Array
from .data import all_windows, encode, random_windows, split
from .formats.folder import model_hash
from .formats.peft import save_adapter
from .lora import Adapter, LoRAConfig
from .model import Model
from .train import (
    BatchDict,
    Report,
    Settings,
    State,
    evaluate,
    load_checkpoint,
    placed,
    save_checkpoint,
    start,
    train,
)

CHECKPOINT = "checkpoint.npz"
Curve: TypeAlias = list[tuple[int, float]]  # (step, held-out loss)


@dataclass(frozen=True)
class Job:
    """What to do: the adapter, the training, N windows of T tokens a step, and how often to look and to save."""

    lora: LoRAConfig
    settings: Settings
    N: int
    T: int
    held_out: float
    every: int

    def __post_init__(self) -> None:
        for name in ("N", "T", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: expected a part between 0 and 1, got {self.held_out}")


class Seen(NamedTuple):
    """A step, for a callback: its training loss, and the held-out loss where it was measured."""

    step: int
    steps: int
    loss: float
    held_out: float | None


class Result(NamedTuple):
    """The adapter, the held-out losses (step, loss) from before the first step on, and what was trained."""

    adapter: Adapter
    curve: Curve
    parameters: int


def check_bytes(model: Model) -> None:
    """A ValueError unless the model reads bytes, the only tokens that a text file gives without a tokenizer."""
    if model.config.vocab_size != 256 or model.config.head != "lm":
        raise ValueError(
            f"base: expected a language model of bytes (vocab_size 256), got vocab_size {model.config.vocab_size} "
            f"and head {model.config.head!r}"
        )


def held_out_loss(model: Model, adapter: Adapter | None, tokens: Array, *, T: int, most: int = 64) -> float:
    """The mean loss, in nats a token, over at most `most` windows of T tokens, spread evenly over the text."""
    return evaluate(model, adapter, (w._asdict() for w in all_windows(tokens, N=32, T=T, most=most)))


def finetune(model: Model, text: str, out: Path, job: Job, *, resume: bool, report: Callable[[Seen], None]) -> Result:
    """Trains an adapter on a text, its last part held out, and writes it to the folder `out`, in PEFT's format.

    Meanwhile `out` holds a checkpoint, made anew every job.every steps; with resume, training goes on from it, to the
    same bits as without the break. A FileExistsError if out holds anything without resume; a ValueError if the text is
    too short or the checkpoint is of another job; a TrainingError as of `train`.
    """
    check_bytes(model)
    tokens = encode(text)
    text_tokens, held_out = split(tokens, job.held_out)
    adapter = init_adapter(model, job.lora, seed=job.settings.seed)
    state, curve = start(model, adapter), [(0, held_out_loss(model, adapter, held_out, T=job.T))]
    random_windows(text_tokens, N=1, T=job.T, seed=0, step=0)  # both parts are long enough, or nothing is written
    about = _identity(model, tokens, job)
    if resume:
        state, curve = _resume(out / CHECKPOINT, adapter, about)
    elif out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out}: the folder is not empty; name another, or go on with --resume")
    out.mkdir(parents=True, exist_ok=True)

    def batch(step: int) -> BatchDict:
        return random_windows(text_tokens, N=job.N, T=job.T, seed=job.settings.seed, step=step)._asdict()

    def after_step(r: Report) -> None:
        measured = None
        if r.step % job.every == 0 or r.step == job.settings.steps:
            measured = held_out_loss(*placed(model, adapter, r.state), held_out, T=job.T)
            curve.append((r.step, measured))
            save_checkpoint(out / CHECKPOINT, r.state, {**about, "curve": curve})
        report(Seen(r.step, job.settings.steps, r.loss, measured))

    state = train(model, adapter, batch, job.settings, state=state, report=after_step)
    _, trained = placed(model, adapter, state)
    assert trained is not None
    save_adapter(out, trained, model)
    (out / CHECKPOINT).unlink()
    return Result(trained, curve, count_parameters(model.config, job.lora))


def _identity(model: Model, tokens: Array, job: Job) -> dict[str, Any]:
    """What a checkpoint must share with the job that goes on from it."""
    text = hashlib.sha256(tokens.tobytes()).hexdigest()
    named = {"base": model_hash(model), "data": text, **asdict(job)}
    return {name: _plain(value) for name, value in named.items()}


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _resume(path: Path, adapter: Adapter, about: dict[str, Any]) -> tuple[State, Curve]:
    """The state and the losses of a checkpoint; a ValueError names what differs from this job."""
    state, found = load_checkpoint(path, adapter.params)
    for name, value in about.items():
        if found.get(name) != value:
            raise ValueError(f"{path}: {name} differs: the checkpoint has {found.get(name)}, this job {value}")
    return state, [(int(step), float(loss)) for step, loss in found["curve"]]
