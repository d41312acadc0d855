"""lora-np finetune, eval: from data to an adapter, and what it is worth."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapter import TARGETS, Adapter, LoRAConfig
from ..formats.adapters.task import Task, load_task
from ..formats.models.chat_template import load_chat_template
from ..formats.models.folder import load_model
from ..model import Model
from ..parallel import default_shards
from ..training import finetune, plot, tasks
from ..training.examples import Tokens
from ..training.job import Job
from ..training.loop import Progress, Score, Settings, TrainingError, evaluate
from ..training.ranks import Ranks, world
from ..training.records import FORMATS
from ..training.text import ByteTokenizer
from .base import AddCommand, adapted, add_base, add_seed, add_storage, base_path, tokenizer_of, whole
from .output import Bar, emit, one_end

EPOCHS, STEPS, EVERY = 3, 200, 50  # defaults: of examples; of windows of a plain text
LONGEST = {"lm": 256, "classify": 64, "tag": 128}
WINDOW = 64


def run_finetune(args: argparse.Namespace) -> int:
    """All ranks run this, if a launcher started several; the first alone shows and writes anything."""
    ranks = world()
    with one_end(ranks):
        _finetune(args, ranks)
    return 0


def _finetune(args: argparse.Namespace, ranks: Ranks) -> None:
    if args.plot:
        plot.check_picture(args.plot)
    began = time.perf_counter()
    task = _task(args)
    head: dict[str, Any] = {}
    if task.name != "lm":
        head = {"head": task.name, "n_labels": len(task.labels), "seed": args.seed}
    with Bar(shown=ranks.is_first) as bar:
        path = ranks.of_first(lambda: base_path(args, bar))
        model = load_model(path, storage=args.storage, **head)
        task = _fitting(args, task, model, path)
        tokenizer = tokenizer_of(path, model.config)
        data = tasks.learn_from(
            args.data, args.dev, task, tokenizer, N=args.batch, held_out=args.held_out, seed=args.seed,
            reading=_reading(args, path),
        )  # fmt: skip
        job = _job(args, task, data.epoch)
        _check_ranks(args, task, ranks)
        notes = [summary.line() for summary in data.read]

        def report(seen: Progress) -> None:
            while notes:  # not before there is anything to come: an error is one line
                bar.note(notes.pop(0))
            held_out = "" if seen.held_out is None else f", held out {_shown(task, seen.held_out)}"
            bar.show("fine-tuning", seen.step, seen.steps, f"loss {seen.loss:.3f}{held_out}")

        done = finetune.finetune(model, data, args.out, job, resume=args.resume, report=report, ranks=ranks)
    if not ranks.is_first:
        return
    first, last, unit = done.curve[0], done.curve[max(done.curve)], _unit(task, tokenizer)
    if args.plot:
        curve = [(step, score.loss) for step, score in done.curve.items()]
        plot.loss_curves(args.plot, f"Adapting to {args.data.name}", {"LoRA": curve}, {"before": first.loss}, unit=unit)
    result = {
        "out": str(args.out), "steps": job.settings.steps, "parameters": done.parameters,
        "curve": [{"step": step, **score._asdict()} for step, score in done.curve.items()],
        "seconds": time.perf_counter() - began,
        "loss": {"base": first.loss, "adapter": last.loss}, "labels": list(task.labels),
        "data": [summary.as_json() for summary in data.read], "ranks": ranks.size, "bytes_a_step": done.bytes_a_step,
    }  # fmt: skip
    lines = [
        f"held-out loss, {unit}: before {_shown(task, first)}, adapted {_shown(task, last)}",
        f"trained {done.parameters:,} parameters in {job.settings.steps} steps; the adapter is in {args.out}",
    ]
    if ranks.size > 1:
        lines.append(f"{ranks.size} ranks, which got {done.bytes_a_step:,} bytes from each other in each step")
    emit(args, result, lines)


def _check_ranks(args: argparse.Namespace, task: Task, ranks: Ranks) -> None:
    """A ValueError where even the largest batch leaves some rank with nothing to do."""
    N, T = args.batch, task.longest
    shards = default_shards(N, T) if args.shards is None else min(args.shards, N)
    if shards < ranks.size:
        raise ValueError(
            f"expected a shard of the batch at least for each of the {ranks.size} ranks, got {shards}, of {N} rows of "
            f"at most {T} tokens; see --batch and --shards"
        )


def _task(args: argparse.Namespace) -> Task:
    """The task that the arguments name, with the labels of the data."""
    if args.window is not None:
        longest = args.window
    else:
        longest = WINDOW if args.base is None and args.task == "lm" else LONGEST[args.task]
    return tasks.task_of(args.task, args.data, longest, args.format)


def _reading(args: argparse.Namespace, path: Path) -> tasks.Reading:
    """How the files of data are read, for the base in `path`."""
    return tasks.Reading(args.format, lambda: load_chat_template(path, args.chat_template))


def _fitting(args: argparse.Namespace, task: Task, model: Model, path: Path) -> Task:
    """The task with texts no longer than the model's, where the arguments do not say how long.

    A ValueError if the model is for another task, or other labels.
    """
    config = model.config
    if config.head != task.name or (task.labels and config.n_labels != len(task.labels)):
        labels = f" with {len(task.labels)} labels, as the data has" if task.labels else ""
        raise ValueError(
            f"{path}: expected a model for task {task.name}{labels}, got head {config.head!r} with "
            f"{config.n_labels or 'no'} labels"
        )
    return task if args.window is not None else replace(task, longest=min(task.longest, model.config.longest))


def _job(args: argparse.Namespace, task: Task, epoch: int | None) -> Job:
    """What to do; what is not said follows from the base and the data."""
    if args.epochs is not None and epoch is None:
        raise ValueError("--epochs: windows of a plain text are drawn at random; name --steps")
    steps = args.steps
    if steps is None:
        steps = STEPS if epoch is None else epoch * (EPOCHS if args.epochs is None else args.epochs)
    every = args.every
    if every is None:
        every = EVERY if epoch is None else epoch
    lr = (1e-2 if args.base is None else 1e-3) if args.lr is None else args.lr
    return Job(
        task=task,
        lora=LoRAConfig(
            r=args.r, alpha=args.alpha, targets=tuple(args.targets), dropout=args.dropout, train_head=task.name != "lm"
        ),
        settings=Settings(
            steps=steps, lr=lr, b_ratio=args.b_ratio, weight_decay=args.weight_decay, warmup=min(args.warmup, steps),
            seed=args.seed, recompute=args.recompute, shards=args.shards,
        ),
        every=every,
    )  # fmt: skip


def _shown(task: Task, score: Score, unit: str = "") -> str:
    accuracy = "" if task.name == "lm" else f", accuracy {score.accuracy:.1%}"
    return f"{score.loss:.4f} {unit}".rstrip() + accuracy


def _unit(task: Task, tokenizer: Tokens) -> str:
    """What a loss is counted in."""
    token = "byte" if isinstance(tokenizer, ByteTokenizer) else "token"
    return f"nats a {'text' if task.name == 'classify' else 'word' if task.name == 'tag' else token}"


def run_eval(args: argparse.Namespace) -> int:
    if args.windows < 1:
        raise ValueError(f"--windows: expected 1 or more, got {args.windows}")
    task = None if args.adapter is None else load_task(args.adapter)
    task = _task(args) if task is None else task if args.window is None else replace(task, longest=args.window)
    with Bar() as bar:
        path = base_path(args, bar)
    model, adapter = adapted(args, path)
    task = _fitting(args, task, model, path)
    tokenizer = tokenizer_of(path, model.config)
    batches, summary = tasks.evaluation(args.data, task, tokenizer, most=args.windows, reading=_reading(args, path))
    # A classifier's or tagger's base alone has a head that nobody trained.
    kinds: dict[str, Adapter | None] = {"base": None} if adapter is None or task.name == "lm" else {}
    if adapter is not None:
        kinds["adapter"] = adapter
    unit = _unit(task, tokenizer)
    try:
        scores = {name: evaluate(model, kind, batches) for name, kind in kinds.items()}
    except TrainingError as error:
        raise TrainingError(f"{path if adapter is None else f'{path} with {args.adapter}'}: {error}") from None
    with Bar() as bar:
        bar.note(summary.line())
    result: dict[str, Any] = {"losses": {name: score.loss for name, score in scores.items()}}
    result["data"] = summary.as_json()
    if task.name != "lm":
        result["accuracies"] = {name: score.accuracy for name, score in scores.items()}
    emit(args, result, [f"{name}: {_shown(task, score, unit)}" for name, score in scores.items()])
    return 0


DATA = (
    "lm: a text, whose last part is held out; conversations (messages) as the base's chat template writes them; "
    "prompts with completions, instructions, or texts, as JSON lines, a JSON array, CSV or TSV, or a||b in each line. "
    "classify: text<TAB>label lines, or text and label as JSON, CSV or TSV. tag: CoNLL columns, the word first, its "
    "tag last, or tokens and ner_tags as JSON. The format is found from what is in the file"
)


def _add_task(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task", choices=list(LONGEST), default="lm",
        help="the next token, a label for each text, or a tag for each word (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--window", type=whole, metavar="T",
        help=f"tokens of a window, or the most of an example (default: {LONGEST['lm']}, embedded base {WINDOW}; "
        f"classify {LONGEST['classify']}, tag {LONGEST['tag']})",
    )  # fmt: skip


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=FORMATS, help="what is in the files of data (default: as it is found)")
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="a Jinja file for conversations (default: the base's own)"
    )


def add_commands(command: AddCommand) -> None:
    """The commands of this file, and their arguments."""
    p = command("finetune", run_finetune, "train an adapter: on texts, on texts with labels, or on words with tags")
    p.add_argument("--data", type=Path, required=True, metavar="FILE", help=DATA)
    p.add_argument("--dev", type=Path, metavar="FILE", help="what is held out (default: a part of --data)")
    add_base(p)
    add_storage(p)
    _add_task(p)
    _add_reading(p)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder for the adapter")
    p.add_argument("--r", type=whole, default=8, help="rank (default: %(default)s)")
    p.add_argument("--alpha", type=float, default=16, help="s = alpha / r (default: %(default)s)")
    p.add_argument(
        "--targets", nargs="+", default=["q", "v"], metavar="T", help=f"of {' '.join(TARGETS)} (default: q v)"
    )
    p.add_argument("--dropout", type=float, default=0.0, help="on the low-rank branch (default: %(default)s)")
    how_long = p.add_mutually_exclusive_group()
    how_long.add_argument("--steps", type=whole, help=f"optimizer steps (default: {STEPS}, or {EPOCHS} epochs)")
    how_long.add_argument("--epochs", type=whole, help="how often each example comes")
    p.add_argument("--lr", type=float, help="highest learning rate (default: 1e-3; 1e-2 with the embedded base)")
    p.add_argument(
        "--b-ratio", type=float, default=1.0, help="B's learning rate over A's, LoRA+ (default: %(default)s)"
    )
    p.add_argument("--weight-decay", type=float, default=0.0, help="decoupled (default: %(default)s)")
    p.add_argument("--warmup", type=whole, default=20, help="steps of warm-up (default: %(default)s)")
    p.add_argument("--batch", type=whole, default=16, help="examples or windows a step (default: %(default)s)")
    p.add_argument("--recompute", action="store_true", help="keep less for backward and compute it again: less memory")
    p.add_argument(
        "--shards", type=whole,
        help="parts of a batch that are computed alone: in threads, on ranks, on a GPU in turn (default: by its shape)",
    )  # fmt: skip
    p.add_argument("--held-out", type=float, default=0.1, help="part of the data, without --dev (default: %(default)s)")
    p.add_argument(
        "--every", type=whole, help=f"steps between evaluations, each with a checkpoint (default: an epoch, or {EVERY})"
    )
    add_seed(p, "everything random")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the loss curve")

    p = command("eval", run_eval, "the loss on a file, without and with an adapter; the accuracy of labels")
    p.add_argument("--data", type=Path, required=True, metavar="FILE", help="as for finetune")
    add_base(p)
    add_storage(p)
    _add_task(p)
    _add_reading(p)
    p.add_argument("--adapter", type=Path, metavar="DIR", help="the adapter's folder")
    p.add_argument(
        "--windows", type=whole, default=64, help="of a plain text at most so many, spread out (default: %(default)s)"
    )
