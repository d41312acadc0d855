"""lora-np finetune, eval: from data to an adapter, and what it is worth."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from ..adapter import Adapter, LoRAConfig
from ..formats.adapters.task import Task
from ..formats.models.folder import load_model
from ..model import Model
from ..parallel import default_shards
from ..training import curve, finetune, plot, tasks
from ..training.job import Job
from ..training.loop import Progress, Settings, TrainingError, evaluate
from ..training.ranks import Ranks, world
from .base import AddCommand, adapted, add_base, add_seed, add_storage, base_path, whole
from .data import (
    DATA,
    add_reading,
    add_task,
    fitting_task,
    reading,
    score_text,
    short_score,
    task_of,
    task_tokenizer,
    unit_of,
)
from .lora_options import add_lora, continued, new_config
from .output import Bar, emit, one_end, terminable

EPOCHS, STEPS, EVERY = 3, 200, 50  # defaults: of examples; of windows of a plain text


def run_finetune(args: argparse.Namespace) -> int:
    """All ranks run this, if a launcher started several; the first alone shows and writes anything."""
    ranks = world()
    with terminable(), one_end(ranks):
        _finetune(args, ranks)
    return 0


def _finetune(args: argparse.Namespace, ranks: Ranks) -> None:
    began = time.perf_counter()
    ranks.of_first(lambda: _check_outputs(args))
    task = task_of(args)
    head: dict[str, Any] = {}
    if task.labels:
        head = {"head": task.head, "n_labels": len(task.labels), "seed": args.seed}
    with Bar(shown=ranks.is_first) as bar:
        path = ranks.of_first(lambda: base_path(args, bar))
        model, start = _start(args, path, head)
        task = fitting_task(args, task, model, path)
        tokenizer = task_tokenizer(task, path, model.config)
        data = tasks.learn_from(
            args.data, args.dev, task, tokenizer, N=args.batch, held_out=args.held_out, seed=args.seed,
            reading=reading(args, path, model.config, tokenizer),
        )  # fmt: skip
        lora = new_config(args, model.config, train_head=bool(task.labels)) if start is None else start.config
        job = _job(args, task, data.epoch, lora)
        _check_ranks(args, task, ranks)
        notes = [summary.line() for summary in data.read]
        if ranks.size > 1:  # said now: a launcher that ends its ranks may no longer pass on what they say
            notes.append(f"a checkpoint each {job.every} steps: once stopped, go on with the same line and --resume")
        held_out = ""  # as it was measured last

        def report(seen: Progress) -> None:
            nonlocal held_out
            while notes:  # not before there is anything to come: an error is one line
                bar.note(notes.pop(0))
            if seen.held_out is not None:
                held_out = f", held out {short_score(task, seen.held_out)} at {seen.step}"
            bar.show("fine-tuning", seen.step, seen.steps, f"loss {seen.loss:.4g}{held_out}")

        done = finetune.finetune(
            model,
            data,
            args.out,
            job,
            resume=args.resume,
            report=report,
            ranks=ranks,
            start=start,
            note=notes.append,
        )
    if not ranks.is_first:
        return
    first, last, unit = done.curve[0], done.curve[max(done.curve)], unit_of(task, tokenizer)
    if args.plot:
        drawn = {"LoRA": [(step, score.loss) for step, score in done.curve.items()]}
        plot.loss_curves(args.plot, f"Adapting to {args.data.name}", drawn, {"before": first.loss}, unit=unit)
    result: dict[str, Any] = {
        "out": str(args.out), "steps": job.settings.steps, "parameters": done.parameters,
        "curve": [{"step": step, **score._asdict()} for step, score in done.curve.items()],
        "seconds": time.perf_counter() - began,
        "best": curve.best(done.curve), "warning": curve.worse(done.curve),
        "loss": {"base" if start is None else "start": first.loss, "adapter": last.loss}, "labels": list(task.labels),
        "data": [summary.as_json() for summary in data.read], "ranks": ranks.size, "bytes_a_step": done.bytes_a_step,
    }  # fmt: skip
    lines = [
        f"held-out loss, {unit}: before {score_text(task, first)}, adapted {score_text(task, last)}",
        f"trained {done.parameters:,} parameters in {job.settings.steps} steps; the adapter is in {args.out}",
    ]
    if result["warning"]:
        lines.append(f"warning: {result['warning']}")
    if ranks.size > 1:
        lines.append(f"{ranks.size} ranks, which got {done.bytes_a_step:,} bytes from each other in each step")
    emit(args, result, lines)


def _check_outputs(args: argparse.Namespace) -> None:
    """Before any work: an error if what comes of it cannot be written."""
    if args.plot:
        plot.check_picture(args.plot)
    if args.adapter is not None and args.out.resolve() == args.adapter.resolve():
        raise ValueError(f"--out: expected another folder than --adapter, {args.adapter}, which stays as it is")
    finetune.check_out(args.out, resume=args.resume)


def _check_ranks(args: argparse.Namespace, task: Task, ranks: Ranks) -> None:
    """A ValueError where even the largest batch leaves some rank with nothing to do."""
    N, T = args.batch, task.longest
    shards = default_shards(N, T) if args.shards is None else min(args.shards, N)
    if shards < ranks.size:
        raise ValueError(
            f"expected a shard of the batch at least for each of the {ranks.size} ranks, got {shards}, of {N} rows of "
            f"at most {T} tokens; see --batch and --shards"
        )


def _start(args: argparse.Namespace, path: Path, head: dict[str, Any]) -> tuple[Model, Adapter | None]:
    """The base, and the adapter that training starts from, if --adapter says one."""
    if args.adapter is None:
        return load_model(path, storage=args.storage, **head), None
    model, start = adapted(args, path)
    assert start is not None
    return model, continued(args, start, model.config)


def _job(args: argparse.Namespace, task: Task, epoch: int | None, lora: LoRAConfig) -> Job:
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
        lora=lora,
        settings=Settings(
            steps=steps, lr=lr, b_ratio=args.b_ratio, weight_decay=args.weight_decay, warmup=min(args.warmup, steps),
            seed=args.seed, recompute=args.recompute, shards=args.shards,
        ),
        every=every,
    )  # fmt: skip


def run_eval(args: argparse.Namespace) -> int:
    if args.windows < 1:
        raise ValueError(f"--windows: expected 1 or more, got {args.windows}")
    task = task_of(args)
    with Bar() as bar:
        path = base_path(args, bar)
    model, adapter = adapted(args, path)
    task = fitting_task(args, task, model, path)
    tokenizer = task_tokenizer(task, path, model.config)
    batches, summary = tasks.evaluation(
        args.data, task, tokenizer, most=args.windows, reading=reading(args, path, model.config, tokenizer)
    )
    # A classifier's or tagger's base alone has a head that nobody trained.
    kinds: dict[str, Adapter | None] = {"base": None} if adapter is None or not task.labels else {}
    if adapter is not None:
        kinds["adapter"] = adapter
    unit = unit_of(task, tokenizer)
    try:
        scores = {name: evaluate(model, kind, batches) for name, kind in kinds.items()}
    except TrainingError as error:
        raise TrainingError(f"{path if adapter is None else f'{path} with {args.adapter}'}: {error}") from None
    with Bar() as bar:
        bar.note(summary.line())
    result: dict[str, Any] = {"losses": {name: score.loss for name, score in scores.items()}}
    result["data"] = summary.as_json()
    if task.labels:
        result["accuracies"] = {name: score.accuracy for name, score in scores.items()}
    emit(args, result, [f"{name}: {score_text(task, score, unit)}" for name, score in scores.items()])
    return 0


def add_commands(command: AddCommand) -> None:
    """The commands of this file, and their arguments."""
    p = command(
        "finetune", run_finetune, "train an adapter: on texts, translations, texts with labels, or words with tags"
    )
    p.add_argument("--data", type=Path, required=True, metavar="FILE", help=DATA)
    p.add_argument("--dev", type=Path, metavar="FILE", help="what is held out (default: a part of --data)")
    add_base(p)
    add_storage(p)
    add_task(p)
    add_reading(p)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder for the adapter")
    p.add_argument("--adapter", type=Path, metavar="PATH", help="start from this adapter, not from a new one")
    add_lora(p)
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
    add_task(p)
    add_reading(p)
    p.add_argument("--adapter", type=Path, metavar="DIR", help="the adapter's folder")
    p.add_argument(
        "--windows", type=whole, default=64, help="of a plain text at most so many, spread out (default: %(default)s)"
    )
