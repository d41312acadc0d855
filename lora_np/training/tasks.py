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
from ..formats.files.messages import naming, shown
from ..formats.models.chat_template import ChatTemplate, Conversation
from .examples import (
    Encoded,
    Example,
    Tokens,
    bucketed,
    each,
    encode_labelled,
    encode_pair,
    encode_pieces,
    encode_tagged,
    in_order,
    pieces_of,
    steps_an_epoch,
)
from .records import Pair, Records, label_names, read_records
from .summary import Summary
from .text import all_windows, random_windows, read_text, split
from .translation import encode_translation

EVALUATED = 32  # texts in a batch of what is held out
WINDOWS = 64  # at most so many of a plain text are held out


class Reading(NamedTuple):
    """How files are read: their format, None as it is found; the base's chat template, loaded when it is needed; and
    the token that an encoder-decoder's decoder begins with, None where the base is none."""

    format: str | None = None
    template: Callable[[], ChatTemplate] | None = None
    start: int | None = None


AS_FOUND = Reading()


class Data(NamedTuple):
    """What to learn from.

    batch     the batch of each step, from 0
    held_out  batches that are not trained on
    epoch     steps in which each example comes once; None for windows of a plain text, which are drawn at random
    about     what it is known by: a checkpoint of other data is refused
    read      what was read of each file
    """

    batch: Callable[[int], BatchDict]
    held_out: Sequence[BatchDict]
    epoch: int | None
    about: dict[str, Any]
    read: Sequence[Summary] = ()


def task_of(name: str, path: Path, longest: int, format: str | None = None) -> Task:
    """The task of this name, with the labels that the file has."""
    labels = labels_in(path, name, format)
    with naming(path):
        return Task(name, labels, longest)  # type: ignore[arg-type]


def labels_in(path: Path, name: str, format: str | None = None) -> tuple[str, ...]:
    """The labels that a file has for a task of this name, in order; none for a language model."""
    if name in ("lm", "translate"):
        return ()
    found = read_records(path, name, format)
    assert found is not None
    return label_names([label for one in found.found for label in _labels_of(name, one)])


def _labels_of(name: str, record: Any) -> list[str]:
    return [record.label] if name == "classify" else record.tags


def read_examples(
    path: Path, task: Task, tokenizer: Tokens, reading: Reading = AS_FOUND
) -> tuple[list[Example] | None, Summary]:
    """The examples of a file, None where it is plain text; and what was read. A ValueError names the line at fault."""
    records = read_records(path, task.name, reading.format)
    if records is None:
        return None, Summary(path, "text", task.longest)
    summary = Summary(path, records.kind, task.longest)
    examples = _encoded(records, path, task, tokenizer, reading, summary)
    for example in examples:
        summary.add(example)
    return examples, summary


def _encoded(
    records: Records, path: Path, task: Task, tokenizer: Tokens, reading: Reading, summary: Summary
) -> list[Example]:
    """The examples of records; what is seen on the way is counted."""
    numbers = {label: i for i, label in enumerate(task.labels)}

    def number(label: str) -> int:
        if label not in numbers:
            raise ValueError(f"expected a label of {' '.join(numbers)!s:.80}, got {label!r:.60}")
        summary.labels[label] += 1
        return numbers[label]

    def fit(found: Encoded | None) -> Example | None:
        summary.left_out += found is None
        summary.cut += found is not None and found.cut
        summary.cut_sources += found is not None and found.source_cut
        return None if found is None else found.example

    def labelled(one: Any) -> Example:
        return encode_labelled(tokenizer, one.text, number(one.label), task.longest)

    def tagged(one: Any) -> Example:
        return encode_tagged(tokenizer, one.words, [number(tag) for tag in one.tags], task.longest)

    def pair(one: Pair) -> Example | None:
        summary.empty += not one.completion.strip(" \t\r\n")
        if task.name == "translate":
            return fit(encode_translation(tokenizer, one, task.longest, reading.start))
        return fit(encode_pair(tokenizer, one, task.longest))

    def chat(one: Any) -> Example | None:
        summary.unscored += one.unscored
        if not one.spans:
            raise ValueError(
                "the chat template does not render what is before an answer as the beginning of the whole; mark the "
                "answers in a template of your own with {% generation %}, and name it with --chat-template"
            )
        start, end = one.spans[-1]
        summary.endless += (
            not one.text[start:end].rstrip().endswith((*tokenizer.whole(), *tokenizer.special().values()))
        )
        return fit(encode_pieces(tokenizer, pieces_of(one.text, one.spans), task.longest))

    encode: Callable[[Any], Example | None]
    found = records.found
    if records.kind == "conversations":
        encode, found = chat, _rendered(records, path, tokenizer, reading) if found else []
    else:
        encode = {"labelled": labelled, "tagged": tagged}.get(records.kind, pair)
    return each(path, encode, found, records.lines)


def _rendered(records: Records, path: Path, tokenizer: Tokens, reading: Reading) -> list[Any]:
    """Conversations as the base's chat template writes them."""
    if reading.template is None:
        raise ValueError(f"{path}: conversations need a chat template, and none is given")
    template = reading.template()
    conversations: list[Conversation] = records.found
    rendered = template.render(conversations, tokenizer.special(), tokenizer.whole())
    for line, one in zip(records.lines, rendered, strict=True):
        if isinstance(one, str):
            raise ValueError(f"{path}:{line}: {template.where}: the chat template refuses this: {shown(one)}")
    return rendered


def learn_from(
    path: Path,
    dev: Path | None,
    task: Task,
    tokenizer: Tokens,
    *,
    N: int,
    held_out: float,
    seed: int,
    reading: Reading = AS_FOUND,
) -> Data:
    """Batches of N, and what is held out: the file `dev`, or a part of `path`, the last of a text, or drawn by seed."""
    if N < 1:
        raise ValueError(f"batch: expected at least 1, got {N}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a part between 0 and 1, got {held_out}")
    about: dict[str, Any] = {"N": N, "held_out": held_out, "seed": seed}
    examples, summary = read_examples(path, task, tokenizer, reading)
    read = [summary]
    if examples is None:
        return _from_text(path, dev, task.longest, tokenizer, about)
    if dev is None:
        order = np.random.default_rng(seed).permutation(len(examples))
        train, rest = split(order, held_out)
        examples, others = [examples[n] for n in train], [examples[n] for n in rest]
    else:
        found, summary = read_examples(dev, task, tokenizer, reading)
        read.append(summary)
        if found is None:
            raise ValueError(f"{dev}: expected examples, as {path} has, got plain text")
        others = found
    if not examples or not others:
        lacking = (dev or path) if examples else path
        raise ValueError(
            f"{lacking}: expected examples to train on and some to hold out, got {len(examples)} and {len(others)}"
            f"{read[-1 if examples else 0].none_left()}"
        )
    about |= {"data": _digest(examples), "dev": _digest(others)}
    return Data(
        lambda step: bucketed(examples, N=N, seed=seed, step=step),
        list(in_order(others, N=EVALUATED)),
        steps_an_epoch(examples, N),
        about,
        read,
    )


def evaluation(
    path: Path, task: Task, tokenizer: Tokens, *, most: int, reading: Reading = AS_FOUND
) -> tuple[list[BatchDict], Summary]:
    """Batches of a whole file, to evaluate on: all its examples, or at most `most` windows of a plain text."""
    examples, summary = read_examples(path, task, tokenizer, reading)
    if examples is not None:
        if not examples:
            raise ValueError(f"{path}: expected at least one example, got none{summary.none_left()}")
        return list(in_order(examples, N=EVALUATED)), summary
    tokens = _tokens(path, tokenizer)
    summary.tokens = summary.scored = len(tokens)
    return _windows(tokens, task.longest, most, path), summary


def _from_text(path: Path, dev: Path | None, T: int, tokenizer: Tokens, about: dict[str, Any]) -> Data:
    """Windows of a plain text."""
    text = _tokens(path, tokenizer)
    read = [Summary(path, "text", T, tokens=len(text), scored=len(text))]
    text, others = split(text, about["held_out"]) if dev is None else (text, _tokens(dev, tokenizer))
    about |= {"data": _digest([Example(text, text)]), "dev": _digest([Example(others, others)])}

    def batch(step: int) -> BatchDict:
        return random_windows(text, N=about["N"], T=T, seed=about["seed"], step=step)._asdict()

    with naming(path):
        batch(0)  # the text is long enough, or nothing is written
    if dev is not None:
        read.append(Summary(dev, "text", T, tokens=len(others), scored=len(others)))
    return Data(batch, _windows(others, T, WINDOWS, dev or path), None, about, read)


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
    for one in examples:
        arrays = [one.tokens, one.targets, *([] if one.source is None else [one.source])]
        digest.update(" ".join(str(a.size) for a in arrays).encode())
        digest.update(b"".join(a.astype("<i8").tobytes() for a in arrays))
    return digest.hexdigest()
