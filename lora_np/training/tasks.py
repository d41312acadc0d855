"""What there is to learn from in a file, for a task: batches to train on, and some held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array
from ..batch import BatchDict
from ..formats.adapters.task import Task
from ..formats.files.messages import naming
from .examples import (
    Example,
    Tokens,
    bucketed,
    each,
    encode_labelled,
    encode_pair,
    encode_tagged,
    in_order,
    label_names,
    read_labelled,
    read_pairs,
    read_tagged,
    steps_an_epoch,
)
from .text import all_windows, random_windows, read_text, split

EVALUATED = 32  # texts in a batch of what is held out
WINDOWS = 64  # at most so many of a plain text are held out


class Data(NamedTuple):
    """What to learn from.

    batch     the batch of each step, from 0
    held_out  batches that are not trained on
    epoch     steps in which each example comes once; None for windows of a plain text, which are drawn at random
    about     what it is known by: a checkpoint of other data is refused
    """

    batch: Callable[[int], BatchDict]
    held_out: Sequence[BatchDict]
    epoch: int | None
    about: dict[str, Any]


def task_of(name: str, path: Path, longest: int) -> Task:
    """The task of this name, with the labels that the file has."""
    labels: tuple[str, ...] = ()
    if name == "classify":
        labels = label_names([label for _, label in read_labelled(path)])
    elif name == "tag":
        labels = label_names([tag for _, tags in read_tagged(path) for tag in tags])
    with naming(path):
        return Task(name, labels, longest)  # type: ignore[arg-type]


def read_examples(path: Path, task: Task, tokenizer: Tokens) -> list[Example] | None:
    """The examples of a file, or None where it is plain text. A ValueError names the line, or the example, at fault."""
    numbers = {label: i for i, label in enumerate(task.labels)}

    def number(label: str) -> int:
        if label not in numbers:
            raise ValueError(f"expected a label of {' '.join(numbers)!s:.80}, got {label!r:.60}")
        return numbers[label]

    if task.name == "classify":
        return each(
            path, lambda one: encode_labelled(tokenizer, one[0], number(one[1]), task.longest), read_labelled(path)
        )
    if task.name == "tag":
        return each(
            path,
            lambda one: encode_tagged(tokenizer, one[0], [number(tag) for tag in one[1]], task.longest),
            read_tagged(path),
        )
    pairs = read_pairs(path)
    return None if pairs is None else each(path, lambda pair: encode_pair(tokenizer, pair, task.longest), pairs)


def learn_from(
    path: Path, dev: Path | None, task: Task, tokenizer: Tokens, *, N: int, held_out: float, seed: int
) -> Data:
    """Batches of N, and what is held out: the file `dev`, or a part of `path`, the last of a text, or drawn by seed."""
    if N < 1:
        raise ValueError(f"batch: expected at least 1, got {N}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a part between 0 and 1, got {held_out}")
    about: dict[str, Any] = {"N": N, "held_out": held_out, "seed": seed}
    examples = read_examples(path, task, tokenizer)
    if examples is None:
        return _from_text(path, dev, task.longest, tokenizer, about)
    if dev is None:
        order = np.random.default_rng(seed).permutation(len(examples))
        train, rest = split(order, held_out)
        examples, others = [examples[n] for n in train], [examples[n] for n in rest]
    else:
        found = read_examples(dev, task, tokenizer)
        if found is None:
            raise ValueError(f"{dev}: expected examples, as {path} has, got plain text")
        others = found
    if not examples or not others:
        lacking = (dev or path) if examples else path
        raise ValueError(
            f"{lacking}: expected examples to train on and some to hold out, got {len(examples)} and {len(others)}"
        )
    about |= {"data": _digest(examples), "dev": _digest(others)}
    return Data(
        lambda step: bucketed(examples, N=N, seed=seed, step=step),
        list(in_order(others, N=EVALUATED)),
        steps_an_epoch(examples, N),
        about,
    )


def evaluation(path: Path, task: Task, tokenizer: Tokens, *, most: int) -> list[BatchDict]:
    """Batches of a whole file, to evaluate on: all its examples, or at most `most` windows of a plain text."""
    examples = read_examples(path, task, tokenizer)
    if examples is not None:
        if not examples:
            raise ValueError(f"{path}: expected at least one example, got none")
        return list(in_order(examples, N=EVALUATED))
    return _windows(_tokens(path, tokenizer), task.longest, most, path)


def _from_text(path: Path, dev: Path | None, T: int, tokenizer: Tokens, about: dict[str, Any]) -> Data:
    """Windows of a plain text."""
    text = _tokens(path, tokenizer)
    text, others = split(text, about["held_out"]) if dev is None else (text, _tokens(dev, tokenizer))
    about |= {"data": _digest([Example(text, text)]), "dev": _digest([Example(others, others)])}

    def batch(step: int) -> BatchDict:
        return random_windows(text, N=about["N"], T=T, seed=about["seed"], step=step)._asdict()

    with naming(path):
        batch(0)  # the text is long enough, or nothing is written
    return Data(batch, _windows(others, T, WINDOWS, dev or path), None, about)


def _windows(tokens: Array, T: int, most: int, path: Path) -> list[BatchDict]:
    """Windows of a text, which `path` has."""
    with naming(path):
        return [windows._asdict() for windows in all_windows(tokens, N=EVALUATED, T=T, most=most)]


def _tokens(path: Path, tokenizer: Tokens) -> Array:
    """A plain text's tokens (length,)."""
    with naming(path):
        return np.array(tokenizer.encode(read_text(path), special=False))


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for tokens, targets in examples:
        digest.update(f"{len(tokens)} {targets.size}".encode())
        digest.update(tokens.astype("<i8").tobytes() + targets.astype("<i8").tobytes())
    return digest.hexdigest()
