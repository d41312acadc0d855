"""What there is to learn or to measure, in options: the data, its task, and what losses on it are counted in."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..formats.adapters.task import TASK, Task, load_task
from ..formats.files.messages import listed, shown
from ..formats.models.chat_template import load_chat_template
from ..model import Config, Model
from ..training import tasks
from ..training.examples import Tokens
from ..training.loop import Score
from ..training.records import FORMATS
from ..training.text import ByteTokenizer
from ..training.translation import decoder_start, ended
from .base import tokenizer_of, whole

LONGEST = {"lm": 256, "translate": 128, "classify": 64, "tag": 128}
WINDOW = 64

DATA = (
    "lm: a text, whose last part is held out; conversations (messages) as the base's chat template writes them; "
    "prompts with completions, instructions, or texts, as JSON lines, a JSON array, CSV or TSV, or a||b in each line. "
    "translate: source and target as JSON, CSV or TSV, source<TAB>target or source||target lines. "
    "classify: text<TAB>label lines, or text and label as JSON, CSV or TSV. tag: CoNLL columns, the word first, its "
    "tag last, or tokens and ner_tags as JSON. The format is found from what is in the file"
)


def add_task(parser: argparse.ArgumentParser) -> None:
    """The arguments --task and --window."""
    parser.add_argument(
        "--task", choices=list(LONGEST),
        help="the next token, a text after another (an encoder-decoder, or a decoder), a label for each text, or a tag "
        "for each word (default: the adapter's, or lm)",
    )  # fmt: skip
    parser.add_argument(
        "--window", type=whole, metavar="T",
        help="tokens of a window, or the most of an example (default: the adapter's, or "
        f"{LONGEST['lm']}, embedded base {WINDOW}; translate {LONGEST['translate']}, each of source and target if an "
        f"encoder reads the source; classify {LONGEST['classify']}, tag {LONGEST['tag']})",
    )  # fmt: skip


def add_reading(parser: argparse.ArgumentParser) -> None:
    """The arguments --format and --chat-template."""
    parser.add_argument("--format", choices=FORMATS, help="what is in the files of data (default: as it is found)")
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="a Jinja file for conversations (default: the base's own)"
    )


def reading(args: argparse.Namespace, path: Path, config: Config, tokenizer: Tokens) -> tasks.Reading:
    """How the files of data are read, for the base in `path`."""
    start = decoder_start(path, config, tokenizer)
    return tasks.Reading(args.format, lambda: load_chat_template(path, args.chat_template), start)


def task_tokenizer(task: Task, path: Path, config: Config) -> Tokens:
    """The tokenizer of the base in `path`, as the task has it."""
    tokenizer = tokenizer_of(path, config)
    return ended(tokenizer) if task.name == "translate" else tokenizer


def task_of(args: argparse.Namespace) -> Task:
    """The task that the adapter was trained for, if there is one that says it; else as the arguments and the data are.

    A ValueError if the arguments name another task, or the data has labels that the adapter does not know.
    """
    known = None if args.adapter is None else load_task(args.adapter)
    if known is None:
        name = args.task or "lm"
        longest = _longest(args, name) if args.window is None else args.window
        return tasks.task_of(name, args.data, longest, args.format)
    if args.task not in (None, known.name):
        raise ValueError(f"--task: expected {known.name}, as {args.adapter / TASK} has it, got {args.task}")
    more = sorted(set(tasks.labels_in(args.data, known.name, args.format)) - set(known.labels))
    if more:
        raise ValueError(
            f"{args.data}: expected the labels of {args.adapter}, {listed(_shown(known.labels))}; got also "
            f"{listed(_shown(more))}"
        )
    return known if args.window is None else replace(known, longest=args.window)


def _longest(args: argparse.Namespace, name: str) -> int:
    return WINDOW if args.base is None and name == "lm" else LONGEST[name]


def _shown(names: Sequence[str]) -> list[str]:
    return [shown(name, 60) for name in names]


def fitting_task(args: argparse.Namespace, task: Task, model: Model, path: Path) -> Task:
    """The task with texts no longer than the model's, where the arguments do not say how long.

    A ValueError if the model is for another task, or other labels.
    """
    config = model.config
    whose = path if args.adapter is None else f"{path} with {args.adapter}"
    if config.n_encoder and task.name != "translate":
        raise ValueError(f"{whose}: an encoder-decoder: expected --task translate, got {task.name}")
    if config.head != task.head or (task.labels and config.n_labels != len(task.labels)):
        labels = (
            f" with {len(task.labels)} labels, as the data has: {listed(_shown(task.labels))}" if task.labels else ""
        )
        raise ValueError(
            f"{whose}: expected a model for task {task.name}{labels}; got head {config.head!r} with "
            f"{config.n_labels or 'no'} labels"
        )
    return task if args.window is not None else replace(task, longest=min(task.longest, model.config.longest))


def score_text(task: Task, score: Score, unit: str = "") -> str:
    """A score for a line: the loss, and where there are labels, how many are right."""
    accuracy = f", accuracy {score.accuracy:.1%}" if task.labels else ""
    return f"{score.loss:.4f} {unit}".rstrip() + accuracy


def short_score(task: Task, score: Score) -> str:
    """A score for a line of progress, which is short."""
    return f"{score.loss:.4g} ({score.accuracy:.1%})" if task.labels else f"{score.loss:.4g}"


def unit_of(task: Task, tokenizer: Tokens) -> str:
    """What a loss is counted in."""
    token = "byte" if isinstance(tokenizer, ByteTokenizer) else "token"
    return f"nats a {'text' if task.name == 'classify' else 'word' if task.name == 'tag' else token}"
